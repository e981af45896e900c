"""A run folder: what every stage was asked, what it read and wrote, so that a run goes on where it stopped.

``run.json`` is written after the artifacts of a stage are complete.  A stage whose entry is there, with the same settings and
the same inputs, is done; anything else is done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .artifacts import read_json
from .files import digest, write_text
from .metering import Taken
from .plan import dumps

RUN = {"format": "curvepress run", "version": 1}
MANIFEST = "run.json"


@dataclass(frozen=True)
class Entry:
    """One finished stage: its settings, fingerprints of what it read and wrote, and what it took."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    taken: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A folder, the recipe it belongs to, and its finished stages in order."""

    folder: Path
    recipe: str
    options: Mapping[str, str]
    stages: Mapping[str, Entry]


def create(folder: Path, recipe: str, options: Mapping[str, str]) -> Run:
    """The run of this recipe in this folder, new or continued.

    Raises:
        ValueError: if the folder holds a run of another recipe, or other files.
    """
    recipe = str(Path(recipe).resolve()) if recipe.endswith(".py") else recipe
    if (folder / MANIFEST).exists():
        run = open_run(folder)
        if (run.recipe, dict(run.options)) != (recipe, dict(options)):
            raise ValueError(f"{folder} holds a run of {run.recipe} with options {dict(run.options)}, not of {recipe} with {dict(options)}; choose another folder")
        return run
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    if folder.exists() and any(p for p in folder.iterdir() if not p.name.endswith(".tmp")):
        raise ValueError(f"{folder} is not empty and holds no run; choose a new or empty folder")
    run = Run(folder, recipe, dict(options), {})
    _write(run)
    return run


def open_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        ValueError: if there is none, or its ``run.json`` is damaged or foreign.
    """
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds no run: {MANIFEST} is missing; begin with `curvepress trace RECIPE --out {folder}` or `curvepress compress`")
    data = read_json(folder / MANIFEST, RUN)
    try:
        return Run(folder, data["recipe"], data["options"], {name: Entry(**entry) for name, entry in data["stages"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}); choose another folder") from None


def is_done(run: Run, stage: str, settings: Mapping[str, Any], reads: Sequence[str]) -> bool:
    """Whether a stage is finished with these settings and inputs as they are now.

    Raises:
        ValueError: if one of its artifacts was changed or is gone since.
    """
    entry = run.stages.get(stage)
    if entry is None or dict(entry.settings) != _plain(settings) or dict(entry.inputs) != fingerprints(run.folder, reads):
        return False
    for name, known in entry.outputs.items():
        if not (run.folder / name).exists():
            raise ValueError(f"{run.folder / name} is gone; make it again with `curvepress {stage}`")
        if digest(run.folder / name) != known:
            raise ValueError(
                f"{run.folder / name} was changed since the stage {stage!r} wrote it. To go on from the changed file run the stages "
                f"after {stage!r} one by one; to make it again run `curvepress {stage}`"
            )
    return True


def changed_settings(run: Run, stage: str, settings: Mapping[str, Any]) -> list[str]:
    """How the settings differ from those the stage was finished with; empty if it is not finished."""
    entry = run.stages.get(stage)
    if entry is None:
        return []
    wanted = _plain(settings)
    return [f"{k} was {entry.settings.get(k)!r}, now {v!r}" for k, v in wanted.items() if entry.settings.get(k) != v]


def finish(run: Run, stage: str, settings: Mapping[str, Any], reads: Sequence[str], writes: Sequence[str], taken: Taken) -> Run:
    """Record a finished stage; later stages that read what it wrote are forgotten."""
    entry = Entry(_plain(settings), fingerprints(run.folder, reads), fingerprints(run.folder, writes), asdict(taken))
    stale = {n for n, e in run.stages.items() if n != stage and set(e.inputs) & set(writes) and any(e.inputs.get(w) not in (None, entry.outputs[w]) for w in writes)}
    run = replace(run, stages={**{n: e for n, e in run.stages.items() if n not in stale and n != stage}, stage: entry})
    _write(run)
    return run


def fingerprints(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Fingerprints of files of the run.

    Raises:
        ValueError: if one is missing.
    """
    for name in names:
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing; run the stage that makes it first")
    return {name: digest(folder / name) for name in names}


def scratch(run: Run, stage: str, settings: Mapping[str, Any], reads: Sequence[str]) -> Path:
    """A folder for a stage's own checkpoints, named by its settings and inputs; those of other settings are removed."""
    key = hashlib.sha256(json.dumps([_plain(settings), fingerprints(run.folder, reads)], sort_keys=True).encode()).hexdigest()[:12]
    folder = run.folder / "checkpoints" / f"{stage}-{key}"
    for other in (run.folder / "checkpoints").glob(f"{stage}-*"):
        if other != folder:
            shutil.rmtree(other)
    return folder


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


def _write(run: Run) -> None:
    stages = {name: asdict(entry) for name, entry in run.stages.items()}
    write_text(run.folder / MANIFEST, dumps({**RUN, "recipe": run.recipe, "options": dict(run.options), "stages": stages}))
