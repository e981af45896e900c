"""Several rounds of the main job: cut a part, recover, score again what is left, cut further.

Every round is a run of its own, from the same original, with a plan for it: the earlier ones in ``rounds/1``, ``rounds/2``, ... of the
folder, the last in the folder itself.  From the second on, scores, surgery and repair begin at what the round before has recovered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..costs import cost
from ..files import write_text
from ..plan import Plan, after, lost, to_json
from ..planner.channels import at_most
from ..planner.rounds import carried, composed, left, remainder
from ..report import Point
from ..runs.artifacts import fill, load_scores, read_json, save_scores
from ..runs.desk import Desk
from ..runs.folder import FLOWS, PLAN, Run
from ..runs.recipe import Recipe
from ..scores import LOSS_UNIT, predicted_rise
from ..surgery.cutting import Applied, applied
from .findings import HISTORY
from .pipeline import ORIGINAL, Settings, Stage, keep_pruned, loss_after, mean_loss, probes, repaired, scored
from .searching import check_budget, limits_of, searched
from .sessions import estimate, kept, noted, started
from .terminal import say

PRICING = ("weigh", "truncate")
"""Stages that price bits and ranks, in runs that have settings for them."""
EARLIER = tuple(FLOWS)[: tuple(FLOWS).index("export")]
"""The stages of every round but the last."""


def through(
    run: Run, task: Recipe, settings: Mapping[str, Settings], *, again: bool, before: Desk | None = None, stages: Sequence[str] = (*FLOWS,)
) -> Run:
    """The run after these stages, each of which is done unless it was before; with a round ``before``, going on from that."""
    settings, work = {**settings, **_since(settings, before)}, works(before)
    for stage in stages:
        if stage == "score":
            for pricing in (p for p in PRICING if p in settings):
                run = kept(run, task, pricing, settings[pricing], again=again)
            check_budget(Desk(run, task, note=partial(noted, "plan")), settings["plan"])
            estimate(run, task, settings)
        run = kept(run, task, stage, settings[stage], again=again, work=work.get(stage))
    return run


def earlier_rounds(folder: Path, task: Recipe, settings: Mapping[str, Settings], count: int, *, again: bool) -> Desk | None:
    """All rounds of so many but the last, each under its part of the budget, in equal ratios; None if there is but one."""
    before = None
    for n in range(1, count):
        say(f"round {n} of {count}, in {folder / 'rounds' / str(n)}")
        with started(folder / "rounds" / str(n), task) as run:
            own = {**settings, "plan": {**settings["plan"], "part": n / count}}
            before = Desk(through(run, task, own, again=again, before=before, stages=EARLIER), task)
    if before is not None:
        say(f"round {count} of {count}")
    return before


def _since(settings: Mapping[str, Settings], before: Desk | None) -> dict[str, Settings]:
    """The settings of what begins at an earlier round, which name it by what it made."""
    if before is None:
        return {}
    made = {k: before.run.stages[s].outputs[k][:16] for s, k in (("plan", PLAN), ("fit", "model.safetensors"))}
    return {stage: {**settings[stage], "before": made} for stage in ("score", "plan", "apply", "repair")}


def works(before: Desk | None) -> dict[str, Stage]:
    """What the stages of a round do that begins at an earlier one."""
    begun = {"score": _score, "plan": _plan, "apply": _apply, "repair": _repair}
    return {} if before is None else {stage: partial(work, before) for stage, work in begun.items()}


def _score(before: Desk, desk: Desk, settings: Settings) -> None:
    first = before.plan()
    found = scored(desk, settings, before.compressed("model.safetensors"), after(first))
    desk.note(found.detail)
    save_scores(carried(first, load_scores(before.run.folder), found), desk.run.folder)


def _plan(before: Desk, desk: Desk, settings: Settings) -> None:
    """What the round before left is cut further, unless it fits already."""
    first = before.plan()
    limits, short = at_most(**limits_of(first.structure, settings)).absolute(cost(Plan(first.structure))), after(first)
    second = Plan(short)
    if any(getattr(cost(second), k) > v for k, v in limits.items()):
        asked = {**{k: v for k, v in settings.items() if k != "part"}, **{k: int(v) for k, v in limits.items()}}
        second = searched(desk.run, short, left(first, load_scores(desk.run.folder)), asked)
    write_text(desk.path(PLAN), to_json(composed(first, second)))


def _apply(before: Desk, desk: Desk, settings: Settings) -> None:
    """The recovered model of the round before cut further, in the form in which the whole plan is restored."""
    plan, start, seed = desk.plan(), before.compressed("model.safetensors"), settings["seed"]
    second = remainder(before.plan(), plan)
    whole = applied(desk.original(), plan, *desk.recipe.inputs())
    made = Applied(fill(whole.model, applied(start, second, *desk.recipe.inputs()).model), whole.form, whole.reason)
    earlier = read_json(before.path("history.json"), HISTORY)["validation"]
    validation = {"original": read_json(desk.path("original.json"), ORIGINAL)["validation"], "round before": earlier}
    keep_pruned(desk, settings, made, validation, {"frontier": [_point(before, desk, start, second, seed)], "implants": []})


def _point(before: Desk, desk: Desk, start: Any, second: Plan, seed: int) -> Point:
    """Predicted and measured rise of the loss in this round."""
    scores, batches, plan = left(before.plan(), load_scores(desk.run.folder)), probes(desk, seed), desk.plan()
    measured = loss_after(desk, start, second, scores.method, batches, seed) - mean_loss(desk, start, batches)
    known = predicted_rise(scores, {g.name: lost(second, g) for g in second.structure.free}) if scores.unit == LOSS_UNIT else (None, None)
    return Point(cost(plan).params / cost(Plan(plan.structure)).params, known[0], known[1], measured)


def _repair(before: Desk, desk: Desk, settings: Settings) -> None:
    repaired(desk, settings, before.compressed("model.safetensors"), remainder(before.plan(), desk.plan()))


def round_count(count: int, latency: str | None, *, bits: str | None, implants: bool, branches: str) -> int:
    """How many rounds there are to be.

    Raises:
        ValueError: if there are to be several, of more than channels.
    """
    given = {"--latency": latency is not None, "--bits": bits is not None, "--implants": implants, "--branches": branches != "0"}
    if count > 1 and (others := [name for name, there in given.items() if there]):
        raise ValueError(
            f"--rounds {count} cuts channels alone, {others[0]} is for one round; leave one of them out, "
            "or quantize the folder of the rounds afterwards with `curvepress quantize`"
        )
    return count
