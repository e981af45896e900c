"""The plan stage of the main job: what is left out and cut, under the budget that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..costs import cost, written
from ..latency import Table
from ..plan import Plan
from ..planner import exactly
from ..planner.alignment import head_widths
from ..planner.channels import AtMost, at_most, search
from ..planner.depth import around
from ..planner.joint import Family, choose
from ..runs.artifacts import load_scores, load_structure
from ..runs.desk import Desk
from ..runs.folder import Run
from ..scores import LOSS_UNIT, Scores
from ..structure import Structure
from .planning import AUTO, check_unit, joint_family, left_out, rewired, weighed_without
from .timetables import table_of, timed_plan

Settings = Mapping[str, Any]
PERCENTS = 100
"""Up to here an absolute limit that is out of reach was perhaps meant in percent."""


def planned(desk: Desk, settings: Settings) -> Plan:
    """The plan of a run under the budget of its settings; one of latency is kept when it is measured.

    Raises:
        ValueError: if no plan fits, the whole model does, or prices are of several temperatures.
    """
    check_unit(desk.run, settings)
    structure, scores = load_structure(desk.path("structure.json")), load_scores(desk.run.folder)
    skip = left_out(desk, structure, settings["branches"]) if not settings.get("bits") else weighed_without(desk.run)
    if settings.get("latency") is None:
        return _whole(desk, settings, searched(desk.run, structure, scores, settings, skip, note=desk.note))
    table = table_of(desk, settings)

    def within(limit: float) -> Plan:
        return searched(desk.run, structure, scores, {**settings, "latency": limit}, skip, table)

    return _whole(desk, settings, timed_plan(desk, settings, table, within).plan)


def _whole(desk: Desk, settings: Settings, plan: Plan) -> Plan:
    return rewired(desk, plan, *settings["activation_bits"]) if settings["branches"] == AUTO else plan


def searched(
    run: Run,
    structure: Structure,
    scores: Scores,
    settings: Settings,
    skip: Sequence[str] = (),
    table: Table | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The gentlest plan for a structure under the limits in the settings, around the branches in ``skip``; ``note`` is told what is proven.

    Raises:
        ValueError: if no plan fits, or the whole structure does.
    """
    limits = limits_of(structure, settings)
    options = {k: settings[k] for k in ("per", "multiple", "floor", "whole", "aligned")}
    if settings["aligned"] and not head_widths(structure):
        raise ValueError(
            "--aligned has nothing to hold equal: this model has no attention block with a query-key and a value width; leave it out"
        )
    try:
        budget = replace(at_most(**limits), of=cost(Plan(structure), table))

        def gentlest(structure: Structure, scores: Scores) -> Plan:
            times = _rest(table, structure) if table and skip else table
            if settings.get("bits") or settings.get("implants") or "exact" in settings:
                found = joint_family(run, structure, scores, settings)
                if "exact" in settings:
                    return _proven(found, budget, settings["exact"], note)
                return choose(found, budget, partial(cost, table=times)).plan
            return search(structure, scores, budget, table=times, **options)

        plan = around(structure, scores, skip, gentlest) if skip else gentlest(structure, scores)
    except ValueError as error:
        percents = [v for v in limits.values() if isinstance(v, int) and v <= PERCENTS]
        raise ValueError(f"{error}{f'; for {percents[0]} percent write {percents[0]}%' if percents else ''}") from error
    if plan.empty and not settings.get("bits"):
        said = ", ".join(f"{written(k, v)} {k}" for k, v in cost(plan, table).known().items())
        raise ValueError(f"the whole model ({said}) already fits the budget ({at_most(**limits)}), so there is nothing to do; ask for less")
    return plan


def _proven(family: Family, budget: AtMost, seconds: float, note: Callable[[str], None]) -> Plan:
    """The best plan, as far as that can be proven in this time; in none it is only seen whether it could be."""
    exactly.check(family.problem)
    if not seconds:
        return choose(family, budget).plan
    found, bound = exactly.best(family, budget, seconds)
    note(f"predicted rise {found.predicted.rise:.4g}; no plan within the budget has one below {bound:.4g}, which is proven")
    return found.plan


def exact_choice(seconds: float | None, others: Mapping[str, Any], chosen: Settings) -> dict[str, float]:
    """For how long the best plan is looked for; nothing is said where it is not.

    Args:
        others: options that have no exact plan, by name; those not asked for are none or false.
        chosen: the bits there are to choose from.

    Raises:
        ValueError: beside one of these.
    """
    beside = [name for name, given in others.items() if given]
    beside += ["several --activation-bits"] if len(chosen.get("activation_bits", ())) > 1 else []
    if seconds is not None and beside:
        raise ValueError(f"--exact cannot be had beside {beside[0]}: it proves plans of channels, branches and bits of weights alone")
    return {} if seconds is None else {"exact": seconds}


def weighing(chosen: Settings, implants: Settings, exact: Settings) -> list[str]:
    """The options by which channels are weighed in units of the loss."""
    return [name for name, there in {"--bits": chosen, "--implants": implants, "--exact": exact}.items() if there]


def limits_of(structure: Structure, settings: Settings) -> dict[str, float]:
    """What was asked for; on the ``part`` of the way there, in equal ratios, where there is one in the settings, as absolute numbers."""
    asked = {k: settings[k] for k in ("params", "bytes", "macs", "bops", "latency") if settings.get(k) is not None}
    if "part" not in settings:
        return asked
    whole = cost(Plan(structure))
    return {
        k: int(getattr(whole, k) ** (1 - settings["part"]) * v ** settings["part"]) for k, v in at_most(**asked).absolute(whole).items()
    }


def _rest(table: Table, structure: Structure) -> Table:
    return table.without([name for name in table.layers if name not in structure.tensors])


def check_budget(desk: Desk, settings: Settings) -> None:
    """See whether a plan can meet a budget, which does not depend on the scores; for one of latency its table is measured now.

    Raises:
        ValueError: if none can, or the whole model does.
    """
    structure = load_structure(desk.path("structure.json"))
    zeros = {g.name: np.zeros(g.size) for g in structure.free}
    table = None if settings.get("latency") is None else table_of(desk, settings)
    skip = weighed_without(desk.run) if settings.get("bits") else _largest(structure, settings["branches"])
    quick = {**settings, "exact": 0.0} if "exact" in settings else settings
    searched(desk.run, structure, Scores(zeros, zeros, "none", LOSS_UNIT, 0, 0), quick, skip, table)


def _largest(structure: Structure, count: int) -> tuple[str, ...]:
    if count > len(structure.branches):
        raise ValueError(f"--branches {count}: this model has {len(structure.branches)} residual branches that can be left out")
    return tuple(b.name for b in sorted(structure.branches, key=lambda b: cost(Plan(structure, skip=(b.name,))).params)[:count])
