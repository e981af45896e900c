"""Widths and bits in one plan against either alone and one after the other, at the same bytes; and the planner's time and gap.

    python -m benchmarks.joint measure      # repair, then 60 batches in float and 60 quantized: two minutes a plan; resumes
    python -m benchmarks.joint latency      # of the files that this leaves, against the original, in turns; leave the machine alone
    python -m benchmarks.joint planner      # time and gap to the exact plan against the number of groups
    python -m benchmarks.joint table

Bytes are those of the content of the packed file, as shares of the float model's.  ``prune, then bits`` cuts half of the parameters
first.  Recovery is the same for all: repair in closed form where channels went, so many batches in float, then as many quantized (what
is not quantized trains in float again), with the original as the teacher.  Accuracy is that of the ONNX file on the test images, which no
choice looks at.  Needs the data of the recipe ``cifar10``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import records
from benchmarks.networks import NETWORKS as NETS
from benchmarks.networks import labels, percent, predictions
from benchmarks.networks import original as original_file
from curvepress.bitplan import FLOAT, Multiplication, Wiring
from curvepress.costs import cost
from curvepress.curvature import Stop
from curvepress.export import compare_latency, to_onnx
from curvepress.export.integers import to_integer_onnx
from curvepress.plan import Plan, after, tensors_after
from curvepress.planner.alignment import Shape
from curvepress.planner.channels import at_most, search
from curvepress.planner.exactly import exact
from curvepress.planner.joint import Bitwidths, Exchange, Probe, choose, exchange_rates, family, joint_problem, search_jointly
from curvepress.planner.wiring import bits_of_plan, wiring
from curvepress.quantization.bitwidths import BitPrices, Price, bit_prices
from curvepress.quantization.quantized import Layout, Weight, calibrate, packed, quantize
from curvepress.repairing.sequential import repair
from curvepress.runs.artifacts import save
from curvepress.scores import LOSS_UNIT, Scores, score
from curvepress.structure import Group, Member, Structure, TensorSpec
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress.training.fitting import fit
from curvepress_recipes import cifar10 as recipe

FILE, MODELS = Path(__file__).parent / "results" / "joint.jsonl", Path("runs/benchmarks/joint")
SHARES = (1 / 4, 1 / 8, 1 / 12, 1 / 16)
METHODS = ("joint", "joint, exchanged", "prune", "bits", "prune, then bits")
SIZES = (2, 4, 8, 16, 100, 1000, 10_000)
EXACT = 100
"""Groups up to which the exact plan is looked for."""
TEMPERATURE = 4.0
"""Of the output curvature behind all prices."""
PROBED = 8
"""Calibration batches on which the loss is compared where rates of exchange are measured."""


@lru_cache
def priced(depth: int) -> tuple[nn.Module, Structure, Scores, BitPrices, Wiring]:
    """The network, its structure, and all prices, from calibration images; those of channels are what is left after repair."""
    model, x = recipe.model(depth=depth), recipe.example()
    structure = trace(model, x)
    given = {"temperature": TEMPERATURE}
    scores = score(model, recipe.loss, recipe.batches("calibration", seed=0), structure, method="reconstruction", samples=8, **given)
    prices = bit_prices(model, recipe.loss, recipe.batches("calibration", seed=0), x, stop=Stop(examples=512), **given)
    return model, structure, scores, prices, wiring(model, structure, x)


def planned(method: str, share: float, depth: int, batches: int) -> Plan:
    """The plan of a method for a share of the bytes.

    Raises:
        ValueError: if it has none so small.
    """
    _, structure, scores, prices, wired = priced(depth)
    limit = {"bytes": int(share * cost(Plan(structure)).bytes)}
    if method == "prune, then bits":
        first = search(structure, scores, at_most(params=0.5))
        bits = search_jointly(after(first), scores_of(after(first)), prices, wired, at_most(**limit), shape=Shape(whole=("*",))).plan.bits
        return Plan(structure, first.keep, bits=bits)
    given: dict[str, Any] = {
        "joint": {},
        "joint, exchanged": {"exchange": Exchange(**rates(depth, batches))} if method == "joint, exchanged" else {},
        "prune": {"bits": Bitwidths((FLOAT,))},
        "bits": {"shape": Shape(whole=("*",))},
    }[method]
    return search_jointly(structure, scores, prices, wired, at_most(**limit), **given).plan


def scores_of(structure: Structure) -> Scores:
    """None, for groups that stay as they are."""
    zeros = {g.name: np.zeros(g.size) for g in structure.free}
    return Scores(zeros, zeros, "none", LOSS_UNIT, 0, 0)


def rates(depth: int, batches: int) -> dict[str, float]:
    """Rates of exchange, measured: channels alone and bits alone, after the recovery that the plans get."""
    key = {"what": "rates", "depth": depth, "batches": batches}
    return dict(records.once(FILE, key, lambda: _rates(depth, batches))["rates"])


def _rates(depth: int, batches: int) -> records.Record:
    model, structure, scores, prices, wired = priced(depth)
    before, probes = _loss(model), []
    for kind, shares, given in (
        ("channels", (0.7, 0.4), {"bits": Bitwidths((FLOAT,))}),
        ("weights", (0.1, 0.08), {"shape": Shape(whole=("*",))}),
    ):
        found = family(joint_problem(structure, scores, prices, wired, **given))
        for share in shares:
            choice = choose(found, at_most(bytes=share))
            measured = _loss(made(choice.plan, depth, batches)) - before
            probes.append(Probe(kind, getattr(choice.predicted, kind), measured))
    return {"rates": vars(exchange_rates(probes)), "probes": [vars(p) for p in probes]}


def _loss(model: nn.Module) -> float:
    with torch.no_grad():
        return float(np.mean([recipe.loss(model.eval()(x), y).item() for x, y in islice(recipe.batches("calibration", seed=7), PROBED)]))


def made(plan: Plan, depth: int, batches: int, label: str = "") -> nn.Module:
    """The network of a plan after recovery; with a label its files are kept."""
    model, x = priced(depth)[0], recipe.example()
    small = apply(model, plan, x)
    if plan.keep:
        small = repair(small, model, recipe.batches("calibration", seed=0), plan).model
    small = _trained(small, model, batches, 0.01, 0).eval()
    quantized = _quantized(plan)
    if quantized:
        small = calibrate(quantize(small, bits_of_plan(plan), x), recipe.batches("calibration", seed=1), examples=512)
    small = _trained(small, model, batches, 0.004 if quantized else 0.01, 1).eval()
    if label:
        MODELS.mkdir(parents=True, exist_ok=True)
        (packed.save if quantized else save)(small, _file(label, "safetensors"))
        if quantized:
            to_integer_onnx(small, recipe.batches("validation"), _file(label, "onnx"))
        else:
            to_onnx(small, x, _file(label, "onnx"))
    return small


def _quantized(plan: Plan) -> bool:
    return plan.bits is not None and any(plan.bits.weights.values())


def _file(label: str, kind: str) -> Path:
    return MODELS / f"{label}.{kind}"


def _trained(model: nn.Module, teacher: nn.Module, batches: int, lr: float, seed: int) -> nn.Module:
    if not batches:
        return model
    some = lambda n: list(islice(recipe.batches("train", seed=n), batches))  # noqa: E731
    return fit(model, recipe.loss, some, epochs=1, lr=lr, seed=seed, teacher=teacher, distill_weight=0.9, clip_norm=1.0).model


def measure(depth: int, shares: list[float], methods: list[str], batches: int) -> None:
    """Measure whatever has no record yet."""
    for share in shares:
        for method in methods:
            key = {"depth": depth, "method": method, "share": round(share, 4), "batches": batches, "seed": 0}
            print(records.once(FILE, key, lambda s=share, m=method: _measured(m, s, depth, batches)), flush=True)


def _measured(method: str, share: float, depth: int, batches: int) -> records.Record:
    start = time.process_time()
    try:
        plan = planned(method, share, depth, batches)
    except ValueError as reason:
        return {"impossible": str(reason)}
    label = f"resnet{depth}-{method}-{share:.4f}-{batches}".replace(", ", "-").replace(" ", "-")
    made(plan, depth, batches, label)
    net, found = NETS[f"ResNet-{depth}"], cost(plan)
    bits, sizes = plan.bits.weights if plan.bits else {}, {n: prod(t.shape) for n, t in tensors_after(plan).items()}
    return {
        "accuracy": percent(predictions(net, _file(label, "onnx")) == labels(net)), **found.known(),
        "file": _file(label, "safetensors").stat().st_size, "onnx": _file(label, "onnx").name,
        "mean_bits": sum(sizes[n] * (b or FLOAT) for n, b in bits.items()) / sum(sizes[n] for n in bits) if _quantized(plan) else None,
        "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def latency(depth: int) -> None:
    """Ratios to the original of all files, measured in turns."""
    rows = [r for r in records.read(FILE) if r.get("depth") == depth and "onnx" in r and (MODELS / r["onnx"]).exists()]
    for name in (r["onnx"] for r in rows):
        key = {"what": "latency", "onnx": name}
        print(records.once(FILE, key, lambda n=name: _latency(depth, n)), flush=True)


def _latency(depth: int, name: str) -> records.Record:
    paths = {"original": original_file(f"ResNet-{depth}"), "small": MODELS / name}
    timings = [t for t in compare_latency(paths, recipe.example().numpy(), seconds=8.0) if t.name == "small"]
    return {f"batch {t.batch}": [t.ratio.low, t.ratio.median, t.ratio.high] for t in timings}


def planner(sizes: list[int]) -> None:
    """Time of the planner, and how far from the exact plan it is, on chains of layers drawn at random."""
    for n in sizes:
        for share in (0.2, 0.1, 0.06):
            for seed in range(3 if n <= EXACT else 1):
                key = {"what": "planner", "groups": n, "share": share, "seed": seed}
                print(records.once(FILE, key, lambda n=n, share=share, seed=seed: _planner(n, share, seed)), flush=True)


def _planner(n: int, share: float, seed: int) -> records.Record:
    given, start = synthetic(n, seed), time.process_time()
    problem = joint_problem(*given, bits=Bitwidths((2, 4, 8)), shape=Shape(multiple=4))
    found = choose(family(problem), at_most(bytes=share))
    record: records.Record = {"cpu_seconds": time.process_time() - start, "rise": found.predicted.rise}
    if n <= EXACT:
        start = time.process_time()
        best = exact(problem, {"bytes": share * cost(Plan(given[0])).bytes}, seconds=60)
        record |= {"exact": best.rise, "bound": best.bound, "exact_cpu_seconds": time.process_time() - start}
    return record


def synthetic(n: int, seed: int = 0, width: int = 16) -> tuple[Structure, Scores, BitPrices, Wiring]:
    """A chain of ``n + 1`` convolutions with ``n`` groups between them; prices over several orders of magnitude."""
    rng, names = np.random.default_rng(seed), [f"w{i}" for i in range(n + 1)]
    shapes = [((width if i < n else 10), (width if i else 3), 3, 3) for i in range(n + 1)]
    tensors = {w: TensorSpec(s, "float32", "parameter", int(rng.integers(1, 64))) for w, s in zip(names, shapes, strict=True)}
    rows = np.arange(width)[:, None]
    groups = tuple(
        Group(f"g{i}", width, "channel", (Member(names[i], 0, rows, "out"), Member(names[i + 1], 1, rows, "in"))) for i in range(n)
    )
    values = {g.name: 10 ** rng.uniform(-3, 0) * rng.lognormal(0, 1, width) for g in groups}
    steep = {w: 10 ** rng.uniform(-1, 1.5) for w in names}
    prices = {w: {b: Price(steep[w] * 4.0**-b, 0.0) for b in (2, 4, 8)} for w in names}
    wired = Wiring(tuple(Multiplication(w, tensors[w].positions, (w, "")) for w in names), dict.fromkeys(names, 0))
    scores = Scores(values, {g: np.zeros(width) for g in values}, "drawn", LOSS_UNIT, 2, seed)
    return Structure(tensors, groups), scores, BitPrices(_layout(names, tensors), prices, {}), wired


def _layout(names: list[str], tensors: dict[str, TensorSpec]) -> Layout:
    return Layout(tuple(Weight(w, tensors[w].shape, 0, 0) for w in names), (), ())


def table() -> None:
    """Print the tables in Markdown."""
    rows = records.read(FILE)
    for line in _accuracy_table([r for r in rows if "method" in r]):
        print(line)
    for r in (r for r in rows if r.get("what") == "rates"):
        probes = "; ".join(f"{p['kind']} {p['predicted']:.3g} predicted, {p['measured']:.3g} measured" for p in r["probes"])
        print(f"\nRates of exchange after {r['batches']} batches: {', '.join(f'{k} {v:.3g}' for k, v in r['rates'].items())} ({probes}).")
    print("\n| groups | bytes | planner, CPU s | gap to exact, median | largest | exact, CPU s |\n|---|---|---|---|---|---|")
    for n in SIZES:
        for share in (0.2, 0.1, 0.06):
            own = [r for r in rows if r.get("what") == "planner" and (r["groups"], r["share"]) == (n, share)]
            if own:
                gaps = [r["rise"] / r["bound"] - 1 for r in own if r.get("bound")]
                shown = (
                    [f"{np.median(gaps):.1%}", f"{max(gaps):.1%}", f"{np.median([r['exact_cpu_seconds'] for r in own]):.1f}"]
                    if gaps
                    else ["–"] * 3
                )
                print(f"| {n:,} | {share:.0%} | {np.median([r['cpu_seconds'] for r in own]):.2f} | {' | '.join(shown)} |")


def _accuracy_table(rows: list[records.Record]) -> Iterator[str]:
    times = {r["onnx"]: r for r in records.read(FILE) if r.get("what") == "latency"}
    yield "| network | bytes | plan | test accuracy | bytes of the file | mean bits | parameters | G BOPs | latency, batch 1 | batch 64 |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in sorted(rows, key=lambda r: (r["depth"], r["batches"], -r["share"], METHODS.index(r["method"]))):
        head = f"| ResNet-{r['depth']} | 1/{1 / r['share']:.0f} | {r['method']} |"
        if "impossible" in r:
            yield f"{head} none so small | | | | | | |"
            continue
        bits = f"{r['mean_bits']:.2f}" if r["mean_bits"] else "32"
        taken = [f"{times[r['onnx']][f'batch {n}'][1]:.2f}" if r["onnx"] in times else "–" for n in (1, 64)]
        yield f"{head} {r['accuracy']:.2f} | {r['file']:,} | {bits} | {r['params']:,} | {r['bops'] / 1e9:.2f} | {' | '.join(taken)} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "latency", "planner", "table"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.what == "measure":
        measure(o.depth, o.shares, o.methods, o.batches)
    elif o.what == "latency":
        latency(o.depth)
    elif o.what == "planner":
        planner(o.sizes)
    else:
        table()


if __name__ == "__main__":
    main()
