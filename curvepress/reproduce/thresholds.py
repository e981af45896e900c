"""HAP's choice: one threshold for the channels of all layers, and a second one above which what goes gets 1x1 filters instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from ..costs import cost
from ..implants import Implant
from ..plan import Plan, lost
from ..planner.alignment import Shape
from ..planner.channels import at_most, unreachable
from ..scores import Scores
from ..structure import Group, Structure

RATIOS = 512
"""Thresholds that are tried, at most, evenly spread over all channels."""


@dataclass(frozen=True)
class Rule:
    """How channels are told apart.

    Attributes:
        limit: the most of a layer that goes, as a share.
        implants: the share of what goes that gets 1x1 filters instead, the channels worth most.
        first: a layer of which one channel or none would stay keeps channel 0 instead, as the released code does; else its best.
        inverted: with implants, as the released code does: a layer that *keeps* more than ``limit`` is cut at its own ``limit``, and
            places in the sorted list of its scores are taken for channels.
    """

    limit: float = 0.95
    implants: float = 0.0
    first: bool = False
    inverted: bool = False


@dataclass(frozen=True, eq=False)
class Told:
    """The channels of a layer that stay, and those that get 1x1 filters; the others go."""

    kept: np.ndarray
    pointwise: np.ndarray


def told(values: np.ndarray, ratio: float, everything: np.ndarray, rule: Rule) -> Told:
    """What becomes of a layer with these scores where ``ratio`` of ``everything``, the sorted scores of all layers, goes."""
    inner = (1 - rule.implants) * ratio
    if rule.implants and rule.inverted:
        found = _mended(Told(*_between(values, _at(everything, ratio), _at(everything, inner))), values, rule)
        if len(found.kept) + len(found.pointwise) <= rule.limit * len(values):
            return found
        places = np.sort(values)  # from here on, channels are places in this list
        return _mended(Told(*_between(places, _at(places, rule.limit), _at(places, inner))), places, rule)
    threshold = _at(everything, ratio)
    if (values <= threshold).sum() > rule.limit * len(values):
        threshold = _at(values, rule.limit)
    kept, pointwise = _between(values, threshold, min(threshold, _at(everything, inner)) if rule.implants else threshold)
    return _mended(Told(kept, pointwise), values, rule)


def _at(values: np.ndarray, share: float) -> float:
    """The value that about ``share`` of all values are not above."""
    return float(np.sort(values)[min(int(share * len(values)), len(values) - 1)])


def _between(values: np.ndarray, high: float, low: float) -> tuple[np.ndarray, np.ndarray]:
    return np.flatnonzero(values > high), np.flatnonzero((values <= high) & (values > low))


def _mended(found: Told, values: np.ndarray, rule: Rule) -> Told:
    """At least one channel stays whole."""
    if len(found.kept) > (1 if rule.first else 0):
        return found
    stays = 0 if rule.first else int(values.argmax())
    return Told(np.array([stays]), np.setdiff1d(found.pointwise, [stays]))


def plan_at(ratio: float, structure: Structure, scores: Scores, rule: Rule, groups: Collection[Group]) -> Plan:
    """The plan in which about ``ratio`` of all channels of these groups go."""
    everything = np.sort(np.concatenate([scores.values[g.name] for g in groups]))
    able = {g.name: makers for g in groups if (makers := _makers(structure, g))} if rule.implants else {}
    keep, back = {}, {}
    for g in groups:
        found = told(scores.values[g.name], ratio, everything, rule)
        own = found.pointwise if g.name in able else np.empty(0, dtype=int)
        keep[g.name] = tuple(sorted({*found.kept.tolist(), *own.tolist()}))
        if len(own):
            back.update({weight: Implant("pointwise", channels=tuple(rows[own].tolist())) for weight, rows in able[g.name].items()})
    return Plan(structure, keep, implants=back)


def _makers(structure: Structure, group: Group) -> dict[str, np.ndarray]:
    """The output channel of each weight that makes a group, by channel, where all of them may have 1x1 filters."""
    makers = {m.tensor: m.rows[:, 0] for m in group.members if m.role == "out"}
    try:
        Plan(structure, {}, implants={name: Implant("pointwise", channels=(int(rows[0]),)) for name, rows in makers.items()})
    except ValueError:
        return {}
    return makers


def within(limits: Mapping[str, float], structure: Structure, scores: Scores, rule: Rule, *, whole: Collection[str] = ()) -> Plan:
    """Of all thresholds whose plan fits the limits, the plan that keeps most parameters.

    Raises:
        ValueError: if none fits, or nothing has to go.
    """
    groups, budget, everything = Shape(whole=whole).cuttable(structure), at_most(**limits), cost(Plan(structure))
    count = sum(g.size for g in groups)
    ratios = np.unique(np.linspace(0, count - 1, min(count, RATIOS)).round()) / count
    plans = [plan_at(float(r), structure, scores, rule, groups) for r in ratios]
    costs = [cost(p) for p in plans]
    if not (fitting := [n for n, c in enumerate(costs) if budget(c, everything)]):
        raise ValueError(unreachable(min(costs, key=lambda c: c.params), everything, budget, "ask for less to go"))
    return plans[max(fitting, key=lambda n: costs[n].params)]


def shares(plan: Plan) -> dict[str, float]:
    """Which share of all channels goes, and which gets 1x1 filters."""
    groups = plan.structure.free
    count = sum(g.size for g in groups)
    makers = {m.tensor: g.name for g in groups for m in g.members if m.role == "out"}
    pointwise = {makers[w]: len(i.channels) for w, i in plan.implants.items() if i.kind == "pointwise"}
    return {"gone": sum(len(lost(plan, g)) for g in groups) / count, "pointwise": sum(pointwise.values()) / count}
