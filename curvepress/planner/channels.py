"""From scores to a plan: one family of plans ordered by price, one budget, one bisection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..costs import Cost, cost, written
from ..latency import Table
from ..plan import Plan
from ..scores import RELATIVE_UNIT, Scores
from ..structure import Group, Structure
from .alignment import Shape
from .blocks import Choice, narrowed

Budget = Callable[[Cost, Cost], bool]
"""``(cost of a plan, cost of the whole model) -> does it fit``; any function will do."""

PER = ("channel", "params", "bytes", "macs", "latency")


@dataclass(frozen=True)
class AtMost:
    """The usual budget: an upper limit on some of the costs, as a share of the whole model, or of ``of``, or absolute."""

    limits: Mapping[str, float]
    of: Cost | None = None

    def __call__(self, now: Cost, whole: Cost) -> bool:
        """Whether every limit is kept.

        Raises:
            ValueError: if latency is limited and unknown.
        """
        if "latency" in self.limits and now.latency is None:
            raise ValueError("a latency budget needs measured times: give search a table, or limit params, bytes or macs")
        return all(getattr(now, k) <= limit for k, limit in self.absolute(whole).items())

    def absolute(self, whole: Cost) -> dict[str, float]:
        """The limits in units of the cost."""
        whole = self.of or whole
        return {k: v * getattr(whole, k) if _share(v) else v / 1000 if k == "latency" else v for k, v in self.limits.items()}

    def __str__(self) -> str:
        return ", ".join(f"{k} at most {f'{v:.4g} of the original' if _share(v) else _said(k, v)}" for k, v in self.limits.items())


class Milliseconds(float):
    """An absolute limit of latency, also where it is below 1."""


def _said(name: str, limit: float) -> str:
    return f"{limit:g} ms" if name == "latency" else f"{limit:,}"


def _share(limit: float) -> bool:
    return isinstance(limit, float) and limit <= 1 and not isinstance(limit, Milliseconds)


def at_most(**limits: float | str) -> AtMost:
    """A budget of ``params``, ``bytes``, ``macs`` and ``latency``: a float up to 1 is a share of the whole model, anything else absolute.

    An absolute latency is written with its unit, such as ``latency="0.8ms"``.

    Raises:
        ValueError: if a name is not a cost, a limit is not positive, or there is none.
    """
    names = [f.name for f in fields(Cost)]
    for name in limits:
        if name not in names:
            raise ValueError(f"at_most({name}={limits[name]}): the costs are {', '.join(names)}")
    if not limits:
        raise ValueError(f"at_most() needs a limit; give one or more of {', '.join(names)}, such as params=0.5")
    return AtMost({k: milliseconds(v) if k == "latency" else _positive(k, v) for k, v in limits.items()})


def _positive(name: str, limit: float | str) -> float:
    if isinstance(limit, str) or not 0 < limit < np.inf:
        raise ValueError(f"at_most({name}={limit}) must be positive: a share such as 0.5, or an absolute number")
    return limit


def milliseconds(limit: float | str) -> float:
    """A limit of latency: a share up to 1 as it is, or a text such as ``0.8ms``.

    Raises:
        ValueError: if it is neither, or not positive.
    """
    try:
        value = Milliseconds(limit.strip().removesuffix("ms")) if isinstance(limit, str) else float(limit)
    except ValueError:
        value = float("nan")
    unit = isinstance(limit, Milliseconds) or (isinstance(limit, str) and limit.strip().endswith("ms"))
    if not 0 < value < np.inf or not (unit or (value <= 1 and not isinstance(limit, str))):
        raise ValueError(f"at_most(latency={limit!r}) must be a share above 0 and up to 1, such as 0.6, or a time such as '0.8ms'")
    return Milliseconds(value) if unit else value


def search(
    structure: Structure,
    scores: Scores,
    budget: Budget,
    *,
    per: str | None = None,
    multiple: int | Mapping[str, int] = 1,
    floor: float = 0.05,
    whole: Collection[str] = (),
    aligned: bool = False,
    table: Table | None = None,
) -> Plan:
    """The gentlest plan that fits the budget: every channel worth less than one price goes, and the price is bisected.

    Args:
        per: what a channel's score is divided by to make its worth: nothing (``channel``), or the ``params``, ``bytes`` or
            ``macs`` that its removal alone would save (the Lagrangian of that budget).  With ``latency`` channels go in the blocks
            that the runtime takes them in, a block's score divided by the seconds it saves.  By default it is what :func:`usual` says.
        multiple: widths are rounded up to multiples of this, as far as the group is wide; a mapping gives one by kind of group.
        floor: the least share of a group's channels that stays; at least one does.
        whole: groups that are not cut, by kind or by name; ``*`` in a name stands for anything.
        aligned: the query-key and the value width of an attention block stay equal, as code with one ``head_dim`` wants it.
        table: measured times of this model's layers, which a budget of latency needs.

    Raises:
        ValueError: if an option is out of range, or no plan fits; the message has the smallest cost that can be reached.
    """
    per = usual(scores, budget) if per is None else per
    if per not in PER:
        raise ValueError(f"search needs per in {PER}; got {per!r}")
    shape = Shape(multiple, floor, whole, aligned)
    if per == "latency":
        return _by_latency(Choice(structure, scores, shape), budget, table)
    worth = worths(structure, scores, per)
    prices = np.unique(np.concatenate([np.zeros(0), *worth.values()]))

    def family(step: int) -> Plan:
        return prune(structure, worth, prices[step - 1] if step else -np.inf, shape)

    return cheapest(family, len(prices), budget, table)


def usual(scores: Scores, budget: Budget) -> str:
    """What scores are divided by where nothing else is said: the cost that is limited, latency before all.  Where several others are, and
    for scores that only rank, they stay as they are (``channel``)."""
    limited = [k for k in budget.limits if k in PER] if isinstance(budget, AtMost) else []
    if "latency" in limited:
        return "latency"
    return limited[0] if len(limited) == 1 and scores.unit != RELATIVE_UNIT else "channel"


def _by_latency(choice: Choice, budget: Budget, table: Table | None) -> Plan:
    if table is None:
        raise ValueError("search(per='latency') needs measured times: give it a table, or divide by channel, params, bytes or macs")
    whole = cost(Plan(choice.structure), table)
    return narrowed(choice, table, lambda plan: budget(cost(plan, table), whole), lambda f, n: cheapest(f, n, budget, table))


def worths(structure: Structure, scores: Scores, per: str) -> dict[str, np.ndarray]:
    """Every channel's score, divided by what removing one channel of its group saves."""
    whole, worth = cost(Plan(structure)), {}
    for group in structure.free:
        if group.name not in scores.values or len(scores.values[group.name]) != group.size:
            about = f"group {group.name!r} of {group.size} channels"
            raise ValueError(f"the scores say nothing about {about}; were they made for another model?")
        saved = 1 if per == "channel" else getattr(whole, per) - getattr(_one_less(structure, group), per)
        worth[group.name] = scores.values[group.name] / max(saved, 1)
    return worth


def _one_less(structure: Structure, group: Group) -> Cost:
    return cost(Plan(structure, {group.name: tuple(range(1, group.size))}))


def with_latency(structure: Structure, scores: Scores, seconds: Callable[[Plan], float], *, eta: float) -> Scores:
    """Scores less ``eta`` times the seconds that removing the channel alone would save: NViT's latency term.

    Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023, eq. 8,
    ``I_S - eta * (Lat(W) - Lat(W without S))``; their code takes ``eta`` = 5e-4 a second.

    Args:
        seconds: the latency of a plan, such as one measured in a table or modelled by its cost.
    """
    whole = seconds(Plan(structure))
    saved = {g.name: whole - seconds(Plan(structure, {g.name: tuple(range(1, g.size))})) for g in structure.free}
    values = {n: v - eta * saved[n] for n, v in scores.values.items()}
    return replace(scores, values=values, method=f"{scores.method} with latency", unit=RELATIVE_UNIT)


def prune(structure: Structure, worth: Mapping[str, np.ndarray], price: float, shape: Shape) -> Plan:
    """Keep the channels worth more than ``price``, but never fewer than the shape allows."""
    widths = shape.widths(structure, {n: int((w > price).sum()) for n, w in worth.items()})
    best = {n: np.argsort(-worth[n], kind="stable")[:width] for n, width in widths.items()}
    return Plan(structure, {n: tuple(np.sort(channels).tolist()) for n, channels in best.items()})


def cheapest(family: Callable[[int], Plan], steps: int, budget: Budget, table: Table | None = None) -> Plan:
    """The first plan of ``family(0) ... family(steps)`` that fits; the family must only shrink.

    Raises:
        ValueError: if even the last does not fit.
    """
    whole = cost(Plan(family(0).structure), table)
    if not budget(smallest := cost(family(steps), table), whole):
        raise ValueError(unreachable(smallest, whole, budget, "lower the floor or the multiple"))
    low, high = -1, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if budget(cost(family(middle), table), whole) else (middle, high)
    return family(high)


def unreachable(smallest: Cost, whole: Cost, budget: Budget, way_out: str, *, by: str = "") -> str:
    """What is said of a budget that cannot be met."""
    sizes = ((budget.of if isinstance(budget, AtMost) else None) or whole).known()
    least = ", ".join(f"{k} {written(k, v)} ({v / (sizes[k] or 1):.1%})" for k, v in smallest.known().items())
    made = f"that {by} can make this model is" if by else "this model can be made is"
    limits = budget.absolute(whole) if isinstance(budget, AtMost) else {}
    missed = [k for k, v in limits.items() if smallest.known().get(k, 0) > v]
    still = f"; too much is still {' and '.join(missed)}" if len(limits) > 1 and missed else ""
    return f"no plan fits the budget ({_described(budget)}); the smallest {made}: {least}{still}. Allow more, or {way_out}"


def _described(budget: Budget) -> str:
    return str(budget) if isinstance(budget, AtMost) else getattr(budget, "__name__", "the given function")


def frontier(structure: Structure, scores: Scores, shares: Sequence[float], **options: Any) -> list[Plan]:
    """The plans for falling shares of the parameters, as far down as they can be reached."""
    plans = []
    for share in shares:
        try:
            plans.append(search(structure, scores, at_most(params=float(share)), **options))
        except ValueError:
            break
    return plans
