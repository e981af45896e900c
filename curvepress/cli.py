"""The command line: files in, one call, files out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .artifacts import load_structure
from .desk import Desk
from .files import alone_in
from .findings import read_report
from .objective import batch_loss
from .pipeline import STAGES, check_budget, costs, keep_stage, run_stage
from .planner import PER
from .recipe import Recipe, load_recipe
from .runs import Run, create, open_run
from .scores import METHODS
from .settings import limits, tuning
from .terminal import bars, clock, explained, say, show_costs, show_groups, show_report, tell
from .training import OPTIMIZERS, PRECISIONS, SCHEDULES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network smaller and faster, guided by the curvature of its loss.",
)
SCORE, BUDGET, RECOVERY = "Scores", "Budget (one or more)", "Recovery (without them the recipe's own settings)"


def _listed(values: Iterable[str]) -> str:
    return ", ".join(values)


def _one_of(allowed: Iterable[str]) -> Callable[[str | None], str | None]:
    def checked(value: str | None) -> str | None:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r} is not one of {_listed(allowed)}")
        return value

    return checked


RecipeName = Annotated[str, typer.Argument(help="a Python file with the five functions of a recipe, or a shipped one: digits, cifar10")]
Folder = Annotated[Path, typer.Argument(help="the folder of a run")]
Out = Annotated[Path, typer.Option(help="the folder of the run; made if missing, continued if interrupted")]
Options = Annotated[list[str] | None, typer.Option("--option", help="an option of the recipe, name=value; may be repeated")]
Data = Annotated[str | None, typer.Option(help="the data folder of the recipe: short for --option data=...")]
Seed = Annotated[int, typer.Option(min=0, help="of every random choice")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads that torch and the runtime use")]
Again = Annotated[bool, typer.Option("--again", help="do stages again that were done with other settings, or whose files were changed")]

Method = Annotated[str, typer.Option(help=f"the score: {_listed(METHODS)}", callback=_one_of(METHODS), rich_help_panel=SCORE)]
Samples = Annotated[int, typer.Option(min=2, help="calibration batches the scores are averaged over", rich_help_panel=SCORE)]
Probes = Annotated[int, typer.Option(min=1, help="random probes a batch (hessian_trace)", rich_help_panel=SCORE)]

Params = Annotated[
    str | None,
    typer.Option(metavar="LIMIT", help="parameters at most: a share (0.5 or 50%) of the original, or a number", rich_help_panel=BUDGET),
]
Bytes = Annotated[str | None, typer.Option(metavar="LIMIT", help="bytes of the stored tensors at most, likewise", rich_help_panel=BUDGET)]
Macs = Annotated[str | None, typer.Option(metavar="LIMIT", help="multiply-accumulates at most, likewise", rich_help_panel=BUDGET)]
Per = Annotated[
    str, typer.Option(help=f"what a channel's score is divided by: {_listed(PER)}", callback=_one_of(PER), rich_help_panel=BUDGET)
]
Multiple = Annotated[int, typer.Option(min=1, help="hold widths to multiples of this", rich_help_panel=BUDGET)]
Floor = Annotated[float, typer.Option(min=0, max=1, help="least share of a group's channels that stays", rich_help_panel=BUDGET)]

Epochs = Annotated[int | None, typer.Option(min=0, help="epochs of the fine-tune, else 1", rich_help_panel=RECOVERY)]
Lr = Annotated[float | None, typer.Option(help="learning rate, else 0.01", rich_help_panel=RECOVERY)]
Optimizer = Annotated[
    str | None, typer.Option(help=f"{_listed(OPTIMIZERS)}; else sgd", callback=_one_of(OPTIMIZERS), rich_help_panel=RECOVERY)
]
Schedule = Annotated[
    str | None, typer.Option(help=f"{_listed(SCHEDULES)}; else cosine", callback=_one_of(SCHEDULES), rich_help_panel=RECOVERY)
]
Milestones = Annotated[
    list[int] | None, typer.Option(help="epoch after which the step schedule divides by ten; may be repeated", rich_help_panel=RECOVERY)
]
WeightDecay = Annotated[float | None, typer.Option(help="weight decay, else 0.0001", rich_help_panel=RECOVERY)]
Distill = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="weight of learning from the original model's outputs, else 0", rich_help_panel=RECOVERY),
]
Precision = Annotated[
    str | None,
    typer.Option(help="full, or bfloat16 for mixed precision; else full", callback=_one_of(PRECISIONS), rich_help_panel=RECOVERY),
]

BATCHES = (1, 64)


@app.callback(invoke_without_command=True)
def _options(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False) -> None:
    if show:
        say(f"curvepress {version('curvepress')}")
        raise typer.Exit


@app.command()
@explained()
def compress(
    recipe: RecipeName, out: Out, params: Params = None, bytes: Bytes = None, macs: Macs = None, *,
    option: Options = None, data: Data = None, method: Method = "hessian_trace", samples: Samples = 32, probes: Probes = 4,
    per: Per = "channel", multiple: Multiple = 1, floor: Floor = 0.05, epochs: Epochs = None, lr: Lr = None,
    optimizer: Optimizer = None, schedule: Schedule = None, milestones: Milestones = None, weight_decay: WeightDecay = None,
    distill: Distill = None, precision: Precision = None, seed: Seed = 0, threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """The main job: trace, score, plan, apply, fit, export and report.  Interrupted, the same command goes on."""
    budget = limits(params, bytes, macs)
    task = load_recipe(recipe, _pairs(option, data))
    recovery = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "schedule": schedule, "milestones": milestones,
                "weight_decay": weight_decay, "distill": distill, "precision": precision}  # fmt: skip
    common = {"seed": seed, "threads": threads}
    settings: dict[str, dict[str, Any]] = {
        "trace": {"threads": threads},
        "score": {"method": method, "samples": samples, "probes": probes, **common},
        "plan": {**budget, "per": per, "multiple": multiple, "floor": floor},
        "apply": common,
        "fit": {**tuning(task, recovery), **common},
        "export": {"threads": threads, "batches": list(BATCHES)},
        "report": {},
    }
    torch.set_num_threads(threads)
    with _started(out, task) as run:
        for stage in STAGES:
            if stage == "score":
                check_budget(run, settings["plan"])
                _estimate(run, task, settings)
            run = _kept(run, task, stage, settings[stage], again=again)
        show_report(read_report(run), out / "report.html")


@app.command()
@explained()
def trace(recipe: RecipeName, out: Out, option: Options = None, data: Data = None, threads: Threads = 1) -> None:
    """Find which dimensions of the model must change together."""
    torch.set_num_threads(threads)
    task = load_recipe(recipe, _pairs(option, data))
    with _started(out, task) as run:
        _done(run, task, "trace", {"threads": threads})
        show_groups(load_structure(out / "structure.json"))


@app.command()
@explained()
def score(
    folder: Folder, method: Method = "hessian_trace", samples: Samples = 32, probes: Probes = 4, seed: Seed = 0, threads: Threads = 1,
) -> None:  # fmt: skip
    """Predict what removing each channel costs."""
    settings = {"method": method, "samples": samples, "probes": probes, "seed": seed, "threads": threads}
    with _continued(folder) as (run, task):
        _done(run, task, "score", settings)


@app.command()
@explained()
def plan(
    folder: Folder, params: Params = None, bytes: Bytes = None, macs: Macs = None,
    per: Per = "channel", multiple: Multiple = 1, floor: Floor = 0.05,
) -> None:  # fmt: skip
    """Decide which channels stay; the result, plan.json, may be read and edited."""
    settings = {**limits(params, bytes, macs), "per": per, "multiple": multiple, "floor": floor}
    with _continued(folder) as (run, task):
        run = _done(run, task, "plan", settings)
        show_costs(*costs(Desk(run, task)))


@app.command()
@explained()
def apply(folder: Folder, seed: Seed = 0, threads: Threads = 1) -> None:
    """Make the plan so, verify it against the masked original, and re-estimate batch-normalisation statistics."""
    with _continued(folder) as (run, task):
        _done(run, task, "apply", {"seed": seed, "threads": threads})


@app.command()
@explained()
def fit(
    folder: Folder, epochs: Epochs = None, lr: Lr = None, optimizer: Optimizer = None, schedule: Schedule = None,
    milestones: Milestones = None, weight_decay: WeightDecay = None, distill: Distill = None, precision: Precision = None,
    seed: Seed = 0, threads: Threads = 1,
) -> None:  # fmt: skip
    """Fine-tune what is left; interrupted, the same command goes on from the last epoch."""
    recovery = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "schedule": schedule, "milestones": milestones,
                "weight_decay": weight_decay, "distill": distill, "precision": precision}  # fmt: skip
    with _continued(folder) as (run, task):
        _done(run, task, "fit", {**tuning(task, recovery), "seed": seed, "threads": threads})


@app.command()
@explained()
def export(folder: Folder, threads: Threads = 1) -> None:
    """Write ONNX files, compare them with the PyTorch models, and time them in ONNX Runtime."""
    with _continued(folder) as (run, task):
        _done(run, task, "export", {"threads": threads, "batches": list(BATCHES)})


@app.command()
@explained()
def report(folder: Folder) -> None:
    """Write the report: metrics.json and report.html."""
    with _continued(folder) as (run, task):
        run = _done(run, task, "report", {})
        show_report(read_report(run), folder / "report.html")


def main() -> None:
    """Run the command line."""
    app()


def _pairs(given: list[str] | None, data: str | None) -> dict[str, str]:
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


@contextmanager
def _started(folder: Path, task: Recipe) -> Iterator[Run]:
    """The run of a recipe in a folder, alone there."""
    create(folder, task.name, task.options)
    with alone_in(folder):
        yield open_run(folder)


@contextmanager
def _continued(folder: Path) -> Iterator[tuple[Run, Recipe]]:
    """The run in a folder and its recipe, alone there."""
    run = open_run(folder)
    with alone_in(folder):
        yield open_run(folder), load_recipe(run.recipe, run.options)


def _done(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any]) -> Run:
    """The run after a stage that was asked for by its name: it is done, also if it was before."""
    torch.set_num_threads(settings.get("threads", 1))
    with bars(stage) as show:
        outcome = run_stage(Desk(run, task, show), stage, settings)
    tell(stage, outcome)
    return outcome.run


def _kept(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any], *, again: bool) -> Run:
    """The run after a stage, which is done unless it was before."""
    with bars(stage) as show:
        outcome = keep_stage(Desk(run, task, show), stage, settings, again=again)
    tell(stage, outcome)
    return outcome.run


def _estimate(run: Run, task: Recipe, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Say how long scores and recovery will take where they are still to be done, from the time of one training step."""
    if "fit" in run.stages:
        return
    model = Desk(run, task).original()
    seconds = [_step_seconds(model, task, batch) for batch in islice(task.batches("calibration"), 2)][-1]
    work, epochs, batches = settings["score"], settings["fit"]["epochs"], task.batches("train")
    steps = {"hessian_trace": 2 + 2.5 * work["probes"], "taylor": 1}.get(work["method"], 0) * work["samples"]
    scores = "" if "score" in run.stages else f"{clock(steps * seconds)} for scores, "
    recovery = f"at most {clock(epochs * len(batches) * seconds)} for recovery" if isinstance(batches, Sized) else "recovery unknown"
    say(f"estimate {scores}{recovery}, on {torch.get_num_threads()} thread(s)")


def _step_seconds(model: torch.nn.Module, task: Recipe, batch: Any) -> float:
    start = time.perf_counter()
    torch.autograd.grad(batch_loss(model, task.loss, batch), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
