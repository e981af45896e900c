"""The main job as stages: each reads artifacts of the run folder, calls the library, and writes artifacts.

    trace   ->  original.safetensors, structure.json
    score   ->  scores.safetensors, scores.json
    plan    ->  plan.json
    apply   ->  pruned.safetensors, pruned.json
    fit     ->  model.safetensors, history.json
    export  ->  original.onnx, model.onnx, latency.json
    report  ->  report.json, metrics.json, report.html
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import report as reports
from .artifacts import load, load_scores, load_structure, read_json, restore, save, save_scores, save_structure
from .cost import Cost, cost
from .export import Timing, compare_latency, faster, to_onnx
from .files import write_text
from .metering import metered
from .objective import Batch, Batches, batch_loss, batch_size
from .plan import Plan, dumps, from_json, lost, to_json
from .planner import at_most, frontier, search
from .recipe import Recipe, check
from .runs import Entry, Run, changed_settings, finish, is_done, scratch
from .scores import LOSS_UNIT, predicted_rise, score
from .surgery import applied
from .tracing import trace
from .training import fit, reestimate

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""
Settings = Mapping[str, Any]
PRUNED = {"format": "curvepress pruned", "version": 1}
HISTORY = {"format": "curvepress history", "version": 1}
LATENCY = {"format": "curvepress latency", "version": 1}
METRICS = {"format": "curvepress metrics", "version": 1}
PROBED = 4
"""Calibration batches on which predicted and measured rise of the loss are compared."""


@dataclass(frozen=True)
class Desk:
    """What every stage works with."""

    run: Run
    recipe: Recipe
    progress: Progress

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.run.folder / name

    def original(self) -> nn.Module:
        """The model as it was before compression."""
        return load(self.recipe.build(trained=False), self.path("original.safetensors")).eval()

    def plan(self) -> Plan:
        """The plan in the folder."""
        try:
            return from_json(self.path("plan.json").read_text())
        except ValueError as error:
            raise ValueError(f"{self.path('plan.json')}: {error}") from None

    def compressed(self, name: str) -> nn.Module:
        """The plan's model with the tensors of a file of the run."""
        return restore(self.recipe.build(trained=False), self.plan(), self.path(name), *self.recipe.inputs())


def _trace(desk: Desk, settings: Settings) -> None:
    model = desk.recipe.build(trained=True)
    check(desk.recipe, model)
    structure = trace(model, *desk.recipe.inputs())
    if not structure.free:
        reasons = "; ".join(sorted({g.frozen for g in structure.groups if g.frozen}))
        raise ValueError(f"nothing in this model can be cut: {reasons or 'it has no weights with channels'}")
    save(model, desk.path("original.safetensors"))
    save_structure(structure, desk.path("structure.json"))


def _score(desk: Desk, settings: Settings) -> None:
    recipe, structure = desk.recipe, load_structure(desk.path("structure.json"))
    batches = recipe.batches("calibration", seed=settings["seed"])
    scores = score(desk.original(), recipe.loss, batches, structure, **settings, progress=partial(desk.progress, "calibration batches"))
    save_scores(scores, desk.run.folder)


def _plan(desk: Desk, settings: Settings) -> None:
    structure, scores = load_structure(desk.path("structure.json")), load_scores(desk.run.folder)
    limits = {k: settings[k] for k in ("params", "bytes", "macs") if settings[k] is not None}
    options = {k: settings[k] for k in ("per", "multiple", "floor")}
    plan = search(structure, scores, at_most(**limits), **options)
    if not plan.keep:
        raise ValueError(f"the whole model already fits the budget ({at_most(**limits)}), so there is nothing to do; ask for less")
    write_text(desk.path("plan.json"), to_json(plan))


def _apply(desk: Desk, settings: Settings) -> None:
    recipe, plan, model = desk.recipe, desk.plan(), desk.original()
    made = applied(model, plan, *recipe.inputs())
    small = reestimate(made.model, recipe.batches("calibration", seed=settings["seed"]))
    validation = {
        "original": recipe.metrics(model, "validation"),
        "pruned": recipe.metrics(made.model, "validation"),
        "statistics re-estimated": recipe.metrics(small, "validation"),
    }
    points = [asdict(p) for p in _frontier(desk, model, plan, settings["seed"])]
    save(small, desk.path("pruned.safetensors"))
    facts = {**PRUNED, "form": made.form, "reason": made.reason, "validation": validation, "frontier": points}
    write_text(desk.path("pruned.json"), dumps(facts))


def _frontier(desk: Desk, model: nn.Module, plan: Plan, seed: int) -> Iterator[reports.Point]:
    """Predicted and measured rise of the loss, on the way from the whole model to the plan and at the plan itself."""
    scores, structure = load_scores(desk.run.folder), plan.structure
    whole = cost(Plan(structure)).params
    final = cost(plan).params / whole
    plans = [*frontier(structure, scores, [1 - (1 - final) * part for part in (0.1, 0.2, 0.35, 0.5, 0.75)]), plan]
    batches = list(islice(desk.recipe.batches("calibration", seed=seed + 1), PROBED))
    before = _mean_loss(desk, model, batches)
    for n, step in enumerate(plans):
        small = applied(model, step, *desk.recipe.inputs()).model
        rise = predicted_rise(scores, {g.name: lost(step, g) for g in structure.free}) if scores.unit == LOSS_UNIT else (None, None)
        desk.progress("plans measured", n + 1, len(plans))
        yield reports.Point(cost(step).params / whole, *rise, _mean_loss(desk, small.eval(), batches) - before)


def _mean_loss(desk: Desk, model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        total = sum(batch_loss(model, desk.recipe.loss, b).item() * batch_size(b) for b in batches)
    return total / sum(map(batch_size, batches))


def _fit(desk: Desk, settings: Settings) -> None:
    recipe, given = desk.recipe, dict(settings)
    start, distill = desk.compressed("pruned.safetensors"), given.pop("distill")
    given["milestones"] = tuple(given["milestones"])
    teaching = {"teacher": desk.original(), "distill_weight": distill} if distill else {}
    checkpoints = scratch(desk.run, "fit", settings, READS["fit"])
    fitted = fit(
        start,
        recipe.loss,
        partial(_ticking, recipe, desk.progress),
        evaluate=lambda m: recipe.metrics(m, "validation"),
        checkpoints=checkpoints,
        **given,
        **teaching,
    )
    save(fitted.model, desk.path("model.safetensors"))
    epochs = [{"epoch": e.epoch, "lr": e.lr, "loss": e.loss, "metrics": dict(e.metrics)} for e in fitted.history]
    write_text(desk.path("history.json"), dumps({**HISTORY, "epochs": epochs, "validation": recipe.metrics(fitted.model, "validation")}))


class _Ticking:
    """Batches that report how far they are."""

    def __init__(self, batches: Any, progress: Progress) -> None:
        self.batches, self.progress = batches, progress

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for n, batch in enumerate(self.batches):
            yield batch
            self.progress("training batches", n + 1, len(self))


def _ticking(recipe: Recipe, progress: Progress, seed: int) -> Batches:
    batches = recipe.batches("train", seed=seed)
    return _Ticking(batches, progress) if hasattr(batches, "__len__") else batches


def _export(desk: Desk, settings: Settings) -> None:
    inputs = desk.recipe.inputs()
    agreements = {
        name: asdict(to_onnx(model, inputs, desk.path(f"{name}.onnx")))
        for name, model in (("original", desk.original()), ("model", desk.compressed("model.safetensors")))
    }
    paths = {name: desk.path(f"{name}.onnx") for name in agreements}
    timings = compare_latency(paths, [x.numpy() for x in inputs], threads=settings["threads"], batches=tuple(settings["batches"]))
    pairs = [(a, b) for a, b in zip(timings[::2], timings[1::2], strict=True)]
    measured = [asdict(_latency(before, after)) for before, after in pairs]
    write_text(desk.path("latency.json"), dumps({**LATENCY, "agreement": agreements, "latency": measured}))


def _latency(before: Timing, after: Timing) -> reports.Latency:
    spreads = (reports.Spread(**vars(q)) for q in (before.wall, after.wall, after.ratio))
    return reports.Latency(after.batch, after.threads, after.rounds, *spreads, faster(after))


def _report(desk: Desk, settings: Settings) -> None:
    report = _gathered(desk)
    write_text(desk.path("report.json"), json.dumps(reports.to_dict(report)))
    write_text(desk.path("metrics.json"), dumps({**METRICS, **_metrics(report)}))
    write_text(desk.path("report.html"), reports.html(report))


def read_report(run: Run) -> reports.Report:
    """The report of a finished run."""
    return reports.from_dict(read_json(run.folder / "report.json", {}))


def _gathered(desk: Desk) -> reports.Report:
    """The report from the artifacts; the test split is looked at here, and only here."""
    recipe, plan, stages = desk.recipe, desk.plan(), desk.run.stages
    pruned, history = read_json(desk.path("pruned.json"), PRUNED), read_json(desk.path("history.json"), HISTORY)
    latency = read_json(desk.path("latency.json"), LATENCY)
    test = {
        "original": recipe.metrics(desk.original(), "test"),
        "recovered": recipe.metrics(desk.compressed("model.safetensors"), "test"),
    }
    return reports.Report(
        title=" ".join([Path(recipe.name).stem, *(f"{k}={v}" for k, v in recipe.options.items() if k != "data")]),
        plan=plan,
        scores=load_scores(desk.run.folder),
        before=cost(Plan(plan.structure)),
        after=cost(plan),
        metrics={**pruned["validation"], "recovered": history["validation"]},
        test=test,
        frontier=tuple(reports.Point(**p) for p in pruned["frontier"]),
        history=tuple(reports.Epoch(e["epoch"], e["loss"], e["metrics"]) for e in history["epochs"]),
        latency=tuple(_read_latency(entry) for entry in latency["latency"]),
        stages=tuple(reports.Stage(name, **e.taken) for name, e in stages.items() if name != "report"),
        form=pruned["form"],
        reason=pruned["reason"],
        environment=environment(),
    )


def _read_latency(entry: dict[str, Any]) -> reports.Latency:
    return reports.Latency(**{**entry, **{k: reports.Spread(**entry[k]) for k in ("original", "compressed", "ratio")}})


def _metrics(report: reports.Report) -> dict[str, Any]:
    sizes = {"original": asdict(report.before), "compressed": asdict(report.after)}
    parts = {k: [asdict(x) for x in getattr(report, k)] for k in ("latency", "frontier", "stages")}
    return {"headline": reports.headline(report), "cost": sizes, "validation": report.metrics, "test": report.test, "form": report.form, **parts}


def environment() -> dict[str, str]:
    """Versions and hardware that bear on the figures."""
    packages = ("curvepress", "torch", "onnxruntime")
    hardware = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, **hardware}


STAGES: Mapping[str, Callable[[Desk, Settings], None]] = {
    "trace": _trace, "score": _score, "plan": _plan, "apply": _apply, "fit": _fit, "export": _export, "report": _report,
}  # fmt: skip

_SCORES = ("scores.safetensors", "scores.json")
WRITES: Mapping[str, tuple[str, ...]] = {
    "trace": ("original.safetensors", "structure.json"),
    "score": _SCORES,
    "plan": ("plan.json",),
    "apply": ("pruned.safetensors", "pruned.json"),
    "fit": ("model.safetensors", "history.json"),
    "export": ("original.onnx", "model.onnx", "latency.json"),
    "report": ("report.json", "metrics.json", "report.html"),
}
READS: Mapping[str, tuple[str, ...]] = {
    "trace": (),
    "score": WRITES["trace"],
    "plan": ("structure.json", *_SCORES),
    "apply": ("original.safetensors", "plan.json", *_SCORES),
    "fit": ("original.safetensors", "plan.json", "pruned.safetensors"),
    "export": ("original.safetensors", "plan.json", "model.safetensors"),
    "report": ("original.safetensors", "plan.json", *_SCORES, "pruned.json", *WRITES["fit"], "latency.json"),
}


@dataclass(frozen=True)
class Outcome:
    """A run after a stage, and whether the stage was done already."""

    run: Run
    entry: Entry
    kept: bool


def run_stage(
    run: Run, recipe: Recipe, stage: str, settings: Settings, *, progress: Progress = lambda *_: None, again: bool = False
) -> Outcome:
    """Do a stage, unless it is done: finished with these settings, from the inputs as they are now.

    Args:
        again: do it even where it was finished with other settings; without this they are refused.

    Raises:
        ValueError: if the settings differ from those it was finished with, an artifact is missing or damaged, or the stage fails.
    """
    settings = {**settings, "recipe": recipe.digest} if stage == "trace" else settings
    if is_done(run, stage, settings, READS[stage]) and not again:
        return Outcome(run, run.stages[stage], kept=True)
    if not again and (differences := changed_settings(run, stage, settings)):
        raise ValueError(f"{run.folder} holds a run whose stage {stage!r} was made otherwise ({'; '.join(differences)}); choose another folder, or add --again")
    with metered() as taken:
        STAGES[stage](Desk(run, recipe, progress), settings)
    run = finish(run, stage, settings, READS[stage], WRITES[stage], taken)
    return Outcome(run, run.stages[stage], kept=False)


def costs(run: Run) -> tuple[Cost, Cost]:
    """The cost of the whole model and of the plan in the folder."""
    plan = from_json((run.folder / "plan.json").read_text())
    return cost(Plan(plan.structure)), cost(plan)
