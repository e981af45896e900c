"""The command line: files in, one call, files out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import options
from .artifacts import load_structure, read_json
from .curvature import ESTIMATORS
from .curvature import PRECISIONS as PASSES
from .curvature.workers import joined, workers
from .desk import Desk
from .files import alone_in
from .findings import read_report
from .metering import clock
from .objective import batch_loss
from .options import one_of
from .pipeline import assist, check_budget, costs, keep_stage, run_stage
from .planner import PER
from .quantization import QUANTIZED, check_choice, check_exports, source_files
from .recipe import Recipe, load_recipe
from .runs import FLOWS, QUANTIZATION, Run, create, open_run, require, sweep
from .scores import METHODS, SHARED
from .settings import QAT, bit_choice, limits, tuning
from .terminal import bars, complain, explained, hush, print_what_can_be, say, show_costs, show_groups, show_quantized, show_report, tell
from .training import OPTIMIZERS, PRECISIONS, SCHEDULES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network smaller and faster, guided by the curvature of its loss.",
)
SCORE, BUDGET, RECOVERY = "Scores", "Budget (one or more)", "Recovery (without them the recipe's own settings)"


def _limit(what: str) -> Any:
    return typer.Option(metavar="LIMIT", help=what, rich_help_panel=BUDGET)


def _tuned(what: str, **more: Any) -> Any:
    return typer.Option(help=what, rich_help_panel=RECOVERY, **more)


RecipeName = Annotated[str, typer.Argument(help="a Python file with the five functions of a recipe, or a shipped one: digits, cifar10")]
Folder = Annotated[Path, typer.Argument(help="the folder of a run")]
Out = Annotated[Path, typer.Option(help="the folder of the run; made if missing, continued if interrupted")]
Options = Annotated[list[str] | None, typer.Option("--option", help="an option of the recipe, name=value; may be repeated")]
Data = Annotated[str | None, typer.Option(help="the data folder of the recipe: short for --option data=...")]
Seed = Annotated[int, typer.Option(min=0, help="of every random choice")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads that torch and the runtime use")]
Again = Annotated[bool, typer.Option("--again", help="do stages again that were done with other settings, or whose files were changed")]

Method = Annotated[str, one_of(SCORE, "the score", METHODS)]
Samples = Annotated[int, typer.Option(min=2, help="calibration batches the scores are averaged over", rich_help_panel=SCORE)]
Estimator = Annotated[str, one_of(SCORE, "estimator of the curvature", ("auto", *ESTIMATORS))]
Half = Annotated[str, one_of(SCORE, "precision of the passes behind the scores", PASSES)]
Probes = Annotated[int, typer.Option(min=1, help="random vectors a batch, for estimators by random vectors", rich_help_panel=SCORE)]
Temperature = Annotated[float, typer.Option(min=0.01, help="of the output curvature (mask_curvature)", rich_help_panel=SCORE)]
Reliability = Annotated[
    float | None, typer.Option(min=0, max=1, help="stop when the ranking is as reliable as this", rich_help_panel=SCORE)
]
MaxSeconds = Annotated[float | None, typer.Option(min=0, help="stop scoring after so many seconds", rich_help_panel=SCORE)]

Params = Annotated[str | None, _limit("parameters at most: a share (0.5 or 50%) of the original, or a number")]
Bytes = Annotated[str | None, _limit("bytes of the stored tensors at most, likewise")]
Macs = Annotated[str | None, _limit("multiply-accumulates at most, likewise")]
Per = Annotated[str, one_of(BUDGET, "what a channel's score is divided by", PER)]
Multiple = Annotated[int, typer.Option(min=1, help="hold widths to multiples of this", rich_help_panel=BUDGET)]
Floor = Annotated[float, typer.Option(min=0, max=1, help="least share of a group's channels that stays", rich_help_panel=BUDGET)]

Epochs = Annotated[int | None, _tuned("epochs of the fine-tune, else 1", min=0)]
Lr = Annotated[float | None, _tuned("learning rate, else 0.01")]
Optimizer = Annotated[str | None, one_of(RECOVERY, "the optimizer, else the first", OPTIMIZERS)]
Schedule = Annotated[str | None, one_of(RECOVERY, "how the learning rate falls, else the first", SCHEDULES)]
Milestones = Annotated[list[int] | None, _tuned("epoch after which the step schedule divides by ten; may be repeated")]
WeightDecay = Annotated[float | None, _tuned("weight decay, else 0.0001")]
Distill = Annotated[float | None, _tuned("weight of learning from the original model's outputs, else 0", min=0, max=1)]
Precision = Annotated[str | None, one_of(RECOVERY, "precision of the arithmetic, else the first", PRECISIONS)]

BATCHES = (1, 64)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False
) -> None:
    if show:
        say(f"curvepress {version('curvepress')}")
        raise typer.Exit
    if workers().count > 1 and context.invoked_subcommand != "score":
        _refuse(f"`{context.invoked_subcommand}` is the work of one process; run it without torchrun, which only `score` can use")


@app.command()
@explained()
def compress(
    recipe: RecipeName, out: Out, params: Params = None, bytes: Bytes = None, macs: Macs = None, *,
    option: Options = None, data: Data = None, method: Method = "mask_curvature", samples: Samples = 32,
    reliability: Reliability = None, max_seconds: MaxSeconds = None, estimator: Estimator = "auto", score_precision: Half = "full",
    probes: Probes = 4, temperature: Temperature = 1.0, per: Per = "channel",
    multiple: Multiple = 1, floor: Floor = 0.05, epochs: Epochs = None, lr: Lr = None,
    optimizer: Optimizer = None, schedule: Schedule = None, milestones: Milestones = None, weight_decay: WeightDecay = None,
    distill: Distill = None, precision: Precision = None, seed: Seed = 0, threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """The main job: trace, score, plan, apply, fit, export and report.  Interrupted, the same command goes on."""
    budget = limits(params, bytes, macs)
    task = load_recipe(recipe, _pairs(option, data))
    recovery = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "schedule": schedule, "milestones": milestones,
                "weight_decay": weight_decay, "distill": distill, "precision": precision}  # fmt: skip
    common = {"seed": seed, "threads": threads}
    scoring = {"method": method, "samples": samples, "reliability": reliability, "seconds": max_seconds, "estimator": estimator,
               "precision": score_precision, "probes": probes, "temperature": temperature}  # fmt: skip
    settings: dict[str, dict[str, Any]] = {
        "trace": {"threads": threads},
        "score": {**scoring, **common},
        "plan": {**budget, "per": per, "multiple": multiple, "floor": floor},
        "apply": common,
        "fit": {**tuning(task, recovery), **common},
        "export": {"threads": threads, "batches": list(BATCHES)},
        "report": {},
    }
    torch.set_num_threads(threads)
    with _started(out, task) as run:
        for stage in FLOWS:
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
    folder: Folder, method: Method = "mask_curvature", samples: Samples = 32, reliability: Reliability = None,
    max_seconds: MaxSeconds = None, estimator: Estimator = "auto", precision: Half = "full", probes: Probes = 4,
    temperature: Temperature = 1.0, seed: Seed = 0, threads: Threads = 1,
) -> None:  # fmt: skip
    """Predict what removing each channel costs.  Under torchrun the processes share out the batches; the folder must be on a
    disk that all of them see."""
    if workers().count > 1 and method not in SHARED:
        _refuse(f"`score --method {method}` is the work of one process; run it without torchrun, or choose one of {', '.join(SHARED)}")
    settings = {"method": method, "samples": samples, "reliability": reliability, "seconds": max_seconds, "estimator": estimator,
                "precision": precision, "probes": probes, "temperature": temperature, "seed": seed, "threads": threads}  # fmt: skip
    if workers().rank:
        _assist(folder, settings)
        return
    with _continued(folder) as (run, task):
        require(run, "score")
        workers().wait()
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


@app.command()
@explained()
def quantize(
    source: options.Source, out: options.Into = None, bits: options.Uniform = None, average: options.Average = None,
    bytes: options.PackedBytes = None, bops: options.Bops = None, bits_file: options.BitsFile = None, *,
    activations: options.Activations = None, target: options.Target = "storage", in_float: options.InFloat = None,
    price: options.PriceOf = "direction", price_examples: options.PriceExamples = 512,
    temperature: options.PriceTemperature = 1.0, rounding: options.Rounding = "nearest",
    ranges: options.Ranges = "mse", calibration: options.Calibration = 512, group: options.GroupSize = None,
    dynamic: options.Dynamic = False, asymmetric: options.Asymmetric = False, epochs: options.TrainingEpochs = None,
    lr: options.TrainingLr = None, distill: options.Teaching = None, exports: options.Exports = None, option: Options = None,
    data: Data = None, seed: Seed = 0, threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """Put weights and activations on few bits, chosen by curvature; calibrate, train, pack, export and compare in ONNX Runtime."""
    check_exports(exports or [])
    choice = bit_choice(bits, average, bytes, bops, bits_file, activations=activations or [8], target=target)
    task, files, folder = _source(source, out, _pairs(option, data))
    recovery = {"epochs": epochs, "lr": lr, "distill": distill}
    common = {"seed": seed, "threads": threads}
    settings: dict[str, dict[str, Any]] = {
        "load": {"source": str(Path(source).resolve()) if files else None, "files": files, "threads": threads},
        "price": {"price": price, "examples": price_examples, "temperature": temperature, "in_float": in_float or [],
                  "asymmetric": asymmetric, **common},
        "choose": {**choice, "group": group, "dynamic": dynamic, "asymmetric": asymmetric},
        "quantize": {**tuning(task, {**QAT, **{k: v for k, v in recovery.items() if v is not None}}), "rounding": rounding,
                     "ranges": ranges, "calibration": calibration, **common},
        "deploy": {"batches": list(BATCHES), "exports": sorted({"onnx", *(exports or [])}), **common},
    }  # fmt: skip
    torch.set_num_threads(threads)
    with _started(folder, task) as run:
        for stage in QUANTIZATION:
            if stage == "price":
                check_choice(Desk(run, task), settings["choose"], in_float or [])
            run = _kept(run, task, stage, settings[stage], again=again)
        show_quantized(read_json(folder / "quantized.json", QUANTIZED), folder)


def main() -> None:
    """Run the command line."""
    print_what_can_be()
    with joined() as team:
        if team.rank:
            hush()
        app()


def _refuse(why: str) -> None:
    """Ends every process, once the first has said why."""
    team = workers()
    if not team.rank:
        complain(why)
    team.wait()
    raise typer.Exit(1)


def _assist(folder: Path, settings: Mapping[str, Any]) -> None:
    """What the other processes do in the score stage, once the first has seen that it can be done."""
    try:
        workers().wait()
    except RuntimeError:  # the first process has ended, and has said why
        raise typer.Exit(1) from None
    torch.set_num_threads(settings["threads"])
    run = open_run(folder)
    assist(Desk(run, load_recipe(run.recipe, run.options)), settings)


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


def _source(source: str, out: Path | None, given: dict[str, str]) -> tuple[Recipe, dict[str, str], Path]:
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
def _started(folder: Path, task: Recipe) -> Iterator[Run]:
    """The run of a recipe in a folder, which is made if missing, alone there."""
    if not folder.exists():
        folder.mkdir(parents=True)
    with alone_in(folder):
        run = create(folder, task.name, task.options)
        sweep(folder)
        yield run


@contextmanager
def _continued(folder: Path) -> Iterator[tuple[Run, Recipe]]:
    """The run in a folder and its recipe, alone there."""
    open_run(folder)
    with alone_in(folder):
        run = open_run(folder)
        sweep(folder)
        yield run, load_recipe(run.recipe, run.options)


def _done(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any]) -> Run:
    """The run after a stage that was asked for by its name: it is done, also if it was before."""
    torch.set_num_threads(settings.get("threads", 1))
    with bars(stage) as show:
        outcome = run_stage(Desk(run, task, show, partial(_noted, stage)), stage, settings)
    tell(stage, outcome)
    return outcome.run


def _kept(run: Run, task: Recipe, stage: str, settings: Mapping[str, Any], *, again: bool) -> Run:
    """The run after a stage, which is done unless it was before."""
    with bars(stage) as show:
        outcome = keep_stage(Desk(run, task, show, partial(_noted, stage)), stage, settings, again=again)
    tell(stage, outcome)
    return outcome.run


def _noted(stage: str, what: str) -> None:
    if what:
        say(f"{stage:8} {what}")


def _estimate(run: Run, task: Recipe, settings: Mapping[str, Mapping[str, Any]]) -> None:
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


if __name__ == "__main__":
    main()
