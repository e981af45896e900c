"""Channels in blocks: where latency falls in steps, a channel alone saves nothing, and one too few may even cost.

Every group has a curve: its loss by width, and the latency of the model by that width with the others as they are.  At one price of a
second each group takes the width where loss and price are least (the Lagrangian of the budget).  That is a corner of the lower hull of
its curve, so cliffs are stepped over.  The price is bisected.  A layer's time is no sum over its two sides, so the curves are drawn
again around the plan found, a few times; then what is left of the budget is given back block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from ..latency import Table, activations, model_seconds
from ..plan import Plan, tensors_after
from ..scores import Scores
from ..structure import Group, Structure
from .alignment import Shape

ROUNDS = 4
"""Times that the curves are drawn."""
Widths = dict[str, int]
MANY = 8
"""Widths of a group that are tried when channels are given back."""
Clock = Callable[[Widths], float]
Bisect = Callable[[Callable[[int], Plan], int], Plan]


@dataclass(frozen=True)
class Choice:
    """What is chosen among: the groups of a structure, by scores, in the widths that a shape allows."""

    structure: Structure
    scores: Scores
    shape: Shape

    def groups(self) -> tuple[Group, ...]:
        """The groups that may be cut.

        Raises:
            ValueError: if the scores are for another model or not finite.
        """
        found = self.shape.cuttable(self.structure)
        for group in found:
            values = self.scores.values.get(group.name, np.zeros(0))
            if len(values) != group.size or not np.isfinite(values).all():
                about = f"group {group.name!r} of {group.size} channels"
                raise ValueError(f"the scores say nothing about {about}, or no finite numbers; were they made for another model?")
        return found

    def allowed(self, group: Group) -> list[int]:
        """The widths that a group may have, ascending."""
        step, least = self.shape.step(group), max(ceil(self.shape.floor * group.size), 1)
        return sorted({min(ceil(w / step) * step, group.size) for w in range(least, group.size + 1)})

    def loss(self, group: Group) -> np.ndarray:
        """The scores of what goes, by width from 0 to whole, ``[size + 1]``: the channels worth least go first."""
        return np.concatenate([np.cumsum(np.sort(self.scores.values[group.name]))[::-1], [0.0]])

    def plan(self, widths: Mapping[str, int]) -> Plan:
        """The plan that keeps the best channels at these widths, or at the next ones that the shape allows."""
        fitting = self.shape.widths(self.structure, {g.name: widths.get(g.name, g.size) for g in self.structure.free})
        best = {n: np.argsort(-self.scores.values[n], kind="stable")[:width] for n, width in fitting.items()}
        return Plan(self.structure, {n: tuple(np.sort(c).tolist()) for n, c in best.items()})


def narrowed(choice: Choice, table: Table, fits: Callable[[Plan], bool], bisect: Bisect) -> Plan:
    """The plan of least loss that was found to fit.

    Raises:
        ValueError: from ``bisect``, if none fits.
    """
    groups, seconds = choice.groups(), clock(choice.structure, table)
    losses = {g.name: choice.loss(g) for g in groups}
    around: Widths = {g.name: g.size for g in choice.structure.free}
    found: list[tuple[float, Plan]] = []
    for turn in range(ROUNDS):
        corners = {g.name: hull(*_curve(choice, g, around, seconds), losses[g.name]) for g in groups}
        prices = sorted({price for steps in corners.values() for price, _ in steps})

        def family(step: int, corners: dict[str, list[tuple[float, int]]] = corners, prices: list[float] = prices) -> Plan:
            price = prices[step - 1] if step else -np.inf
            return choice.plan({n: _at(steps, price) for n, steps in corners.items()})

        try:
            plan = bisect(family, len(prices))
        except ValueError:
            if turn:  # the curves around a plan may not reach as far as those around the whole model
                break
            raise
        around = _widths(plan)
        found.append((float(sum(losses[n][w] for n, w in around.items() if n in losses)), plan))
    return _given_back(choice, seconds, fits, _widths(min(found, key=lambda f: f[0])[1]))


def _widths(plan: Plan) -> Widths:
    return {g.name: len(plan.keep.get(g.name, range(g.size))) for g in plan.structure.free}


def clock(structure: Structure, table: Table) -> Clock:
    """Seconds of the model by the widths of its free groups.

    Where no index of a weight belongs to two groups its width is a sum over groups, quick to take; elsewhere the plan is written out.
    """
    timed = _timed_part(structure, table)
    sides = {n: (_side(timed, n, layer.out), _side(timed, n, layer.into)) for n, layer in table.layers.items()}
    if not all(_disjoint(timed, n, d) for n, layer in table.layers.items() for d in (layer.out, layer.into)):
        return lambda widths: _written_out(timed, widths, table)
    layer = lru_cache(maxsize=None)(table.layer)
    made = {n: table.each * activations(timed.tensors, table, [n]) / timed.tensors[n].shape[table.layers[n].out] for n in sides}

    def seconds(widths: Widths) -> float:
        total = table.fixed
        for name, (out, into) in sides.items():
            wide, deep = (base + sum(rows * widths[g] for g, rows in parts) for base, parts in (out, into))
            total += layer(name, wide, deep) + made[name] * wide
        return total

    return seconds


def _timed_part(structure: Structure, table: Table) -> Structure:
    """What of a structure bears on its latency: the weights of the table."""
    tensors = {n: t for n, t in structure.tensors.items() if n in table.layers}
    kept = (Group(g.name, g.size, g.kind, tuple(m for m in g.members if m.tensor in tensors)) for g in structure.free)
    return Structure(tensors, tuple(kept))


def _members(timed: Structure, tensor: str, dim: int) -> list[tuple[Group, np.ndarray]]:
    return [(g, m.rows) for g in timed.groups for m in g.members if (m.tensor, m.dim) == (tensor, dim)]


def _disjoint(timed: Structure, tensor: str, dim: int) -> bool:
    rows = [r.ravel() for _, r in _members(timed, tensor, dim)]
    return not rows or len(np.unique(np.concatenate(rows))) == sum(map(len, rows))


def _side(timed: Structure, tensor: str, dim: int) -> tuple[int, list[tuple[str, int]]]:
    """What of a width no group takes away, and how many indices each channel of its groups has."""
    parts = [(g.name, rows.shape[1]) for g, rows in _members(timed, tensor, dim)]
    return timed.tensors[tensor].shape[dim] - sum(r.size for _, r in _members(timed, tensor, dim)), parts


def _written_out(timed: Structure, widths: Widths, table: Table) -> float:
    plan = Plan(timed, {g.name: tuple(range(widths[g.name])) for g in timed.groups})
    return model_seconds(tensors_after(plan), table)


def _curve(choice: Choice, group: Group, around: Widths, seconds: Clock) -> tuple[list[int], np.ndarray]:
    """Widths from whole to least, and seconds of the model."""
    widths = choice.allowed(group)[::-1]
    return widths, np.array([seconds({**around, group.name: w}) for w in widths])


def hull(widths: list[int], seconds: np.ndarray, loss: np.ndarray) -> list[tuple[float, int]]:
    """The corners of the hull below loss (by width) over seconds: ``(price of a second from which a width is best, width)``, ascending.

    The first is that of the least loss, which is best from minus infinity on.
    """
    loss = loss[widths]
    order = sorted(range(len(widths)), key=lambda n: (loss[n], -widths[n]))
    corners: list[tuple[float, int]] = [(-np.inf, order[0])]
    for n in order[1:]:
        if seconds[n] >= seconds[corners[-1][1]]:
            continue
        while True:
            last = corners[-1][1]
            price = float((loss[n] - loss[last]) / (seconds[last] - seconds[n]))
            if price > corners[-1][0] or len(corners) == 1:
                break
            corners.pop()
        corners.append((price, n))
    return [(price, widths[n]) for price, n in corners]


def _at(corners: list[tuple[float, int]], price: float) -> int:
    return [w for p, w in corners if p <= price or p == -np.inf][-1]


def _given_back(choice: Choice, seconds: Clock, fits: Callable[[Plan], bool], widths: Widths) -> Plan:
    """Channels given back while the plan still fits, those first whose removal costs most."""
    plan, tries = choice.plan(widths), []
    for group in choice.groups():
        loss, wider = choice.loss(group), _worthwhile(*_curve(choice, group, widths, seconds), widths[group.name])
        tries += [(float(loss[widths[group.name]] - loss[w]), group.name, w) for w in wider]
    for gain, name, width in sorted(tries, reverse=True):
        if gain > 0 and width > widths[name] and fits(larger := choice.plan({**widths, name: width})):
            widths, plan = {**widths, name: width}, larger
    return plan


def _worthwhile(widths: list[int], seconds: np.ndarray, now: int) -> list[int]:
    """Widths above the present one that are faster than all wider ones, some of them where they are many."""
    best = np.minimum.accumulate(np.concatenate([[np.inf], seconds[:-1]]))
    found = [w for w, t, b in zip(widths, seconds, best, strict=True) if w > now and t < b]
    return found[:: max(1, len(found) // MANY)]
