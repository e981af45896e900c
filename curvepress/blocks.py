"""Channels in blocks: where latency falls in steps, a channel alone saves nothing, and one too few may even cost.

Every group has a curve: its loss by width, and the latency of the model by that width with the others as they are.  At one price of a
second each group takes the width where loss and price are least (the Lagrangian of the budget).  That is a corner of the lower hull of
its curve, so cliffs are stepped over.  The price is bisected.  A layer's time is no sum over its two sides, so the curves are drawn again around the
plan found, a few times; then what is left of the budget is given back block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from .alignment import Shape
from .latency import Table, model_seconds
from .plan import Plan, tensors_after
from .scores import Scores
from .structure import Group, Structure

ROUNDS = 4
"""Times that the curves are drawn."""
Widths = dict[str, int]
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
    groups = choice.groups()
    losses = {g.name: choice.loss(g) for g in groups}
    around: Widths = {g.name: g.size for g in groups}
    found: list[tuple[float, Plan]] = []
    for turn in range(ROUNDS):
        corners = {g.name: hull(*_curve(choice, g, around, table)) for g in groups}
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
    return _given_back(choice, losses, fits, _widths(min(found, key=lambda f: f[0])[1]))


def _widths(plan: Plan) -> Widths:
    return {g.name: len(plan.keep.get(g.name, range(g.size))) for g in plan.structure.free}


def _curve(choice: Choice, group: Group, around: Widths, table: Table) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Widths from whole to least, seconds of the model, and loss."""
    widths = choice.allowed(group)[::-1]
    timed = _timed_part(choice.structure, table)
    seconds = [_seconds(timed, {**around, group.name: w}, table) for w in widths]
    return widths, np.array(seconds), choice.loss(group)[widths]


def _timed_part(structure: Structure, table: Table) -> Structure:
    """What of a structure bears on its latency: the weights of the table."""
    tensors = {n: t for n, t in structure.tensors.items() if n in table.layers}
    kept = (Group(g.name, g.size, g.kind, tuple(m for m in g.members if m.tensor in tensors)) for g in structure.free)
    return Structure(tensors, tuple(kept))


def _seconds(timed: Structure, widths: Widths, table: Table) -> float:
    plan = Plan(timed, {g.name: tuple(range(min(widths.get(g.name, g.size), g.size))) for g in timed.groups})
    return model_seconds(tensors_after(plan), table)


def hull(widths: list[int], seconds: np.ndarray, loss: np.ndarray) -> list[tuple[float, int]]:
    """The corners of the lower hull of loss over seconds: ``(price of a second from which the width is best, width)``, ascending.

    The first is that of the least loss, which is best from minus infinity on.
    """
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


def _given_back(choice: Choice, losses: Mapping[str, np.ndarray], fits: Callable[[Plan], bool], widths: Widths) -> Plan:
    """Channels given back while the plan still fits, those first whose removal costs most."""
    plan = choice.plan(widths)
    wider = {g.name: [w for w in choice.allowed(g) if w > widths[g.name]] for g in choice.groups()}
    tries = sorted(((losses[n][widths[n]] - losses[n][w], n, w) for n, more in wider.items() for w in more), reverse=True)
    for gain, name, width in tries:
        if gain > 0 and width > widths[name] and fits(larger := choice.plan({**widths, name: width})):
            widths, plan = {**widths, name: width}, larger
    return plan
