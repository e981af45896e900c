"""The main job as stages: each reads files of the run folder, calls the library, and writes files there.

What each reads and writes is listed in ``runs.FLOWS``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from math import hypot
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import curvature
from .. import report as reports
from ..costs import Cost, cost
from ..export import Agreement, Timing, compare_latency, faster, to_onnx
from ..files import write_text
from ..metering import clock, metered
from ..objective import Batch, batch_loss, batch_size
from ..plan import Plan, dumps, lost, to_json
from ..planner.channels import at_most, frontier
from ..repairing.sequential import Repaired, repair
from ..runs.artifacts import StoredSamples, fill, load_scores, load_structure, read_json, save, save_scores, save_structure
from ..runs.desk import Desk
from ..runs.folder import PLAN, RECIPE, Entry, Run, finish, is_done, objections, require, scratch
from ..runs.recipe import Recipe, check
from ..runs.settings import descent
from ..scores import LOSS_UNIT, Scores, predicted_rise, score
from ..scores.reconstruction import reconstruction
from ..structure import Structure
from ..surgery.cutting import Applied, applied
from ..tracing.watching import trace
from ..training.batchnorm import reestimate
from ..training.fitting import fit
from . import quantizing as quantization
from .findings import HISTORY, LATENCY, PRUNED, REPAIRED, figures, gathered
from .planning import weighed
from .ranking import described, fitted, predicted_by_implants, truncated
from .searching import planned
from .timetables import kept_promise

Settings = Mapping[str, Any]
Stage = Callable[[Desk, Settings], None]
ORIGINAL = {"format": "curvepress original", "version": 1}
METRICS = {"format": "curvepress metrics", "version": 1}
SCORING = ("method", "samples", "reliability", "seconds", "estimator", "precision", "probes", "temperature", "seed")
"""Settings of the score stage that :func:`~curvepress.scores.score` takes."""
PROBED, TRIED = 4, 256
"""Calibration batches on which predicted and measured rise of the loss are compared; examples that models are repaired with for that."""


def _trace(desk: Desk, settings: Settings) -> None:
    recipe = desk.recipe
    model = recipe.build(trained=True)
    check(recipe, model)
    structure = trace(model, *recipe.inputs())
    if not structure.free:
        reasons = "; ".join(sorted({g.frozen for g in structure.groups if g.frozen}))
        raise ValueError(f"{recipe.name}: nothing in this model can be cut: {reasons or 'it has no weights with channels'}")
    validation = recipe.metrics(model, "validation")
    _check_untrained(recipe, model)
    save(model, desk.path("original.safetensors"))
    write_text(desk.path("original.json"), dumps({**ORIGINAL, "validation": validation}))
    save_structure(structure, desk.path("structure.json"))


def _check_untrained(recipe: Recipe, model: nn.Module) -> None:
    try:
        fill(recipe.build(trained=False), model)
    except ValueError as error:
        raise ValueError(f"{recipe.name}: model(trained=False) makes another model than model(): {error}") from error


def _score(desk: Desk, settings: Settings) -> None:
    scores = _of_original(desk, settings)
    desk.note(scores.detail)
    save_scores(scores, desk.run.folder)


def _of_original(desk: Desk, settings: Settings) -> Scores:
    return scored(desk, settings, desk.original(), load_structure(desk.path("structure.json")))


def scored(desk: Desk, settings: Settings, model: nn.Module, structure: Structure) -> Scores:
    """The scores of a model of this structure."""
    recipe = desk.recipe
    given = {k: settings[k] for k in SCORING}
    batches = recipe.batches("calibration", seed=settings["seed"])
    done = StoredSamples(scratch(desk.run, "score", settings))
    return score(model, recipe.loss, batches, structure, **given, progress=partial(_forecast, desk), done=done)


def _forecast(desk: Desk, progress: curvature.Progress) -> None:
    desk.progress("calibration batches", progress.samples, progress.wanted or progress.samples)
    if progress.samples == 1 and progress.expected is not None:
        desk.note(f"at most {clock(progress.expected)} more and {progress.peak / 2**20:.0f} MiB, from the first batch")


def _plan(desk: Desk, settings: Settings) -> None:
    write_text(desk.path(PLAN), to_json(planned(desk, settings)))


def _apply(desk: Desk, settings: Settings) -> None:
    plan, model = desk.plan(), desk.original()
    made = applied(model, plan, *desk.recipe.inputs())
    validation = {"original": read_json(desk.path("original.json"), ORIGINAL)["validation"]}
    facts = {"frontier": list(_frontier(desk, model, plan, settings["seed"])), "implants": list(described(desk.run, plan))}
    keep_pruned(desk, settings, made, validation, facts)


def keep_pruned(desk: Desk, settings: Settings, made: Applied, validation: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write a pruned model with its statistics re-estimated, its metrics beside those given, and ``facts``, with points of the frontier."""
    recipe = desk.recipe
    small = reestimate(made.model, recipe.batches("calibration", seed=settings["seed"]))
    metrics = {**validation, "pruned": recipe.metrics(made.model, "validation"), "re-estimated": recipe.metrics(small, "validation")}
    save(small, desk.path("pruned.safetensors"))
    points = [asdict(p) for p in facts["frontier"]]
    about = {**PRUNED, "form": made.form, "reason": made.reason, "validation": metrics, **facts, "frontier": points}
    write_text(desk.path("pruned.json"), dumps(about))


def _frontier(desk: Desk, model: nn.Module, plan: Plan, seed: int) -> Iterator[reports.Point]:
    """Predicted and measured rise of the loss, on the way from the whole model to the plan and at the plan itself.

    Prices after repair are held against models that are repaired.
    """
    scores, structure = load_scores(desk.run.folder), plan.structure
    whole = cost(Plan(structure)).params
    final = cost(plan).params / whole
    plans = [*frontier(structure, scores, [1 - (1 - final) * part for part in (0.1, 0.2, 0.35, 0.5, 0.75)]), plan]
    batches = probes(desk, seed)
    before = mean_loss(desk, model, batches)
    for n, step in enumerate(plans):
        after = loss_after(desk, model, step, scores.method, batches, seed)
        rise, stderr = _predicted(desk, scores, step)
        desk.progress("plans measured", n + 1, len(plans))
        yield reports.Point(cost(step).params / whole, rise, stderr, after - before)


def probes(desk: Desk, seed: int) -> list[Batch]:
    """The calibration batches on which predicted and measured rise are compared."""
    return list(islice(desk.recipe.batches("calibration", seed=seed + 1), PROBED))


def _predicted(desk: Desk, scores: Scores, plan: Plan) -> tuple[float, float] | tuple[None, None]:
    implants = predicted_by_implants(desk.run, plan)
    if (
        scores.unit != LOSS_UNIT or plan.skip or implants is None
    ):  # branches are measured, with statistics that the pruned model has not yet
        return None, None
    rise, stderr = predicted_rise(scores, {g.name: lost(plan, g) for g in plan.structure.free})
    return rise + implants[0], hypot(stderr, implants[1])


def loss_after(desk: Desk, model: nn.Module, step: Plan, method: str, batches: Sequence[Batch], seed: int) -> float:
    """The mean loss of what a plan makes of a model; beside prices after repair, once it is repaired."""
    small = fitted(desk, applied(model, step, *desk.recipe.inputs()).model, step, TRIED, seed)
    if method == reconstruction.__name__:
        small = refitted(desk, reestimate(small, batches), model, step, TRIED, seed).model
    return mean_loss(desk, small.eval(), batches)


def mean_loss(desk: Desk, model: nn.Module, batches: Sequence[Batch]) -> float:
    """Over all examples of the batches."""
    with torch.no_grad():
        total = sum(batch_loss(model, desk.recipe.loss, b).item() * batch_size(b) for b in batches)
    return total / sum(map(batch_size, batches))


def _repair(desk: Desk, settings: Settings) -> None:
    """The pruned model with its implants fitted to data, and refitted to the original; with no examples, as it was."""
    repaired(desk, settings, desk.original(), desk.plan())


def repaired(desk: Desk, settings: Settings, original: nn.Module, plan: Plan) -> None:
    """Write the pruned model, which ``plan`` made of ``original``, refitted to that."""
    recipe, small = desk.recipe, desk.compressed("pruned.safetensors")
    facts: dict[str, Any] = {"validation": {}, "layers": [], "left": {}, "examples": 0, "bytes": 0}
    if settings["examples"]:
        start = fitted(desk, small, plan, settings["examples"], settings["seed"])
        metrics = {"implants fitted": recipe.metrics(start, "validation")} if plan.implants else {}
        made = refitted(desk, start, original, plan, settings["examples"], settings["seed"], partial(desk.progress, "layers"))
        small, layers = made.model, [asdict(layer) for layer in made.layers]
        desk.note("; ".join(f"{name} is left as it was: {why}" for name, why in made.left.items()))
        metrics |= {"repaired": recipe.metrics(small, "validation")}
        facts = {"validation": metrics, "layers": layers, "left": made.left, "examples": made.examples, "bytes": made.bytes}
    save(small, desk.path("repaired.safetensors"))
    write_text(desk.path("repaired.json"), dumps({**REPAIRED, **facts}))


def refitted(
    desk: Desk, small: nn.Module, original: nn.Module, plan: Plan, examples: int, seed: int,
    tell: Callable[[int, int], None] = lambda *_: None,
) -> Repaired:  # fmt: skip
    """A model that ``plan`` made of ``original``, refitted to it; what goes wrong says how to go on without."""
    batches = desk.recipe.batches("calibration", seed=seed)
    try:
        return repair(small, original, batches, plan, examples=examples, progress=tell)
    except ValueError as error:
        raise ValueError(f"{desk.recipe.name}: {error}; go on without repair with `compress --repair-examples 0`") from error


def _fit(desk: Desk, settings: Settings) -> None:
    recipe, start = desk.recipe, desk.compressed("repaired.safetensors")
    teacher = desk.original() if settings["distill"] else None
    fitted = fit(
        start,
        recipe.loss,
        desk.training_batches,
        evaluate=lambda m: recipe.metrics(m, "validation"),
        checkpoints=scratch(desk.run, "fit", settings),
        teacher=teacher,
        **descent(settings),
    )
    validation = recipe.metrics(fitted.model, "validation")
    save(fitted.model, desk.path("model.safetensors"))
    epochs = [{"epoch": e.epoch, "lr": e.lr, "loss": e.loss, "metrics": dict(e.metrics)} for e in fitted.history]
    write_text(desk.path("history.json"), dumps({**HISTORY, "epochs": epochs, "validation": validation}))


def _export(desk: Desk, settings: Settings) -> None:
    inputs = desk.recipe.inputs()
    models = {"original": desk.original(), "model": desk.compressed("model.safetensors")}
    agreements = {name: to_onnx(model, inputs, desk.path(f"{name}.onnx")) for name, model in models.items()}
    paths = {name: desk.path(f"{name}.onnx") for name in models}
    sizes = _batch_sizes(agreements, settings["batches"])
    timings = compare_latency(paths, tree_map(Tensor.numpy, inputs), threads=settings["threads"], batches=sizes)
    pairs = zip(timings[::2], timings[1::2], strict=True)
    facts = {"agreement": {n: asdict(a) for n, a in agreements.items()}, "latency": [asdict(_latency(*pair)) for pair in pairs]}
    promise = kept_promise(desk, models["original"], models["model"])
    write_text(desk.path("latency.json"), dumps({**LATENCY, **facts, **({"budget": promise} if promise else {})}))


def _batch_sizes(agreements: Mapping[str, Agreement], wanted: Sequence[int]) -> tuple[int, ...]:
    """The wanted batch sizes, or the only one that a file takes."""
    fixed = [a.sizes[0] for a in agreements.values() if a.batch == "static"]
    return (fixed[0],) if fixed else tuple(wanted)


def _latency(before: Timing, after: Timing) -> reports.Latency:
    wall, small, ratio = (reports.Spread(q.low, q.median, q.high) for q in (before.wall, after.wall, after.ratio))
    return reports.Latency(after.batch, after.threads, after.rounds, wall, small, ratio, faster(after))


def _report(desk: Desk, settings: Settings) -> None:
    report = gathered(desk)
    write_text(desk.path("report.json"), json.dumps(reports.to_dict(report)))
    write_text(desk.path("metrics.json"), dumps({**METRICS, **figures(report)}))
    write_text(desk.path("report.html"), reports.html(report))


STAGES: Mapping[str, Stage] = {
    "trace": _trace,
    "score": _score,
    "plan": _plan,
    "weigh": weighed,
    "truncate": truncated,
    "apply": _apply,
    "repair": _repair,
    "fit": _fit,
    "export": _export,
    "report": _report,
    **quantization.STAGES,
}


@dataclass(frozen=True)
class Outcome:
    """A run after a stage, and whether the stage was done already."""

    run: Run
    entry: Entry
    kept: bool


def run_stage(desk: Desk, stage: str, settings: Settings, work: Stage | None = None) -> Outcome:
    """Do a stage, whether or not it was done before.

    Args:
        work: what is done, where it is not what :data:`STAGES` has: it writes the same files.

    Raises:
        ValueError: if what it reads is missing, damaged or out of date, or the stage fails.
    """
    settings = _complete(desk.recipe, stage, settings)
    require(desk.run, stage)
    with metered() as taken, _blamed(desk, stage):
        (work or STAGES[stage])(desk, settings)
    run = finish(desk.run, stage, settings, taken)
    return Outcome(run, run.stages[stage], kept=False)


def assist(desk: Desk, settings: Settings) -> None:
    """Make this process's share of the samples of the score stage, which the first process does with :func:`run_stage`.

    Raises:
        ValueError: as that does.
    """
    settings = _complete(desk.recipe, "score", settings)
    require(desk.run, "score")
    with _blamed(desk, "score"):
        _of_original(desk, settings)


@contextmanager
def _blamed(desk: Desk, stage: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except OSError as error:  # a full disk does not say where it is
        raise OSError(error.errno, error.strerror, error.filename or str(desk.run.folder)) from error
    except Exception as error:  # the model's own code may raise anything, anywhere
        raise ValueError(f"{desk.recipe.name}: the stage {stage!r} failed: {desk.recipe.blame.said(error)}") from error


def keep_stage(desk: Desk, stage: str, settings: Settings, *, again: bool = False, work: Stage | None = None) -> Outcome:
    """Do a stage, unless it is done: finished with these settings, from its inputs as they are now.

    Args:
        work: as in :func:`run_stage`; the settings must tell it from any other.
        again: do it even where it was finished with other settings or its files were changed; without this, that is refused.

    Raises:
        ValueError: if it is refused, or the stage fails.
    """
    full = _complete(desk.recipe, stage, settings)
    if is_done(desk.run, stage, full):
        return Outcome(desk.run, desk.run.stages[stage], kept=True)
    if not again and (found := objections(desk.run, stage, full)):
        raise ValueError(
            f"{desk.run.folder} holds a run whose stage {stage!r} was done otherwise ({'; '.join(found)}); {_ways_out(desk.run, found)}"
        )
    return run_stage(desk, stage, settings, work)


def _ways_out(run: Run, found: Sequence[str]) -> str:
    usual = "choose another folder, or add --again to do it again, and all that follows from it"
    edited = any(f.startswith(PLAN) for f in found)
    return (
        f"{usual}; or go on from the plan as it is now, stage by stage: curvepress apply {run.folder}, then repair, fit, export and report"
        if edited
        else usual
    )


def _complete(recipe: Recipe, stage: str, settings: Settings) -> dict[str, Any]:
    """The settings with the fingerprint of the recipe's code, where the stage runs it."""
    return {**settings} if stage == "plan" and settings.get("latency") is None else {**settings, RECIPE: recipe.digest}


def left_over(desk: Desk, asked: Settings, names: Sequence[str]) -> dict[str, int]:
    """By how much the plan in the folder stays below those limits of these costs that were asked for."""
    whole, now = costs(desk)
    limits = {k: asked[k] for k in names if asked.get(k) is not None}
    return {k: int(limit - getattr(now, k)) for k, limit in at_most(**limits).absolute(whole).items()} if limits else {}


def costs(desk: Desk) -> tuple[Cost, Cost]:
    """The cost of the whole model and of the plan in the folder."""
    plan = desk.plan()
    return cost(Plan(plan.structure)), cost(plan)
