"""Latency by a table: the cliffs of a convolution, predicted against measured latency of whole models, and budgets that are kept.

    python -m benchmarks.latency cliffs                # seconds
    python -m benchmarks.latency predict --depth 20    # minutes; ResNet-56 a quarter of an hour
    python -m benchmarks.latency predict --depth 20 --bits 8    # the same plans on integers
    python -m benchmarks.latency budgets --depth 20    # likewise; resumes
    python -m benchmarks.latency table

ONNX Runtime on one thread, batch 1.  Nothing is trained.  Needs the data of the recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import records
from curvepress.costs import cost
from curvepress.export.integers import to_integer_onnx
from curvepress.latency import FLOAT, Layer, Machine, Table, model_seconds
from curvepress.plan import Plan, tensors_after
from curvepress.planner.channels import at_most, search
from curvepress.quantization.quantized import Bits, calibrate, quantize
from curvepress.scores import score
from curvepress.stopwatch import RUNTIMES, Case, calibrated, layers_of, machine, measured_table, met
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress_recipes import cifar10 as recipe

FILE = Path(__file__).parent / "results" / "latency.jsonl"
RUNTIME = "onnxruntime"
CONVOLUTION = Layer("conv", (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))
WIDTHS = range(8, 65)
PLANS = ((8, 0.5), (16, 0.25), (4, 0.3), (1, 0.5), (1, 0.2))
"""Widths of random plans: in multiples of, and the least share."""
SHARES = (0.8, 0.6, 0.5)


def cliffs() -> None:
    """A 3x3 convolution on 8x8 places at all widths: of its inputs, of its outputs, of both."""
    cases = {
        "inputs": [Case(CONVOLUTION, 64, w) for w in WIDTHS],
        "outputs": [Case(CONVOLUTION, w, 64) for w in WIDTHS],
        "both": [Case(CONVOLUTION, w, w) for w in WIDTHS],
    }
    for side, some in cases.items():
        records.once(FILE, {"what": "cliffs", "side": side}, lambda some=some: {"micros": _micros(some)})
    integers = [replace(c, bits=8) for c in cases["both"]]
    records.once(FILE, {"what": "cliffs", "side": "both, 8 bits"}, lambda: {"micros": _micros(integers)})


def _micros(cases: Sequence[Case]) -> list[float]:
    return [round(t * 1e6, 2) for t in RUNTIMES[RUNTIME].layers(cases, 1, 1)]


def predict(depth: int, bits: int) -> None:
    """Ten plans with random widths: what the table says and what they take, with all layers at so many bits."""
    records.once(FILE, {"what": "predict", "depth": depth, "bits": bits}, lambda: {"rows": list(_predicted(depth, bits))})


def _predicted(depth: int, bits: int) -> Iterator[dict[str, float]]:
    model = recipe.model(depth=depth)
    structure, rng = trace(model, recipe.example()), np.random.default_rng(0)
    plans = [_random(structure, rng, *PLANS[n % len(PLANS)]) for n in range(10)]
    table = latency_table(model, structure, bits)
    with tempfile.TemporaryDirectory() as folder:
        whole, *seconds = raced([made(model, p) for p in (Plan(structure), *plans)], folder, bits)
    known = dict.fromkeys(table.layers, bits)
    before = model_seconds(structure.tensors, table, known)
    for plan, taken in zip(plans, seconds, strict=True):
        now, of = cost(plan), cost(Plan(structure))
        yield {"predicted": 1000 * model_seconds(tensors_after(plan), table, known), "measured": 1000 * taken,
               "whole_predicted": 1000 * before, "whole_measured": 1000 * whole,
               "params": now.params / of.params, "macs": now.macs / of.macs}  # fmt: skip


def _random(structure: Structure, rng: np.random.Generator, multiple: int, least: float) -> Plan:
    widths = {g.name: int(np.ceil(rng.uniform(least, 1) * g.size / multiple) * multiple) for g in structure.free}
    return Plan(structure, {g.name: tuple(range(min(g.size, widths[g.name]))) for g in structure.free})


def _here() -> Machine:
    return machine(RUNTIME, 1, 1)


def latency_table(model: nn.Module, structure: Structure, bits: int = FLOAT) -> Table:
    """As the command line makes it: the layers, and what three models of even widths take besides."""
    table = measured_table(layers_of(model, recipe.example()), structure.tensors, _here(), bits=sorted({FLOAT, bits}))
    plans = [Plan(structure, {g.name: tuple(range(max(1, g.size // part))) for g in structure.free}) for part in (1, 2, 4)]
    with tempfile.TemporaryDirectory() as folder:
        seconds = raced([made(model, p) for p in plans], folder, bits)
    known = list(zip(map(tensors_after, plans), seconds, strict=True))
    return calibrated(table, known, bits=dict.fromkeys(table.layers, bits))


def made(model: nn.Module, plan: Plan) -> nn.Module:
    """The pruned model, in evaluation mode."""
    return apply(model, plan, recipe.example()).eval()


def raced(models: Sequence[nn.Module], folder: str, bits: int = FLOAT) -> list[float]:
    """Seconds of each model for one image, in turns."""
    runtime, x = RUNTIMES[RUNTIME], recipe.example()
    if bits == FLOAT:
        prepared = [runtime.prepare(m, (x,), Path(folder)) for m in models]
    else:
        prepared = [_on_integers(m, Path(folder) / f"{n}.onnx", bits) for n, m in enumerate(models)]
    return runtime.race(prepared, (x[:1],), 1)


def _on_integers(model: nn.Module, path: Path, bits: int) -> Path:
    """The file of a quantized network; nothing is chosen with care, as it is for time only."""
    x, noise = recipe.example(), [(recipe.example(), torch.zeros(2, dtype=torch.long))]
    to_integer_onnx(calibrate(quantize(model, Bits(weight=bits, product=bits), x), noise), noise, path, examples=2, least_same=0.0)
    return path


def budgets(depth: int) -> None:
    """Plans under latency budgets by Taylor scores, closed on the measured latency."""
    wanted = [s for s in SHARES if not any(r["what"] == "budget" and (r["depth"], r["share"]) == (depth, s) for r in records.read(FILE))]
    if not wanted:
        return
    model = recipe.model(depth=depth)
    structure = trace(model, recipe.example())
    scores = score(model, recipe.loss, recipe.batches("calibration"), structure, method="taylor", samples=8)
    table = latency_table(model, structure)

    def measure(plan: Plan) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            whole, small = raced([model, made(model, plan)], folder)
        return small, whole

    def measured(share: float) -> dict[str, Any]:
        found = met(share, lambda aim: search(structure, scores, at_most(latency=aim), per="latency", table=table), measure, table)
        now, before = cost(found.plan), cost(Plan(structure))
        ratios = {"params": now.params / before.params, "macs": now.macs / before.macs}
        return {"predicted": found.predicted, "measured": found.measured, "rounds": found.rounds, **ratios}

    for share in wanted:
        records.once(FILE, {"what": "budget", "depth": depth, "share": share}, lambda share=share: measured(share))


def table() -> None:
    """Print the tables in Markdown."""
    rows = records.read(FILE)
    sides = {r["side"]: dict(zip(WIDTHS, r["micros"], strict=True)) for r in rows if r["what"] == "cliffs"}
    print("| channels | " + " | ".join(sides) + " |\n|---" + "|---" * len(sides) + "|")
    for width in (16, 17, 31, 32, 33, 36, 47, 48, 49, 52, 60, 63, 64):
        print(f"| {width} | " + " | ".join(f"{line[width]:.1f}" for line in sides.values()) + " |")
    print("\n| network | plans | median error of latency | largest | median error of the ratio | largest |\n|---|---|---|---|---|---|")
    for r in (r for r in rows if r["what"] == "predict"):
        print(f"| {_named(r)} | {len(r['rows'])} | " + " | ".join(f"{e:.1%}" for e in _errors(r["rows"])) + " |")
    print("\n| network | asked | predicted | measured | parameters | MACs | plans measured |\n|---|---|---|---|---|---|---|")
    for r in (r for r in rows if r["what"] == "budget"):
        parts = " | ".join(f"{r[k]:.3f}" for k in ("predicted", "measured", "params", "macs"))
        print(f"| ResNet-{r['depth']} | {r['share']} | {parts} | {r['rounds']} |")


def _named(r: records.Record) -> str:
    return f"ResNet-{r['depth']}" + (f", {r['bits']} bits" if r["bits"] != FLOAT else "")


def _errors(rows: Sequence[dict[str, float]]) -> list[float]:
    """Median and largest relative error of the latency, and of its ratio to the original's."""
    apart = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    ratios = [abs(r["predicted"] / r["whole_predicted"] / (r["measured"] / r["whole_measured"]) - 1) for r in rows]
    return [median(apart), max(apart), median(ratios), max(ratios)]


def plot(path: Path) -> None:
    """Draw the cliffs, and predicted against measured latency."""
    from matplotlib import pyplot

    rows = records.read(FILE)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for r in (r for r in rows if r["what"] == "cliffs"):
        left.plot(WIDTHS, r["micros"], ".-", label=r["side"], linewidth=0.8)
    left.set(xlabel="channels", ylabel="microseconds", title="a 3x3 convolution on 8x8 places, the other side 64 wide")
    for r in (r for r in rows if r["what"] == "predict"):
        right.plot([x["measured"] for x in r["rows"]], [x["predicted"] for x in r["rows"]], "o", label=_named(r))
    right.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    right.set(xlabel="measured, milliseconds", ylabel="predicted, milliseconds", title="random plans")
    left.legend()
    right.legend()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("cliffs", "predict", "budgets", "table", "plot"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--bits", type=int, default=FLOAT, choices=(FLOAT, 8))
    parser.add_argument("--out", type=Path, default=Path("docs/latency.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    {
        "predict": lambda: predict(options.depth, options.bits),
        "budgets": lambda: budgets(options.depth),
        "cliffs": cliffs,
        "table": table,
        "plot": lambda: plot(options.out),
    }[options.what]()


if __name__ == "__main__":
    main()
