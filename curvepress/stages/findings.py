"""The report of a run, gathered from its artifacts."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import report as reports
from ..costs import cost
from ..plan import Plan
from ..runs.artifacts import load_scores, read_json
from ..runs.desk import Desk
from ..runs.folder import Entry, Run

PRUNED = {"format": "curvepress pruned", "version": 1}
REPAIRED = {"format": "curvepress repaired", "version": 1}
HISTORY = {"format": "curvepress history", "version": 1}
LATENCY = {"format": "curvepress latency", "version": 1}


def gathered(desk: Desk) -> reports.Report:
    """The report of a run; the test split is looked at here, and only here."""
    recipe, plan, run = desk.recipe, desk.plan(), desk.run
    pruned, history = read_json(desk.path("pruned.json"), PRUNED), read_json(desk.path("history.json"), HISTORY)
    latency, repaired = read_json(desk.path("latency.json"), LATENCY), read_json(desk.path("repaired.json"), REPAIRED)
    test = {
        "original": recipe.metrics(desk.original(), "test"),
        "recovered": recipe.metrics(desk.compressed("model.safetensors"), "test"),
    }
    return reports.Report(
        title=" ".join([Path(recipe.name).stem, *(f"{k}={v}" for k, v in recipe.options.items() if k != "data")]),
        plan=plan,
        scores=load_scores(run.folder),
        before=cost(Plan(plan.structure)),
        after=cost(replace(plan, bits=None)),
        metrics={**pruned["validation"], **repaired["validation"], "recovered": history["validation"]},
        test=test,
        frontier=tuple(reports.Point(**p) for p in pruned["frontier"]),
        history=tuple(reports.Epoch(e["epoch"], e["loss"], e["metrics"]) for e in history["epochs"]),
        latency=tuple(_latency(entry) for entry in latency["latency"]),
        stages=tuple(reports.Stage(name, **e.taken) for name, e in run.stages.items() if name != "report"),
        form=pruned["form"],
        reason=pruned["reason"],
        environment=environment(run.stages),
        implants=tuple(reports.Replacement(**i) for i in pruned.get("implants", [])),
    )


def _latency(entry: dict[str, Any]) -> reports.Latency:
    return reports.Latency(**{**entry, **{k: reports.Spread(**entry[k]) for k in ("original", "compressed", "ratio")}})


def figures(report: reports.Report) -> dict[str, Any]:
    """The figures of a report as JSON-ready data, for programs to read."""
    parts = {k: [asdict(x) for x in getattr(report, k)] for k in ("latency", "frontier", "implants", "stages")}
    return {
        "headline": reports.headline(report),
        "cost": {"original": asdict(report.before), "compressed": asdict(report.after)},
        "validation": report.metrics,
        "test": report.test,
        "form": report.form,
        **parts,
    }


def environment(stages: Mapping[str, Entry]) -> dict[str, str]:
    """Versions and hardware that bear on the figures, and the threads the stages ran on."""
    packages = {p: version(p) for p in ("curvepress", "torch", "onnxruntime")}
    threads = dict.fromkeys(str(e.settings["threads"]) for e in stages.values() if "threads" in e.settings)
    hardware = {"processor": platform.processor() or platform.machine(), "cores": str(os.cpu_count()), "threads": ", ".join(threads)}
    return {"python": platform.python_version(), **packages, **hardware}


def read_report(run: Run) -> reports.Report:
    """The report of a finished run."""
    return reports.from_dict(read_json(run.folder / "report.json", {}))
