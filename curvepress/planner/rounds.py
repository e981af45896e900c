"""Plans of several rounds as one: which channels of the original the channels of a pruned model were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..plan import Plan, after, edits, kept
from ..scores import Scores

Ancestry = Mapping[str, list[tuple[str, int]]]
"""For every channel of a group, the group and the number that it had before."""


def ancestry(plan: Plan) -> Ancestry:
    """For every group of ``after(plan)`` that may be cut: which channels of the plan's structure its channels were.

    Raises:
        ValueError: if the plan leaves out branches or has implants, or channels cannot be told apart.
    """
    if plan.skip or plan.implants:
        raise ValueError("rounds go on from plans of channels alone; this one leaves out branches or has implants")
    stay = edits(plan)
    owners: dict[tuple[str, str, int, int], set[tuple[str, int]]] = {}
    for group in plan.structure.free:
        for m in group.members:
            for channel in kept(plan, group).tolist():
                for row in m.rows[channel].tolist():
                    owners.setdefault((group.kind, m.tensor, m.dim, row), set()).add((group.name, channel))
    found: dict[str, list[tuple[str, int]]] = {}
    for group in after(plan).free:
        old = [(m, stay.get((m.tensor, m.dim))) for m in group.members]
        for channel in range(group.size):
            places = [
                (group.kind, m.tensor, m.dim, row if rows is None else int(rows[row]))
                for m, rows in old
                for row in m.rows[channel].tolist()
            ]
            were = set.intersection(*(owners.get(place, set()) for place in places))
            if len(were) != 1:
                raise ValueError(
                    f"channel {channel} of group {group.name!r} cannot be traced back through the last round; do all in one round"
                )
            found.setdefault(group.name, []).append(were.pop())
    return found


def composed(first: Plan, second: Plan) -> Plan:
    """One plan for the structure of ``first`` that does what ``second``, a plan for ``after(first)``, does after it.

    Raises:
        ValueError: as :func:`ancestry` does.
    """
    were = ancestry(first)
    gone = {were[name][c] for name, stay in second.keep.items() for c in range(len(were[name])) if c not in stay}
    keep = {g.name: tuple(c for c in kept(first, g).tolist() if (g.name, c) not in gone) for g in first.structure.free}
    return Plan(first.structure, keep)


def remainder(first: Plan, both: Plan) -> Plan:
    """What is left to do of ``both`` once ``first`` is done: a plan for ``after(first)``.

    Raises:
        ValueError: if ``both`` keeps channels that went with ``first``, or as :func:`ancestry` does.
    """
    stay = {g.name: set(kept(both, g).tolist()) for g in both.structure.groups}
    if back := [g.name for g in first.structure.groups if not stay[g.name] <= set(kept(first, g).tolist())]:
        raise ValueError(f"the plan keeps channels of {back[0]!r} that went in an earlier round; take them out of it")
    keep = {name: tuple(c for c, (g, o) in enumerate(were) if o in stay[g]) for name, were in ancestry(first).items()}
    return Plan(after(first), keep)


def left(first: Plan, scores: Scores) -> Scores:
    """The scores of what ``first`` leaves, by the groups of ``after(first)``."""
    were = ancestry(first)
    values, stderr = (
        {name: np.array([part[g][c] for g, c in own]) for name, own in were.items()} for part in (scores.values, scores.stderr)
    )
    return replace(scores, values=values, stderr=stderr)


def carried(first: Plan, before: Scores, now: Scores) -> Scores:
    """Scores for the structure of ``first``: ``now``, by groups of ``after(first)``, for what it leaves, ``before`` for what went."""
    values, stderr = ({g: part.copy() for g, part in side.items()} for side in (before.values, before.stderr))
    for name, own in ancestry(first).items():
        for c, (g, o) in enumerate(own):
            values[g][o], stderr[g][o] = now.values[name][c], now.stderr[name][c]
    return replace(now, values=values, stderr=stderr)
