"""What commands do before and around stages: find the recipe and the folder, be alone there, do a stage and say so."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..files import alone_in
from ..metering import clock
from ..objective import batch_loss
from ..runs.artifacts import read_json
from ..runs.desk import Desk
from ..runs.folder import QUANTIZATION, Run, create, open_run, require, sweep
from ..runs.recipe import Recipe, load_recipe
from .pipeline import Stage, keep_stage, left_over, run_stage
from .planning import given_bits
from .quantizing import CHOSEN, PRICED, QUANTIZED, source_files
from .terminal import bars, say, show_quantized, tell

BATCHES = (1, 64)
"""Batch sizes at which files are timed."""


@contextmanager
def with_scores(source: str, out: Path | None, given: dict[str, str], scoring: Mapping[str, Any]) -> Iterator[tuple[Run, Recipe]]:
    """The run of a folder, which must have scores, or a new one of a recipe, which gets them."""
    if Path(source).is_dir():
        with continued(Path(source)) as (run, task):
            require(run, "plan")
            yield run, task
        return
    if out is None:
        raise ValueError(f"say where the result goes: curvepress frontier {source} --out FOLDER")
    task = load_recipe(source, given)
    scores = {"method": "mask_curvature", "reliability": None, "seconds": None, "estimator": "auto", "precision": "full", "probes": 4,
              "temperature": 1.0, **scoring}  # fmt: skip
    with started(out, task) as run:
        run = kept(run, task, "trace", {"threads": scoring["threads"]}, again=False)
        yield kept(run, task, "score", scores, again=False), task


def pairs_of(given: list[str] | None, data: str | None) -> dict[str, str]:
    """The options of a recipe; a data folder that exists is named in full, so that a run goes on from anywhere."""
    pairs = [*(given or []), *([f"data={data}"] if data else [])]
    for pair in pairs:
        if not pair.partition("=")[0].isidentifier() or "=" not in pair:
            raise ValueError(f"--option must be name=value, such as depth=56; got {pair!r}")
    options = dict(pair.split("=", 1) for pair in pairs)
    if len(options) < len(pairs):
        raise ValueError(f"an option of the recipe is given twice: {', '.join(pairs)}; give each once")
    folder = Path(options.get("data", "")).expanduser()
    return {**options, "data": str(folder.resolve())} if "data" in options and folder.exists() else options


def source_of(source: str, out: Path | None, given: dict[str, str]) -> tuple[Recipe, dict[str, str], Path]:
    """The recipe of what is to be quantized, fingerprints of its files where it is a run, and the folder for the result."""
    if not Path(source).is_dir():
        if out is None:
            raise ValueError(f"say where the result goes: curvepress quantize {source} --out FOLDER")
        return load_recipe(source, given), {}, out
    run = open_run(Path(source))
    if given:
        raise ValueError(f"{source} is the folder of a run, which has its recipe's options already; leave out --option and --data")
    task = load_recipe(run.recipe, run.options)
    return task, dict(source_files(Path(source))), out or Path(source) / "quantized"


@contextmanager
def started(folder: Path, task: Recipe) -> Iterator[Run]:
    """The run of a recipe in a folder, which is made if missing, alone there."""
    if not folder.exists():
        folder.mkdir(parents=True)
    with alone_in(folder):
        run = create(folder, task.name, task.options)
        sweep(folder)
        yield run


@contextmanager
def continued(folder: Path) -> Iterator[tuple[Run, Recipe]]:
    """The run in a folder and its recipe, alone there."""
    open_run(folder)
    with alone_in(folder):
        run = open_run(folder)
        sweep(folder)
        yield run, load_recipe(run.recipe, run.options)


def done(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any]) -> Run:
    """The run after a stage that was asked for by its name: it is done, also if it was before.

    Raises:
        ValueError: if it begins at an earlier round, which its command knows nothing of.
    """
    if "before" in (run.stages[stage].settings if stage in run.stages else {}):
        raise ValueError(
            f"{run.folder} is one of several rounds, in which `{stage}` begins at the round before; do it with "
            "`curvepress compress --rounds`, and --again where settings are others"
        )
    torch.set_num_threads(settings.get("threads", 1))
    with bars(stage) as show:
        outcome = run_stage(Desk(run, task, show, partial(noted, stage)), stage, settings)
    tell(stage, outcome)
    return outcome.run


def kept(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any], *, again: bool, work: Stage | None = None) -> Run:
    """The run after a stage, which is done unless it was before; ``work`` is as in :func:`~.pipeline.run_stage`."""
    with bars(stage) as show:
        outcome = keep_stage(Desk(run, task, show, partial(noted, stage)), stage, settings, again=again, work=work)
    tell(stage, outcome)
    return outcome.run


def noted(stage: str, what: str) -> None:
    """Say what a stage has to say, if anything."""
    if what:
        say(f"{stage:8} {what}")


def estimate(run: Run, task: Recipe, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how long the recovery will take if it is still to be done, from the time of one training step."""
    if "fit" in run.stages:
        return
    model = Desk(run, task).original()
    seconds = [_step_seconds(model, task, batch) for batch in islice(task.batches("calibration"), 2)][-1]
    epochs, batches = settings["fit"]["epochs"], task.batches("train")
    passes = epochs * (1.35 if settings["fit"]["distill"] else 1)  # the teacher looks at every batch too
    recovery = clock(passes * len(batches) * seconds) if isinstance(batches, Sized) else "unknown"
    say(f"estimate {recovery} for the training steps of the recovery, on {torch.get_num_threads()} thread(s)")


def _step_seconds(model: torch.nn.Module, task: Recipe, batch: Any) -> float:
    start = time.perf_counter()
    torch.autograd.grad(batch_loss(model, task.loss, batch), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return time.perf_counter() - start


def quantized_as_planned(
    run: Run, task: Recipe, training: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], *, again: bool
) -> None:
    """The compressed model with as many bits as its plan has, spread anew by prices of what has recovered, by the stages of `quantize`,
    in the same folder."""
    common = {k: settings["fit"][k] for k in ("seed", "threads")}
    asked = settings["plan"]
    spread = {"left": {"bytes": 0, **left_over(Desk(run, task), asked, ("bytes", "bops"))}, "weights": asked["bits"],
              "activations": asked["activation_bits"]}  # fmt: skip
    stages: dict[str, dict[str, Any]] = {
        "load": {"source": str(run.folder.resolve()), "files": dict(source_files(run.folder)), "threads": common["threads"]},
        "price": {**PRICED, "examples": settings["weigh"]["examples"], **common},
        "choose": {**CHOSEN, "given": given_bits(Desk(run, task).plan()), "spread": spread},
        "quantize": {**training, "rounding": "adaptive", "ranges": "mse", "calibration": 512},
        "deploy": {"batches": list(BATCHES), "exports": ["onnx"], **common},
    }  # fmt: skip
    for stage in QUANTIZATION:
        run = kept(run, task, stage, stages[stage], again=again)
    show_quantized(read_json(run.folder / "quantized.json", QUANTIZED), run.folder)
