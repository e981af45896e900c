"""The widths that groups may have, from whole to narrowest, with the predicted rise of the loss at each; and branches, there or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..scores import Scores
from ..structure import Branch, Group, Structure
from .alignment import Shape, head_widths


@dataclass(frozen=True, eq=False)
class Ladder:
    """Widths of one group, or of several that keep in step: group ``g`` with divisor ``d`` has ``widths[rung] / d`` channels.

    ``rises`` and ``variances`` are those of the channels lost at each rung, the least valuable first; ``prices[rung]`` is the rise for each
    channel of the last step down to it, infinite at the top.  ``orders`` has the channels of each group by falling score.

    A residual branch is a ladder of the widths 1 and 0 without groups.
    """

    groups: tuple[tuple[Group, int], ...]
    widths: np.ndarray
    rises: np.ndarray
    variances: np.ndarray
    prices: np.ndarray
    orders: tuple[np.ndarray, ...]
    branch: Branch | None = None

    def kept(self, rung: int) -> dict[str, tuple[int, ...]]:
        """The channels that stay at a rung, by group."""
        width = int(self.widths[rung])
        both = zip(self.groups, self.orders, strict=True)
        return {g.name: tuple(np.sort(order[: width // divisor]).tolist()) for (g, divisor), order in both}


def ladders(structure: Structure, scores: Scores, shape: Shape, exchange: float = 1.0) -> list[Ladder]:
    """A ladder for each group that may be cut; groups of an attention block that stay aligned share one.

    Args:
        exchange: what all scores are multiplied with.

    Raises:
        ValueError: if a group has no scores, or they are not finite.
    """
    free = {g.name: g for g in shape.not_whole(structure)}
    if not free:
        return []
    blocks = [b for b in head_widths(structure) if all(g.name in free for g in b)] if shape.aligned else []
    partial = {g.name for b in head_widths(structure) for g in b} if shape.aligned else set()
    alone = [[g] for n, g in free.items() if n not in partial]
    least = shape.widths(structure, dict.fromkeys(free, 0))
    return [_ladder(block, scores, shape, least, exchange) for block in [*alone, *blocks]]


def branch_ladders(structure: Structure, prices: Mapping[str, tuple[float, float]], exchange: float = 1.0) -> list[Ladder]:
    """A ladder for each residual branch that has a price: the rise of the loss without it and its standard error.

    A rise below zero, which is noise, counts as none.

    Raises:
        ValueError: if there is no such branch, or its price is not finite.
    """
    known, found = {b.name: b for b in structure.branches}, []
    for name, (rise, stderr) in prices.items():
        if name not in known:
            raise ValueError(f"a price for branch {name!r}: the branches are {', '.join(known) or 'none'}; have them measured again")
        if not np.isfinite([rise, stderr]).all():
            raise ValueError(f"branch {name!r} has the price {rise} ± {stderr}; prices must be finite: have them measured again")
        rises = np.array([0.0, max(rise, 0.0) * exchange])
        variances = np.array([0.0, (stderr * exchange) ** 2])
        found.append(Ladder((), np.array([1, 0]), rises, variances, np.array([np.inf, rises[1]]), (), known[name]))
    return found


def _ladder(block: list[Group], scores: Scores, shape: Shape, least: Mapping[str, int], exchange: float) -> Ladder:
    top = max(g.size for g in block)
    divisors = [top // g.size for g in block]
    step = int(np.lcm.reduce([*divisors, *(shape.step(g) for g in block)]))
    low = least[block[0].name] * divisors[0]
    widths = np.array([top, *range((top - 1) // step * step, low - 1, -step)] if low < top else [top])
    rises, variances, orders = np.zeros(len(widths)), np.zeros(len(widths)), []
    for group, divisor in zip(block, divisors, strict=True):
        values, errors = _values(scores, group)
        order = np.argsort(-values, kind="stable")
        gone = [np.concatenate([np.zeros(1), np.cumsum(v[order][::-1])]) for v in (values * exchange, np.square(errors * exchange))]
        lost = group.size - widths // divisor
        rises, variances = rises + gone[0][lost], variances + gone[1][lost]
        orders.append(order)
    prices = np.concatenate([[np.inf], np.diff(rises) / -np.diff(widths)])
    return Ladder(tuple(zip(block, divisors, strict=True)), widths, rises, variances, prices, tuple(orders))


def _values(scores: Scores, group: Group) -> tuple[np.ndarray, np.ndarray]:
    values = scores.values.get(group.name)
    if values is None or len(values) != group.size:
        raise ValueError(f"the scores say nothing about group {group.name!r} of {group.size} channels; were they made for another model?")
    if not np.isfinite(values).all():
        worst = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"channel {worst} of group {group.name!r} has the score {values[worst]}; scores must be finite: make them again")
    return values, scores.stderr[group.name]
