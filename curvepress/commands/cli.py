"""The command line: files in, one call, files out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..curvature import ESTIMATORS
from ..curvature import PRECISIONS as PASSES
from ..curvature.workers import joined, workers
from ..files import write_text
from ..plan import to_json
from ..planner.channels import PER
from ..repairing.sequential import EXAMPLES
from ..runs.artifacts import load_structure, read_json
from ..runs.desk import Desk
from ..runs.folder import PLAN, QUANTIZATION, open_run, require
from ..runs.recipe import load_recipe
from ..runs.recipe_files import shipped
from ..runs.settings import bit_choice, bit_ranges, branch_count, exchange, gently, limits, method_of, quantized_tuning, timing, tuning
from ..scores import METHODS, SHARED
from ..stages.findings import read_report
from ..stages.frontiers import drawn_frontier, picked
from ..stages.pipeline import assist, costs
from ..stages.planning import temperature_of
from ..stages.quantizing import CHOSEN, PRICED, QUANTIZED, check_choice, check_exports
from ..stages.ranking import rank_choice
from ..stages.rounds import earlier_rounds, round_count, through
from ..stages.searching import exact_choice, weighing
from ..stages.sessions import (
    BATCHES,
    continued,
    done,
    kept,
    noted,
    pairs_of,
    quantized_as_planned,
    source_of,
    started,
    with_scores,
)
from ..stages.terminal import (
    bars,
    complain,
    explained,
    hush,
    print_what_can_be,
    say,
    show_costs,
    show_frontier,
    show_groups,
    show_quantized,
    show_report,
)
from ..stopwatch import RUNTIMES
from ..training.fitting import OPTIMIZERS, PRECISIONS, SCHEDULES
from . import options
from .options import one_of
from .reproducing import app as reproduced

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a trained network smaller and faster, guided by the curvature of its loss.",
)
app.add_typer(reproduced, name="reproduce")
SCORE, BUDGET, RECOVERY = "Scores", options.BUDGET, "Recovery (without them the recipe's own settings)"


def _limit(what: str) -> Any:
    return typer.Option(metavar="LIMIT", help=what, rich_help_panel=BUDGET)


def _tuned(what: str, **more: Any) -> Any:
    return typer.Option(help=what, rich_help_panel=RECOVERY, **more)


RecipeName = Annotated[str, typer.Argument(help=f"a Python file with the five functions of a recipe, or one of {', '.join(shipped())}")]
Folder = Annotated[Path, typer.Argument(help="the folder of a run")]
Out = Annotated[Path, typer.Option(help="the folder of the run; made if missing, continued if interrupted")]
Options = Annotated[list[str] | None, typer.Option("--option", help="an option of the recipe, name=value; may be repeated")]
Data = Annotated[str | None, typer.Option(help="the data folder of the recipe: short for --option data=...")]
Seed = Annotated[int, typer.Option(min=0, help="of every random choice")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads that torch and the runtime use")]
Again = Annotated[bool, typer.Option("--again", help="do stages again that were done with other settings, or whose files were changed")]

Method = Annotated[str | None, one_of(SCORE, "the score; the price after repair where there is one", METHODS)]
Samples = Annotated[int, typer.Option(min=2, help="calibration batches the scores are averaged over", rich_help_panel=SCORE)]
Estimator = Annotated[str, one_of(SCORE, "estimator of the curvature", ("auto", *ESTIMATORS))]
Half = Annotated[str, one_of(SCORE, "precision of the passes behind the scores", PASSES)]
Probes = Annotated[int, typer.Option(min=1, help="random vectors a batch, for estimators by random vectors", rich_help_panel=SCORE)]
Temperature = Annotated[float, typer.Option(min=0.01, help="of the output curvature", rich_help_panel=SCORE)]
Reliability = Annotated[
    float | None, typer.Option(min=0, max=1, help="stop when the ranking is as reliable as this", rich_help_panel=SCORE)
]
MaxSeconds = Annotated[float | None, typer.Option(min=0, help="stop scoring after so many seconds", rich_help_panel=SCORE)]

Params = Annotated[str | None, _limit("parameters at most: a share (0.5 or 50%) of the original, or a number")]
Bytes = Annotated[str | None, _limit("bytes of the stored tensors at most, likewise")]
Macs = Annotated[str | None, _limit("multiply-accumulates at most, likewise")]
Latency = Annotated[str | None, _limit("measured latency at most: a share of the original (0.6 or 60%), or a time (0.8ms)")]
Runtime = Annotated[str, one_of(BUDGET, "the runtime whose latency is limited", RUNTIMES)]
Batch = Annotated[int, typer.Option(min=1, help="examples a batch that latency is measured with", rich_help_panel=BUDGET)]
Per = Annotated[
    str | None, one_of(BUDGET, "what a channel's score is divided by, else what is limited, and channel for several limits", PER)
]
PlanBops = Annotated[str | None, _limit("bit operations at most, likewise")]
PlanBits = Annotated[
    str | None, typer.Option(help="bits that weights may have, such as 2-8: channels and bits in one plan", rich_help_panel=BUDGET)
]
PlanActivations = Annotated[str | None, typer.Option(help="with --bits: those that activations may have, else 8", rich_help_panel=BUDGET)]
QatEpochs = Annotated[int, typer.Option(help="with --bits: epochs of training quantized", min=0, rich_help_panel=RECOVERY)]
Multiple = Annotated[int, typer.Option(min=1, help="hold widths to multiples of this", rich_help_panel=BUDGET)]
Branches = Annotated[str, typer.Option(help=options.BRANCHES, rich_help_panel=BUDGET)]
Floor = Annotated[float, typer.Option(min=0, max=1, help="least share of a group's channels that stays", rich_help_panel=BUDGET)]

Examples = Annotated[int, _tuned("calibration examples for the repair in closed form; 0: none", min=0)]
Epochs = Annotated[int | None, _tuned("epochs of the fine-tune, else 1", min=0)]
Lr = Annotated[float | None, _tuned("learning rate, else 0.01")]
Optimizer = Annotated[str | None, one_of(RECOVERY, "the optimizer, else the first", OPTIMIZERS)]
Schedule = Annotated[str | None, one_of(RECOVERY, "how the learning rate falls, else the first", SCHEDULES)]
Milestones = Annotated[list[int] | None, _tuned("epoch after which the step schedule divides by ten; may be repeated")]
WeightDecay = Annotated[float | None, _tuned("weight decay, else 0.0001")]
Distill = Annotated[float | None, _tuned("weight of learning from the original model's outputs, else 0", min=0, max=1)]
Precision = Annotated[str | None, one_of(RECOVERY, "precision of the arithmetic, else the first", PRECISIONS)]


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
    latency: Latency = None, runtime: Runtime = "onnxruntime", batch: Batch = 1,
    option: Options = None, data: Data = None, method: Method = None, samples: Samples = 32,
    reliability: Reliability = None, max_seconds: MaxSeconds = None, estimator: Estimator = "auto", score_precision: Half = "full",
    probes: Probes = 4, temperature: Temperature = 1.0, per: Per = None,
    multiple: Multiple = 1, floor: Floor = 0.05, whole: options.Whole = None, aligned: options.Aligned = False, branches: Branches = "0",
    bops: PlanBops = None, bits: PlanBits = None, activation_bits: PlanActivations = None,
    implants: options.Implants = False, exact: options.Exact = None, exchanged: options.Exchanged = None, rounds: options.Rounds = 1,
    price_examples: options.PlanExamples = 512, repair_examples: Examples = EXAMPLES, epochs: Epochs = None, lr: Lr = None,
    optimizer: Optimizer = None, schedule: Schedule = None, milestones: Milestones = None, weight_decay: WeightDecay = None,
    distill: Distill = None, precision: Precision = None, qat_epochs: QatEpochs = 0, seed: Seed = 0, threads: Threads = 1,
    again: Again = False,
) -> None:  # fmt: skip
    """The main job: trace, score, plan, apply, repair, fit, export and report; with --bits the result is quantized too.  Interrupted,
    the same command goes on."""
    budget = {**limits(params, bytes, macs, bops=bops, latency=latency), **timing(latency, runtime, batch, threads)}
    chosen, low = bit_ranges(bits, activation_bits), rank_choice(implants, latency, per)
    proof = exact_choice(exact, {"--latency": latency, "--implants": implants, "--per": per}, chosen)
    rates = exchange(exchanged or [], {**chosen, **low})
    rounds = round_count(rounds, latency, bits=bits, implants=implants, branches=branches)
    task = load_recipe(recipe, pairs_of(option, data))
    recovery = {"epochs": epochs, "lr": lr, "optimizer": optimizer, "schedule": schedule, "milestones": milestones,
                "weight_decay": weight_decay, "distill": distill, "precision": precision}  # fmt: skip
    common = {"seed": seed, "threads": threads}
    method = method_of(method, repaired=repair_examples > 0 and not chosen, weighed=weighing(chosen, low, proof))
    scoring = {"method": method, "samples": samples, "reliability": reliability, "seconds": max_seconds, "estimator": estimator,
               "precision": score_precision, "probes": probes, "temperature": temperature}  # fmt: skip
    count = branch_count(branches, chosen)
    shape = {"multiple": multiple, "floor": floor, "whole": whole or [], "aligned": aligned, "branches": count}
    settings: dict[str, dict[str, Any]] = {
        "trace": {"threads": threads},
        "score": {**scoring, **common},
        **({"weigh": {"examples": price_examples, "temperature": temperature, "branches": count, **common}} if chosen else {}),
        **({"truncate": {"examples": price_examples, "temperature": temperature, **common}} if low else {}),
        "plan": {**budget, "per": per, **shape, **chosen, **low, **proof, **rates},
        "apply": common,
        "repair": {"examples": repair_examples, **common},
        "fit": {**tuning(task, recovery), **common},
        "export": {"threads": threads, "batches": list(BATCHES)},
        "report": {},
    }
    torch.set_num_threads(threads)
    with started(out, task) as run:
        before = earlier_rounds(out, task, settings, rounds, again=again)
        run = through(run, task, settings, again=again, before=before)
        show_report(read_report(run), out / "report.html")
        if chosen:
            quantized_as_planned(run, task, {**settings["fit"], **gently(settings["fit"]), "epochs": qat_epochs}, settings, again=again)


@app.command()
@explained()
def trace(recipe: RecipeName, out: Out, option: Options = None, data: Data = None, threads: Threads = 1) -> None:
    """Find which dimensions of the model must change together."""
    torch.set_num_threads(threads)
    task = load_recipe(recipe, pairs_of(option, data))
    with started(out, task) as run:
        done(run, task, "trace", {"threads": threads})
        show_groups(load_structure(out / "structure.json"))


@app.command()
@explained()
def score(
    folder: Folder, method: Method = None, samples: Samples = 32, reliability: Reliability = None,
    max_seconds: MaxSeconds = None, estimator: Estimator = "auto", precision: Half = "full", probes: Probes = 4,
    temperature: Temperature = 1.0, seed: Seed = 0, threads: Threads = 1,
) -> None:  # fmt: skip
    """Predict what removing each channel costs.  Under torchrun the processes share out the batches; the folder must be on a
    disk that all of them see."""
    method = method_of(method, repaired=True)
    if workers().count > 1 and method not in SHARED:
        _refuse(f"`score --method {method}` is the work of one process; run it without torchrun, or choose one of {', '.join(SHARED)}")
    settings = {"method": method, "samples": samples, "reliability": reliability, "seconds": max_seconds, "estimator": estimator,
                "precision": precision, "probes": probes, "temperature": temperature, "seed": seed, "threads": threads}  # fmt: skip
    if workers().rank:
        _assist(folder, settings)
        return
    with continued(folder) as (run, task):
        require(run, "score")
        workers().wait()
        done(run, task, "score", settings)
        workers().wait()


@app.command()
@explained()
def plan(
    folder: Folder, params: Params = None, bytes: Bytes = None, macs: Macs = None,
    latency: Latency = None, runtime: Runtime = "onnxruntime", batch: Batch = 1, per: Per = None, multiple: Multiple = 1,
    floor: Floor = 0.05, whole: options.Whole = None, aligned: options.Aligned = False, branches: Branches = "0",
    implants: options.Implants = False, exact: options.Exact = None, threads: Threads = 1,
) -> None:  # fmt: skip
    """Decide which channels stay, and with --implants ranks; the result, plan.json, may be read and edited."""
    budget = {**limits(params, bytes, macs, latency=latency), **timing(latency, runtime, batch, threads)}
    settings = {**budget, "per": per, "multiple": multiple, "floor": floor, "whole": whole or [], "aligned": aligned,
                "branches": branch_count(branches, {}), **rank_choice(implants, latency, per),
                **exact_choice(exact, {"--latency": latency, "--implants": implants, "--per": per}, {})}  # fmt: skip
    with continued(folder) as (run, task):
        run = done(run, task, "plan", settings)
        show_costs(*costs(Desk(run, task)))


@app.command()
@explained()
def apply(folder: Folder, seed: Seed = 0, threads: Threads = 1) -> None:
    """Make the plan so, verify it against the masked original, and re-estimate batch-normalisation statistics."""
    with continued(folder) as (run, task):
        done(run, task, "apply", {"seed": seed, "threads": threads})


@app.command()
@explained()
def repair(folder: Folder, examples: Examples = EXAMPLES, seed: Seed = 0, threads: Threads = 1) -> None:
    """Refit what is left, layer by layer, to what the original computes on calibration examples; no training."""
    with continued(folder) as (run, task):
        done(run, task, "repair", {"examples": examples, "seed": seed, "threads": threads})


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
    with continued(folder) as (run, task):
        done(run, task, "fit", {**tuning(task, recovery), "seed": seed, "threads": threads})


@app.command()
@explained()
def export(folder: Folder, threads: Threads = 1) -> None:
    """Write ONNX files, compare them with the PyTorch models, and time them in ONNX Runtime."""
    with continued(folder) as (run, task):
        done(run, task, "export", {"threads": threads, "batches": list(BATCHES)})


@app.command()
@explained()
def report(folder: Folder) -> None:
    """Write the report: metrics.json and report.html."""
    with continued(folder) as (run, task):
        run = done(run, task, "report", {})
        show_report(read_report(run), folder / "report.html")


@app.command()
@explained()
def frontier(
    source: Annotated[str, typer.Argument(help="the folder of a run that has scores, or a recipe")],
    out: Annotated[Path | None, typer.Option(help="the folder of the run of a recipe")] = None,
    bits: PlanBits = "2-8", activation_bits: PlanActivations = None,
    count: Annotated[int, typer.Option(min=2, help="points")] = 12,
    measure: Annotated[bool, typer.Option("--measure", help="measure them on the validation split, without training")] = False,
    pick: Annotated[int | None, typer.Option(help="write the plan of this point to plan.json")] = None,
    whole: Annotated[list[str] | None, typer.Option(help="groups not to cut, by kind or name; * for all: bits alone")] = None, *,
    implants: options.Implants = False, multiple: Multiple = 1, floor: Floor = 0.05, price_examples: options.PlanExamples = 512,
    samples: Samples = 32, option: Options = None, data: Data = None, seed: Seed = 0, threads: Threads = 1,
) -> None:  # fmt: skip
    """What every size costs: widths, bits and ranks along the frontier of bytes and predicted rise of the loss; a point can be picked."""
    torch.set_num_threads(threads)
    shape, common = {"multiple": multiple, "floor": floor, "whole": whole or []}, {"seed": seed, "threads": threads}
    settings = {**bit_ranges(bits, activation_bits), **rank_choice(implants, None, None), **shape, **common}
    with with_scores(source, out, pairs_of(option, data), {"samples": samples, **common}) as (run, task):
        pricing = {"examples": price_examples, "temperature": temperature_of(run, "score"), **common}
        for stage in ("weigh", *(["truncate"] if implants else [])):
            run = kept(run, task, stage, pricing, again=True)
        with bars("frontier") as show:
            choices, found = drawn_frontier(Desk(run, task, show, partial(noted, "frontier")), settings, count=count, measure=measure)
        show_frontier(found["points"], found["original"], run.folder)
        if pick is not None:
            write_text(run.folder / PLAN, to_json(picked(choices, pick)))
            say(f"plan: {run.folder / PLAN}; go on with curvepress apply {run.folder}, then fit, and quantize")


@app.command()
@explained()
def quantize(
    source: options.Source, out: options.Into = None, bits: options.Uniform = None, average: options.Average = None,
    bytes: options.PackedBytes = None, bops: options.Bops = None, rise: options.Rise = None,
    bits_file: options.BitsFile = None, *,
    activations: options.Activations = None, target: options.Target = "storage", in_float: options.InFloat = None,
    price: options.PriceOf = "direction", price_examples: options.PriceExamples = 512,
    temperature: options.PriceTemperature = 1.0, rounding: options.Rounding = "nearest",
    ranges: options.Ranges = "mse", calibration: options.Calibration = 512, group: options.GroupSize = None,
    dynamic: options.Dynamic = False, asymmetric: options.Asymmetric = False, per_tensor: options.PerTensor = False,
    epochs: options.TrainingEpochs = None, lr: options.TrainingLr = None, distill: options.Teaching = None,
    exports: options.Exports = None, option: Options = None, data: Data = None, seed: Seed = 0, threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """Put weights and activations on few bits, chosen by curvature; calibrate, train, pack, export and compare in ONNX Runtime."""
    check_exports(exports or [])
    choice = bit_choice(bits, average, bytes, bops, bits_file, rise=rise, activations=activations or [8], target=target)
    task, files, folder = source_of(source, out, pairs_of(option, data))
    common = {"seed": seed, "threads": threads}
    settings: dict[str, dict[str, Any]] = {
        "load": {"source": str(Path(source).resolve()) if files else None, "files": files, "threads": threads},
        "price": {**PRICED, "price": price, "examples": price_examples, "temperature": temperature, "in_float": in_float or [],
                  "asymmetric": asymmetric, "per_tensor": per_tensor, "float_sums": bits_file is None, **common},
        "choose": {**CHOSEN, **choice, "group": group, "dynamic": dynamic, "asymmetric": asymmetric, "per_tensor": per_tensor},
        "quantize": {**quantized_tuning(task, {"epochs": epochs, "lr": lr, "distill": distill}), "rounding": rounding,
                     "ranges": ranges, "calibration": calibration, **common},
        "deploy": {"batches": list(BATCHES), "exports": sorted({"onnx", *(exports or [])}), **common},
    }  # fmt: skip
    torch.set_num_threads(threads)
    with started(folder, task) as run:
        for stage in QUANTIZATION:
            if stage == "price":
                check_choice(Desk(run, task), settings["choose"], in_float or [], float_sums=bits_file is None)
            run = kept(run, task, stage, settings[stage], again=again)
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
    with suppress(RuntimeError):  # none leaves before all are done, unless the first has failed
        workers().wait()


if __name__ == "__main__":
    main()
