"""The command line: files in, one call, files out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import report as reports
from .artifacts import load_structure
from .objective import batch_loss
from .pipeline import STAGES, Desk, Outcome, costs, read_report, run_stage
from .planner import PER
from .recipe import Recipe, load_recipe
from .runs import Run, create, open_run
from .scores import METHODS
from .structure import Structure

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Make a trained network smaller and faster, guided by the curvature of its loss.")
console, errors = Console(), Console(stderr=True)

RecipeName = Annotated[str, typer.Argument(help="a Python file with the five functions of a recipe, or a shipped one: digits, cifar10")]
Folder = Annotated[Path, typer.Argument(help="the folder of a run")]
Out = Annotated[Path, typer.Option(help="the folder of the run; made if missing, continued if interrupted")]
Options = Annotated[list[str] | None, typer.Option("--option", help="an option of the recipe, name=value; may be repeated")]
Data = Annotated[str | None, typer.Option(help="short for --option data=...: the data folder of the recipe")]
Seed = Annotated[int, typer.Option(min=0, help="of every random choice")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads that torch and the runtime use")]

Method = Annotated[str, typer.Option(help=f"the score: {', '.join(METHODS)}")]
Samples = Annotated[int, typer.Option(min=2, help="calibration batches the scores are averaged over")]
Probes = Annotated[int, typer.Option(min=1, help="random probes a batch (hessian_trace)")]

Params = Annotated[float | None, typer.Option(help="parameters at most: a share up to 1.0 of the original, or a number")]
Bytes = Annotated[float | None, typer.Option(help="bytes of the stored tensors at most, likewise")]
Macs = Annotated[float | None, typer.Option(help="multiply-accumulates at most, likewise")]
Per = Annotated[str, typer.Option(help=f"what a channel's score is divided by: {', '.join(PER)}")]
Multiple = Annotated[int, typer.Option(min=1, help="hold widths to multiples of this")]
Floor = Annotated[float, typer.Option(min=0, max=1, help="least share of a group's channels that stays")]

Epochs = Annotated[int | None, typer.Option(min=0, help="epochs of the fine-tune; without it the recipe's own, else 1")]
Lr = Annotated[float | None, typer.Option(help="learning rate; without it the recipe's own, else 0.01")]
Optimizer = Annotated[str | None, typer.Option(help="sgd or adamw")]
Schedule = Annotated[str | None, typer.Option(help="cosine, step or constant")]
Milestones = Annotated[list[int] | None, typer.Option(help="epochs after which the step schedule divides by ten")]
WeightDecay = Annotated[float | None, typer.Option(help="weight decay")]
Distill = Annotated[float | None, typer.Option(min=0, max=1, help="weight of learning from the original model's outputs; 0 for none")]
Precision = Annotated[str | None, typer.Option(help="full, or bfloat16 for mixed precision")]

FIT = {"epochs": 1, "lr": 0.01, "optimizer": "sgd", "schedule": "cosine", "milestones": [], "weight_decay": 1e-4, "distill": 0.0, "precision": "full"}
BATCHES = (1, 64)


@app.command()
def compress(
    recipe: RecipeName, out: Out, params: Params = None, bytes: Bytes = None, macs: Macs = None, *, option: Options = None, data: Data = None,
    method: Method = "hessian_trace", samples: Samples = 32, probes: Probes = 4, per: Per = "channel", multiple: Multiple = 1,
    floor: Floor = 0.05, epochs: Epochs = None, lr: Lr = None, optimizer: Optimizer = None, schedule: Schedule = None,
    milestones: Milestones = None, weight_decay: WeightDecay = None, distill: Distill = None, precision: Precision = None,
    seed: Seed = 0, threads: Threads = 1, again: Annotated[bool, typer.Option(help="redo stages that were finished with other settings")] = False,
) -> None:  # fmt: skip
    """The main job: trace, score, plan, apply, fit, export and report.  Interrupted, the same command goes on."""
    torch.set_num_threads(threads)
    budget = _budget(params, bytes, macs)
    task = load_recipe(recipe, _options(option, data))
    tuning = _tuning(task, seed, epochs=epochs, lr=lr, optimizer=optimizer, schedule=schedule, milestones=milestones,
                     weight_decay=weight_decay, distill=distill, precision=precision)  # fmt: skip
    run = create(out, recipe, task.options)
    settings: dict[str, dict[str, Any]] = {
        "trace": {},
        "score": {"method": method, "samples": samples, "probes": probes, "seed": seed},
        "plan": {**budget, "per": per, "multiple": multiple, "floor": floor},
        "apply": {"seed": seed},
        "fit": tuning,
        "export": {"threads": threads, "batches": list(BATCHES)},
        "report": {},
    }
    for stage in STAGES:
        if stage == "score" and "report" not in run.stages:
            _estimate(Desk(run, task, lambda *_: None), settings)
        run = _stage(run, task, stage, settings[stage], again=again).run
    _conclude(run)


@app.command()
def trace(recipe: RecipeName, out: Out, option: Options = None, data: Data = None) -> None:
    """Find which dimensions of the model must change together."""
    task = load_recipe(recipe, _options(option, data))
    run = _stage(create(out, recipe, task.options), task, "trace", {}, again=True).run
    console.print(_groups(load_structure(run.folder / "structure.json")))


@app.command()
def score(folder: Folder, method: Method = "hessian_trace", samples: Samples = 32, probes: Probes = 4, seed: Seed = 0, threads: Threads = 1) -> None:
    """Predict what removing each channel costs."""
    _single(folder, "score", {"method": method, "samples": samples, "probes": probes, "seed": seed}, threads)


@app.command()
def plan(folder: Folder, params: Params = None, bytes: Bytes = None, macs: Macs = None, per: Per = "channel", multiple: Multiple = 1, floor: Floor = 0.05) -> None:
    """Decide which channels stay; the result, plan.json, may be read and edited."""
    run = _single(folder, "plan", {**_budget(params, bytes, macs), "per": per, "multiple": multiple, "floor": floor})
    console.print(_sizes(run))


@app.command()
def apply(folder: Folder, seed: Seed = 0, threads: Threads = 1) -> None:
    """Make the plan so, verify it against the masked original, and re-estimate batch-normalisation statistics."""
    _single(folder, "apply", {"seed": seed}, threads)


@app.command()
def fit(
    folder: Folder, epochs: Epochs = None, lr: Lr = None, optimizer: Optimizer = None, schedule: Schedule = None,
    milestones: Milestones = None, weight_decay: WeightDecay = None, distill: Distill = None, precision: Precision = None,
    seed: Seed = 0, threads: Threads = 1,
) -> None:  # fmt: skip
    """Fine-tune what is left; interrupted, the same command goes on from the last epoch."""
    run = open_run(folder)
    task = load_recipe(run.recipe, run.options)
    settings = _tuning(task, seed, epochs=epochs, lr=lr, optimizer=optimizer, schedule=schedule, milestones=milestones,
                       weight_decay=weight_decay, distill=distill, precision=precision)  # fmt: skip
    _single(folder, "fit", settings, threads)


@app.command()
def export(folder: Folder, threads: Threads = 1) -> None:
    """Write ONNX files, compare them with the PyTorch models, and time them in ONNX Runtime."""
    _single(folder, "export", {"threads": threads, "batches": list(BATCHES)}, threads)


@app.command()
def report(folder: Folder) -> None:
    """Write the report: metrics.json and report.html."""
    _conclude(_single(folder, "report", {}))


def main() -> None:
    """Run the command line; what goes wrong is said in one message, with exit status 1."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError) as error:
        errors.print(f"[bold red]curvepress:[/] {_escaped(_said(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("curvepress: interrupted; the same command goes on from here")
        sys.exit(130)


def _said(error: Exception) -> str:
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write or read{where}: {error.strerror or error}; nothing half-written is left, free the disk or choose another folder and run the same command"
    return str(error)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _options(given: list[str] | None, data: str | None) -> dict[str, str]:
    pairs = [*(given or []), *([f"data={data}"] if data else [])]
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--option must be name=value, such as depth=56; got {pair!r}")
    return dict(pair.split("=", 1) for pair in pairs)


def _budget(params: float | None, bytes: float | None, macs: float | None) -> dict[str, float | None]:
    limits = {"params": params, "bytes": bytes, "macs": macs}
    if all(v is None for v in limits.values()):
        raise ValueError("no budget is given; say how small, such as --params 0.5, --macs 0.4 or --bytes 100000")
    for name, limit in limits.items():
        if limit is not None and not limit > 0:
            raise ValueError(f"--{name} must be positive: a share such as 0.5, or an absolute number; got {limit}")
    return limits


def _tuning(task: Recipe, seed: int, **given: Any) -> dict[str, Any]:
    unknown = set(task.recovery) - set(FIT)
    if unknown:
        raise ValueError(f"recipe {task.name!r}: RECOVERY has unknown settings {sorted(unknown)}; allowed are {', '.join(FIT)}")
    chosen = {**FIT, **task.recovery, **{k: v for k, v in given.items() if v is not None}}
    return {**chosen, "milestones": list(chosen["milestones"]), "seed": seed}


def _single(folder: Path, stage: str, settings: Mapping[str, Any], threads: int = 1) -> Run:
    torch.set_num_threads(threads)
    run = open_run(folder)
    return _stage(run, load_recipe(run.recipe, run.options), stage, settings, again=True).run


def _stage(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any], *, again: bool) -> Outcome:
    with _bars(stage) as progress:
        outcome = run_stage(run, task, stage, settings, progress=progress, again=again)
    taken = outcome.entry.taken
    how = "done before" if outcome.kept else f"{taken['wall']:.1f} s, peak {taken['peak']:.0f} MiB"
    console.print(f"[bold]{stage:8}[/] {how:24} {', '.join(outcome.entry.outputs)}", highlight=False)
    return outcome


@contextmanager
def _bars(stage: str) -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bars:
        tasks = {"": bars.add_task(stage, total=None)}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"{stage}: {what}", total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _estimate(desk: Desk, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how long scores and recovery will take, from the time of one training step."""
    model, recipe = desk.original(), desk.recipe
    steps = [_step_seconds(model, recipe, batch) for batch in islice(recipe.batches("calibration"), 2)]
    work = settings["score"]
    per_sample = {"hessian_trace": 2 + 2.5 * work["probes"], "taylor": 1}.get(work["method"], 0)
    scores, batches = per_sample * work["samples"] * steps[-1], recipe.batches("train")
    epochs = settings["fit"]["epochs"]
    recovery = f"{_clock(epochs * len(batches) * steps[-1])} for recovery" if hasattr(batches, "__len__") else "recovery unknown"
    console.print(f"estimate  {_clock(scores)} for scores, at most {recovery}, on {torch.get_num_threads()} thread(s)", highlight=False)


def _step_seconds(model: torch.nn.Module, recipe: Recipe, batch: Any) -> float:
    start = time.perf_counter()
    torch.autograd.grad(batch_loss(model, recipe.loss, batch), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return time.perf_counter() - start


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _groups(structure: Structure) -> Table:
    table = Table("group", "kind", "channels", "tensors", "may be cut")
    for g in structure.groups:
        table.add_row(g.name, g.kind, str(g.size), str(len(g.members)), f"no: {g.frozen}" if g.frozen else "yes" if g.size > 1 else "no: one channel")
    return table


def _sizes(run: Run) -> Table:
    before, after = costs(run)
    table = Table("", "original", "plan", "ratio")
    for name, old in vars(before).items():
        new = getattr(after, name)
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new / old:.3f}")
    return table


def _conclude(run: Run) -> None:
    made = (run.folder / "report.html").resolve()
    console.print(reports.text(read_report(run)), highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {made}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
