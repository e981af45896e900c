"""``curvepress reproduce``: the published systems on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..curvature import ESTIMATORS, PRECISIONS
from ..reproduce.accounts import REPRODUCTION
from ..reproduce.running import SYSTEMS, Asked, reproduce
from ..runs.artifacts import read_json
from ..runs.recipe import load_recipe
from ..runs.settings import limits, timing
from ..stages.sessions import pairs_of
from ..stages.terminal import explained, say, show_table
from ..stopwatch import RUNTIMES
from ..training.fitting import PRECISIONS as ARITHMETIC
from .options import one_of

app = typer.Typer(no_args_is_help=True, help="A published system, faithful to its method: HAP, EHAP, HAWQ-V2 or NViT, on your task.")
BUDGET, SYSTEM, RECOVERY = "Budget", "The system (without them its own settings)", "Recovery (without them the system's own)"


def _in(panel: str, what: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=what, rich_help_panel=panel, **more)


RecipeName = Annotated[str, typer.Argument(help="a Python file with the five functions of a recipe, or the name of a shipped one")]
Out = Annotated[Path, typer.Option(help="the folder of the run; made if missing, continued if interrupted")]
Corrected = Annotated[bool, typer.Option("--corrected", help="without the defects of the released code")]
Options = Annotated[list[str] | None, typer.Option("--option", help="an option of the recipe, name=value; may be repeated")]
Data = Annotated[str | None, typer.Option(help="the data folder of the recipe: short for --option data=...")]
Seed = Annotated[int, typer.Option(min=0, help="of every random choice")]
Threads = Annotated[int, typer.Option(min=1, help="processor threads that torch and the runtime use")]
Again = Annotated[bool, typer.Option("--again", help="do stages again that were done with other settings, or whose files were changed")]
Params = Annotated[str | None, _in(BUDGET, "parameters at most: a share (0.5 or 50%) of the original, or a number")]
Macs = Annotated[str | None, _in(BUDGET, "multiply-accumulates at most, likewise")]
Latency = Annotated[str | None, _in(BUDGET, "measured latency at most: a share of the original (0.6 or 60%), or a time (0.8ms)")]
Estimator = Annotated[str | None, one_of(SYSTEM, "estimator of the trace", ("auto", *ESTIMATORS))]
Probes = Annotated[int | None, _in(SYSTEM, "random vectors", min=1)]
Images = Annotated[int | None, _in(SYSTEM, "calibration examples that the trace is estimated on", min=2)]
Precision = Annotated[str | None, one_of(SYSTEM, "precision of the passes behind the trace", PRECISIONS)]
Epochs = Annotated[int | None, _in(RECOVERY, "epochs of training", min=0)]
Lr = Annotated[float | None, _in(RECOVERY, "learning rate")]
Distill = Annotated[float | None, _in(RECOVERY, "weight of learning from the original model's outputs", min=0, max=1)]
Arithmetic = Annotated[str | None, one_of(RECOVERY, "precision of training", ARITHMETIC)]


@app.command("hap")
@explained()
def hap(
    recipe: RecipeName, out: Out, params: Params = None, macs: Macs = None, corrected: Corrected = False,
    implants: Annotated[float | None, _in(SYSTEM, "share of the channels that go which get 1x1 filters instead", min=0, max=0.9)] = None, *,
    estimator: Estimator = None, probes: Probes = None, examples: Images = None, epochs: Epochs = None, lr: Lr = None,
    distill: Distill = None, arithmetic: Arithmetic = None, option: Options = None, data: Data = None, seed: Seed = 0,
    threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """Relative Hessian trace, one threshold, 1x1 implants (Yu et al., WACV 2022)."""
    own = {"implants": implants, "estimator": estimator, "probes": probes, "examples": examples}
    recovery = {"epochs": epochs, "lr": lr, "distill": distill, "precision": arithmetic}
    asked = Asked("hap", corrected, limits(params, None, macs), own, recovery, seed=seed, threads=threads)
    _run(asked, recipe, pairs_of(option, data), out, again)


@app.command("ehap")
@explained()
def ehap(
    recipe: RecipeName, out: Out, params: Params = None, macs: Macs = None, corrected: Corrected = False, *,
    estimator: Estimator = None, probes: Probes = None, precision: Precision = None, examples: Images = None, epochs: Epochs = None,
    lr: Lr = None, qat_epochs: Annotated[int | None, _in(RECOVERY, "epochs of training on eight bits", min=0)] = None,
    distill: Distill = None, arithmetic: Arithmetic = None, option: Options = None, data: Data = None, seed: Seed = 0,
    threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """Half-precision trace, pruning, fine-tune, training on eight bits, integer ONNX (Chong, Gupta and Chen, 2023)."""
    own = {"estimator": estimator, "probes": probes, "precision": precision, "examples": examples, "qat_epochs": qat_epochs}
    recovery = {"epochs": epochs, "lr": lr, "distill": distill, "precision": arithmetic}
    asked = Asked("ehap", corrected, limits(params, None, macs), own, recovery, seed=seed, threads=threads)
    _run(asked, recipe, pairs_of(option, data), out, again)


@app.command("hawq-v2")
@explained()
def hawq_v2(
    recipe: RecipeName, out: Out,
    ratio: Annotated[float, _in(BUDGET, "how many times fewer bytes the weights take than in float", min=4, max=16)] = 8.0,
    mean: Annotated[float, _in(BUDGET, "mean bits of an activation at most", "--activations", min=4, max=8)] = 6.0,
    backwards: Annotated[bool, _in(SYSTEM, "its ablation: sensitivities in reversed order", "--reversed")] = False, *,
    estimator: Estimator = None, probes: Probes = None, examples: Images = None, epochs: Epochs = None, lr: Lr = None,
    distill: Distill = None, option: Options = None, data: Data = None, seed: Seed = 0, threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """Bits by mean Hessian trace, monotone, from the Pareto frontier (Dong et al., NeurIPS 2020)."""
    own = {"estimator": estimator, "probes": probes, "examples": examples}
    more = {"ratio": ratio, "mean": mean, "reversed": backwards}
    recovery = {"epochs": epochs, "lr": lr, "distill": distill}
    _run(Asked("hawq-v2", False, {}, own, recovery, more, seed, threads), recipe, pairs_of(option, data), out, again)


@app.command("nvit")
@explained()
def nvit(
    recipe: RecipeName, out: Out, latency: Latency = None, params: Params = None, macs: Macs = None, corrected: Corrected = False,
    eta: Annotated[float | None, _in(SYSTEM, "what a second of latency is worth in scores", min=0)] = None, *,
    runtime: Annotated[str, one_of(BUDGET, "the runtime whose latency counts", RUNTIMES)] = "onnxruntime",
    batch: Annotated[int, _in(BUDGET, "examples a batch that latency is measured with", min=1)] = 1,
    samples: Annotated[int | None, _in(SYSTEM, "calibration batches the scores are averaged over", min=2)] = None,
    epochs: Epochs = None, lr: Lr = None, distill: Distill = None, arithmetic: Arithmetic = None,
    option: Options = None, data: Data = None, seed: Seed = 0, threads: Threads = 1, again: Again = False,
) -> None:  # fmt: skip
    """Squared Taylor scores of five dimensions, less what latency saves (Yang et al., CVPR 2023)."""
    more = timing(latency or "1.0", runtime, batch, threads)
    recovery = {"epochs": epochs, "lr": lr, "distill": distill, "precision": arithmetic}
    budget = limits(params, None, macs, latency=latency)
    asked = Asked("nvit", corrected, budget, {"eta": eta, "samples": samples}, recovery, more, seed, threads)
    _run(asked, recipe, pairs_of(option, data), out, again)


def _run(asked: Asked, recipe: str, given: dict[str, str], out: Path, again: bool) -> None:
    torch.set_num_threads(asked.threads)
    preset, task = SYSTEMS[asked.system], load_recipe(recipe, given)
    say(f"{preset.title}: {preset.paper}")
    say(f"{preset.formula}; {'corrected' if asked.corrected else 'as released' if preset.corrections else 'as published'}")
    reproduce(asked, task, out, again=again)
    facts = read_json(out / "reproduction.json", REPRODUCTION)
    _show(facts["stages"])
    for name, value in facts["facts"].items():
        say(f"{name}: {value:.3g}")
    say(f"files: {out.resolve()}; what this does otherwise than the paper and its code is in docs/reproduce.md")


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """The figures of every stage."""
    metric = next(iter(rows[0]["validation"]))
    sizes = list(rows[0]["latency"])
    heads = ["", metric, "test", "params", "MACs", "bytes", *(f"batch {b}" for b in sizes)]
    lines = []
    for r in rows:
        test = f"{r['test'][metric]:.2f}" if r["test"] else "-"
        times = [f"{r['latency'][b][1]:.2f}" if b in r["latency"] else "-" for b in sizes]
        numbers = [f"{r[k]:,}" for k in ("params", "macs", "bytes")]
        lines.append([r["stage"], f"{r['validation'][metric]:.2f}", test, *numbers, *times])
    show_table(heads, lines)
    say(f"{metric} is of the validation split, in its own column of the test split; batch: latency over that of the first row's file")
