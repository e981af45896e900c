"""From scores to a plan: one family of plans ordered by price, one budget, one bisection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .alignment import Shape
from .costs import Cost, cost
from .plan import Plan
from .scores import RELATIVE_UNIT, Scores
from .structure import Group, Structure

Budget = Callable[[Cost, Cost], bool]
"""``(cost of a plan, cost of the whole model) -> does it fit``; any function will do."""

PER = ("channel", "params", "bytes", "macs")


@dataclass(frozen=True)
class AtMost:
    """The usual budget: an upper limit on some of the costs, as a share of the whole model or absolute."""

    limits: Mapping[str, float]

    def __call__(self, now: Cost, whole: Cost) -> bool:
        """Whether every limit is kept."""
        return all(getattr(now, k) <= limit for k, limit in self.absolute(whole).items())

    def absolute(self, whole: Cost) -> dict[str, float]:
        """The limits in units of the cost."""
        return {k: v * getattr(whole, k) if _share(v) else v for k, v in self.limits.items()}

    def __str__(self) -> str:
        return ", ".join(f"{k} at most {f'{v:.4g} of the original' if _share(v) else f'{v:,}'}" for k, v in self.limits.items())


def _share(limit: float) -> bool:
    return isinstance(limit, float) and limit <= 1


def at_most(**limits: float) -> AtMost:
    """A budget of ``params``, ``bytes`` and ``macs``: a float up to 1 is a share of the whole model, anything else absolute.

    Raises:
        ValueError: if a name is not a cost, a limit is not positive, or there is none.
    """
    names = [f.name for f in fields(Cost)]
    for name, limit in limits.items():
        if name not in names:
            raise ValueError(f"at_most({name}={limit}): the costs are {', '.join(names)}")
        if not limit > 0:
            raise ValueError(f"at_most({name}={limit}) must be positive: a share such as 0.5, or an absolute number")
    if not limits:
        raise ValueError(f"at_most() needs a limit; give one or more of {', '.join(names)}, such as params=0.5")
    return AtMost(limits)


def search(
    structure: Structure,
    scores: Scores,
    budget: Budget,
    *,
    per: str = "channel",
    multiple: int | Mapping[str, int] = 1,
    floor: float = 0.05,
    whole: Collection[str] = (),
    aligned: bool = False,
) -> Plan:
    """The gentlest plan that fits the budget: every channel worth less than one price goes, and the price is bisected.

    Args:
        per: what a channel's score is divided by to make its worth: nothing (``channel``), or the ``params``, ``bytes`` or
            ``macs`` that its removal alone would save (the Lagrangian of that budget).
        multiple: widths are rounded up to multiples of this, as far as the group is wide; a mapping gives one by kind of group.
        floor: the least share of a group's channels that stays; at least one does.
        whole: groups that are not cut, by kind or by name; ``*`` in a name stands for anything.
        aligned: the query-key and the value width of an attention block stay equal, as code with one ``head_dim`` wants it.

    Raises:
        ValueError: if an option is out of range, or no plan fits; the message has the smallest cost that can be reached.
    """
    if per not in PER:
        raise ValueError(f"search needs per in {PER}; got {per!r}")
    shape = Shape(multiple, floor, whole, aligned)
    worth = worths(structure, scores, per)
    prices = np.unique(np.concatenate([np.zeros(0), *worth.values()]))

    def family(step: int) -> Plan:
        return prune(structure, worth, prices[step - 1] if step else -np.inf, shape)

    return cheapest(family, len(prices), budget)


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


def cheapest(family: Callable[[int], Plan], steps: int, budget: Budget) -> Plan:
    """The first plan of ``family(0) ... family(steps)`` that fits; the family must only shrink.

    Raises:
        ValueError: if even the last does not fit.
    """
    whole = cost(Plan(family(0).structure))
    if not budget(smallest := cost(family(steps)), whole):
        raise ValueError(unreachable(smallest, whole, budget, "lower the floor or the multiple"))
    low, high = -1, steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if budget(cost(family(middle)), whole) else (middle, high)
    return family(high)


def unreachable(smallest: Cost, whole: Cost, budget: Budget, way_out: str) -> str:
    """What is said of a budget that cannot be met."""
    least = ", ".join(f"{k} {v:,} ({v / max(getattr(whole, k), 1):.1%})" for k, v in vars(smallest).items())
    return f"no plan fits the budget ({_described(budget)}); the smallest this model can be made is: {least}. Allow more, or {way_out}"


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
