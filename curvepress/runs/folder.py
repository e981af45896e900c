"""A run folder: what every stage was asked, what it read and wrote, so that a run goes on where it stopped.

``run.json`` is written after the artifacts of a stage are complete.  A stage whose entry is there, with the same settings and
the same inputs, is done; anything else is done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..files import digest, halves, write_text
from ..metering import Taken
from ..plan import dumps
from .artifacts import read_json

RUN = {"format": "curvepress run", "version": 1}
MANIFEST, PLAN, SCRATCH = "run.json", "plan.json", "checkpoints"
RECIPE = "recipe"
"""The setting that holds the fingerprint of the recipe's code."""


@dataclass(frozen=True)
class Flow:
    """The files of the run folder that a stage reads and writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Files that it reads where they are there."""
    extra: tuple[str, ...] = ()
    """Files that it writes where it is told to."""


_ORIGINAL, _SCORES = "original.safetensors", ("scores.safetensors", "scores.json")
FLOWS: Mapping[str, Flow] = {
    "trace": Flow((), (_ORIGINAL, "original.json", "structure.json")),
    "score": Flow((_ORIGINAL, "structure.json"), _SCORES),
    "plan": Flow((_ORIGINAL, "structure.json", *_SCORES), (PLAN,), optional=("bit_prices.json", "rank_prices.json")),
    "apply": Flow(
        (_ORIGINAL, "original.json", "structure.json", PLAN, *_SCORES),
        ("pruned.safetensors", "pruned.json"),
        optional=("rank_prices.json",),
    ),
    "repair": Flow((_ORIGINAL, "structure.json", PLAN, "pruned.safetensors"), ("repaired.safetensors", "repaired.json")),
    "fit": Flow((_ORIGINAL, "structure.json", PLAN, "repaired.safetensors"), ("model.safetensors", "history.json")),
    "export": Flow((_ORIGINAL, "structure.json", PLAN, "model.safetensors"), ("original.onnx", "model.onnx", "latency.json")),
    "report": Flow(
        (_ORIGINAL, "structure.json", PLAN, *_SCORES, "pruned.json", "repaired.json", "model.safetensors", "history.json", "latency.json"),
        ("report.json", "metrics.json", "report.html"),
    ),
}
"""The stages of the main job in their order."""
WEIGHING: Mapping[str, Flow] = {
    "weigh": Flow((_ORIGINAL, "structure.json"), ("bit_prices.json",)),
    "truncate": Flow((_ORIGINAL, "structure.json"), ("rank_prices.json",)),
}
"""The stages that price bits and ranks of the original model, where a plan is to have some."""
_FLOAT = ("float.safetensors", "float.json")
QUANTIZATION: Mapping[str, Flow] = {
    "load": Flow((), _FLOAT),
    "price": Flow(_FLOAT, ("prices.json",)),
    "choose": Flow(("prices.json",), ("bits.json",)),
    "quantize": Flow((*_FLOAT, "bits.json"), ("quantized.safetensors", "quantization.json")),
    "deploy": Flow(
        (*_FLOAT, "prices.json", "bits.json", "quantized.safetensors", "quantization.json"),
        ("float.onnx", "quantized.onnx", "quantized.json"),
        extra=("quantized.pt2",),
    ),
}
"""The stages of quantization, likewise."""
_FIGURES = ("original.json", "metrics.json", "pruned.json", "repaired.json", "history.json", "scores.json", "bits.json", "quantized.json")
REPRODUCTION: Mapping[str, Flow] = {"reproduce": Flow((), ("reproduction.json",), optional=(PLAN, *_FIGURES, "quantized.onnx"))}
"""The stage that sets side by side what a published system made of a model."""
_FLOWS = {**FLOWS, **WEIGHING, **QUANTIZATION, **REPRODUCTION}
_MAKER = {name: stage for stage, flow in _FLOWS.items() for name in (*flow.writes, *flow.extra)}


@dataclass(frozen=True)
class Entry:
    """One finished stage: its settings, fingerprints of what it read and wrote, and what it took."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    taken: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A folder, the recipe it belongs to (a shipped name or a full path), and its finished stages in order."""

    folder: Path
    recipe: str
    options: Mapping[str, str]
    stages: Mapping[str, Entry]


def create(folder: Path, recipe: str, options: Mapping[str, str]) -> Run:
    """The run of this recipe in this folder, new or continued.  A recipe that is gone from its old place has moved here.

    Raises:
        ValueError: if the folder holds a run of another recipe, or other files.
    """
    new = Run(folder, recipe, dict(options), {})
    if (folder / MANIFEST).exists():
        run = open_run(folder)
        other = run.recipe != recipe and (not run.recipe.endswith(".py") or Path(run.recipe).exists())
        if run.stages and (other or dict(run.options) != dict(options)):
            held, asked = (f"{r} with {_listed(o)}" for r, o in ((run.recipe, run.options), (recipe, options)))
            raise ValueError(f"{folder} holds a run of {held}, not of {asked}; choose another folder")
        new = replace(new, stages=run.stages)
        if new == run:
            return run
    else:
        _check_empty(folder)
    _write(new)
    return new


def _listed(options: Mapping[str, str]) -> str:
    return ", ".join(f"{k}={v}" for k, v in options.items()) or "no options"


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if found := [p.name for p in set(folder.glob("*")) - set(halves(folder / MANIFEST))]:
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(found)[:3])}) and no run; choose a new or empty folder")


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: if there is none, or its ``run.json`` is damaged or foreign, or it names a recipe inside the folder.
    """
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds no run: {MANIFEST} is missing; begin with `curvepress compress` or `curvepress trace`")
    data = read_json(folder / MANIFEST, RUN)
    try:
        stages = {name: _entry(entry) for name, entry in data["stages"].items() if name in _FLOWS}
        run = Run(folder, _text(data["recipe"]), {k: _text(v) for k, v in data["options"].items()}, stages)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}); choose another folder") from None
    if run.recipe.endswith(".py") and (not Path(run.recipe).is_absolute() or Path(run.recipe).is_relative_to(folder.resolve())):
        raise ValueError(f"{folder / MANIFEST} names the recipe {run.recipe}; code that came with a run is not run, keep it elsewhere")
    return run


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written of a run's files."""
    for name in (MANIFEST, *_MAKER):
        for half in halves(folder / name):
            half.unlink()


def _entry(data: Mapping[str, Any]) -> Entry:
    inputs, outputs = ({k: _text(v) for k, v in data[part].items()} for part in ("inputs", "outputs"))
    taken = asdict(Taken(**{f.name: float(data["taken"][f.name]) for f in fields(Taken)}))
    return Entry(dict(data["settings"].items()), inputs, outputs, taken)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def is_done(run: Run, stage: str, settings: Mapping[str, Any]) -> bool:
    """Whether a stage is finished with these settings, from its inputs as they are now, and all it wrote is still there as it was."""
    entry = run.stages.get(stage)
    if entry is None or dict(entry.settings) != _plain(settings):
        return False
    return all(_digest(run, name) == known for name, known in {**entry.inputs, **entry.outputs}.items())


def objections(run: Run, stage: str, settings: Mapping[str, Any]) -> list[str]:
    """Why a stage may not simply be done again: settings that differ from those it was finished with, files changed by hand."""
    entry = run.stages.get(stage)
    if entry is None:
        return []
    wanted = _plain(settings)
    keys = [k for k in {**entry.settings, **wanted} if entry.settings.get(k) != wanted.get(k)]
    found = [f"{k} was {entry.settings.get(k)!r}, now {wanted.get(k)!r}" if k != RECIPE else "the recipe's code has changed" for k in keys]
    changed = [name for name, known in entry.outputs.items() if _digest(run, name) not in (known, "")]
    return found + [f"{name} is not as the stage wrote it" for name in changed]


def require(run: Run, stage: str) -> None:
    """Check that all a stage reads is there, as it was written, and up to date.  A plan may be edited, or come from elsewhere.

    Raises:
        ValueError: if not; the message has the command that mends it.
    """
    _require(run, stage, cache(partial(_digest, run)))


def _require(run: Run, stage: str, now: Callable[[str], str]) -> None:
    for name in _FLOWS[stage].reads:
        maker = _MAKER[name]
        entry, path = run.stages.get(maker), run.folder / name
        if name == PLAN and now(name) and (entry is None or now(name) != entry.outputs.get(name)):
            continue
        _require(run, maker, now)  # the first cause first
        if fault := _fault(entry, name, now):
            raise ValueError(f"{path} {fault}; run {command(run, maker)} to make it")


def _fault(entry: Entry | None, name: str, now: Callable[[str], str]) -> str:
    """What is wrong with a file, made by the stage of ``entry``; empty if nothing."""
    if not now(name):
        return "is missing"
    if entry is None:
        return "was not written by this run"
    if now(name) != entry.outputs.get(name):
        return "is not as it was written: it is damaged or was exchanged"
    stale = next((read for read, known in entry.inputs.items() if now(read) != known), "")
    return f"is out of date: {stale} has changed since" if stale else ""


def command(run: Run, stage: str) -> str:
    """What to type to do a stage again."""
    if stage == "trace":
        return f"`curvepress trace {run.recipe} --out {run.folder}`"
    if stage in WEIGHING:
        return f"`curvepress frontier {run.folder}{' --implants' if stage == 'truncate' else ''}`"
    if stage in REPRODUCTION:
        return "`curvepress reproduce` as before"
    if stage in QUANTIZATION:
        return f"`curvepress quantize` with --out {run.folder} and --again"
    return f"`curvepress {stage} {run.folder}`"


def finish(run: Run, stage: str, settings: Mapping[str, Any], taken: Taken) -> Run:
    """Record a finished stage; its checkpoints are no longer needed."""
    flow = _FLOWS[stage]
    read = (*flow.reads, *(name for name in flow.optional if (run.folder / name).is_file()))
    written = (*flow.writes, *(name for name in flow.extra if (run.folder / name).exists()))
    inputs, outputs = ({name: digest(run.folder / name) for name in names} for names in (read, written))
    stages = {**run.stages, stage: Entry(_plain(settings), inputs, outputs, asdict(taken))}
    run = replace(run, stages={name: stages[name] for name in _FLOWS if name in stages})
    _write(run)
    for folder in (run.folder / SCRATCH).glob(f"{stage}-*"):
        shutil.rmtree(folder)
    with suppress(OSError):  # others' are still there, or it never was
        (run.folder / SCRATCH).rmdir()
    return run


def scratch(run: Run, stage: str, settings: Mapping[str, Any]) -> Path:
    """A folder for a stage's own checkpoints, named by its settings and inputs: others never go on from them."""
    inputs = {name: _digest(run, name) for name in _FLOWS[stage].reads}
    key = hashlib.sha256(json.dumps([_plain(settings), inputs], sort_keys=True).encode()).hexdigest()[:12]
    return run.folder / SCRATCH / f"{stage}-{key}"


def _digest(run: Run, name: str) -> str:
    """The fingerprint of a file of the run, empty if there is none."""
    path = run.folder / name
    return digest(path) if path.is_file() else ""


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


def _write(run: Run) -> None:
    stages = {name: asdict(entry) for name, entry in run.stages.items()}
    write_text(run.folder / MANIFEST, dumps({**RUN, "recipe": run.recipe, "options": dict(run.options), "stages": stages}))
