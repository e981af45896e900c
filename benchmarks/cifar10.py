"""CIFAR-10: accuracy after pruning and after the same fine-tunes, for every score and for Torch-Pruning.

    python -m benchmarks.cifar10 measure --depth 20 --seeds 0 1 --shares 0.5 0.3     # resumes; hours on one core
    python -m benchmarks.cifar10 latency                                            # minutes; leave the machine alone
    python -m benchmarks.cifar10 widths                                             # a minute, likewise
    python -m benchmarks.cifar10 table                                              # prints the README's table

Figures are of the test images, which no choice looks at.  The budget is a share of the parameters; multiply-accumulates and
latency are what comes with it.  Needs the data of the recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks import peer, records
from curvepress.costs import cost
from curvepress.export import compare_latency, to_onnx
from curvepress.plan import Plan
from curvepress.planner.channels import at_most, search
from curvepress.repairing.sequential import repair
from curvepress.scores import score
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress.training.batchnorm import reestimate
from curvepress.training.fitting import fit
from curvepress_recipes import cifar10 as recipe

HERE = Path(__file__).parent / "results"
FILE, MODELS = HERE / "cifar10.jsonl", Path("runs/benchmarks/cifar10")
METHODS = (
    "random",
    "magnitude",
    "taylor",
    "hessian_trace",
    "mask_curvature",
    "reconstruction",
    "mask_curvature, repaired",
    "reconstruction, repaired",
    "reconstruction per parameter, repaired",
    "reconstruction, repaired, distilled",
    "reconstruction per parameter, repaired, distilled",
)
HOW = {
    "hessian_trace": {"estimator": "hessian"},
    "reconstruction": {"temperature": 4.0, "samples": 16},
}
"""HAP's score is measured with HAP's estimator, Hutchinson's probes of the true Hessian."""
REPAIRED, DISTILLED, PER = ", repaired", ", distilled", " per parameter"
"""Layers refitted in closed form on calibration images before the fine-tune; the original as its teacher; worth by parameters saved."""
PEER = "torch-pruning"
EPOCHS = (0, 1, 3)
SAMPLES, PROBES = 48, 2
MULTIPLES = (1, 4, 8, 16)


def measure(depth: int, seeds: list[int], shares: list[float], methods: list[str], epochs: list[int]) -> None:
    """Prune, re-estimate, fine-tune and test whatever has no record yet."""
    model = recipe.model(depth=depth)
    records.once(FILE, {"depth": depth, "method": "original"}, lambda: _tested(model) | _sizes(model))
    if PEER in methods:
        note = {"depth": depth, "method": PEER, "whole_network": True}
        print(records.once(FILE, note, lambda: {"failure": peer.failure(model, recipe.example())})["failure"])
    for seed in seeds:
        for share in shares:
            for method in methods:
                key = {"depth": depth, "seed": seed, "share": share, "method": method}
                missing = [e for e in epochs if not _done({**key, "epochs": e})]
                if missing:
                    _row(model, key, missing)


def _done(key: dict[str, Any]) -> bool:
    return any(all(r.get(k) == v for k, v in key.items()) for r in records.read(FILE))


def _row(model: nn.Module, key: dict[str, Any], missing: list[int]) -> None:
    start = time.process_time()
    small, plan = _smaller(model, key)
    path = MODELS / f"resnet{key['depth']}-{key['method']}-{key['share']}-{key['seed']}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    to_onnx(small, recipe.example(), path)
    small = reestimate(small, recipe.batches("calibration", seed=key["seed"]), examples=2048)
    if REPAIRED in key["method"]:
        small = repair(small, model, recipe.batches("calibration", seed=key["seed"]), plan).model
    spent = {"prune_cpu_seconds": time.process_time() - start}
    for epochs in missing:
        record = records.once(FILE, {**key, "epochs": epochs}, lambda epochs=epochs: _tuned(small, key, epochs) | _sizes(small) | spent)
        print({k: record[k] for k in ("depth", "seed", "share", "method", "epochs", "accuracy", "params", "macs")}, flush=True)


def _smaller(model: nn.Module, key: dict[str, Any]) -> tuple[nn.Module, Plan | None]:
    example = recipe.example()
    if key["method"] == PEER:
        return peer.prune(model, example, key["share"]), None
    structure, method = trace(model, example), key["method"].partition(",")[0].removesuffix(PER)
    batches = recipe.batches("calibration", seed=key["seed"])
    how = {"method": method, "samples": SAMPLES, "probes": PROBES, "seed": key["seed"]} | HOW.get(method, {})
    scores, per = score(model, recipe.loss, batches, structure, **how), "params" if PER in key["method"] else "channel"
    plan = search(structure, scores, at_most(params=key["share"]), per=per)
    return apply(model, plan, example), plan


def _tuned(small: nn.Module, key: dict[str, Any], epochs: int) -> dict[str, Any]:
    start, teacher = time.process_time(), recipe.model(depth=key["depth"]) if DISTILLED in key["method"] else None
    if epochs:
        how = {"lr": 0.01, "weight_decay": 1e-4, "precision": "bfloat16", "seed": key["seed"], "teacher": teacher}
        small = fit(small, recipe.loss, partial(recipe.batches, "train"), epochs=epochs, **how).model
    return _tested(small) | {"tune_cpu_seconds": time.process_time() - start}


def _tested(model: nn.Module) -> dict[str, float]:
    return recipe.evaluate(model, "test")


def _sizes(model: nn.Module) -> dict[str, int]:
    return vars(cost(Plan(trace(model, recipe.example()))))


def latency() -> None:
    """Every exported network against the original of its depth, interleaved in one process, on one thread."""
    for path in sorted(MODELS.glob("resnet*-*-*-*.onnx")):
        depth = path.name.partition("-")[0]
        original = MODELS / f"{depth}.onnx"
        if not original.exists():
            to_onnx(recipe.model(depth=int(depth.removeprefix("resnet"))), recipe.example(), original)
        records.once(HERE / "cifar10_latency.jsonl", {"model": path.stem}, partial(_raced, original, path))
        print(path.stem, flush=True)


def _raced(original: Path, small: Path) -> dict[str, Any]:
    timings = compare_latency({"original": original, "small": small}, recipe.example().numpy(), seconds=6.0)
    return {f"batch{t.batch}": t.ratio.median for t in timings if t.name == "small"} | {
        f"batch{t.batch}_quartiles": [t.ratio.low, t.ratio.high] for t in timings if t.name == "small"
    }


def widths() -> None:
    """Latency of ResNet-20 at half its parameters, with widths held to multiples: not trained, for time only."""
    model, example, folder = recipe.model(), recipe.example(), MODELS / "widths"
    structure = trace(model, example)
    scores = score(model, recipe.loss, recipe.batches("calibration"), structure, method="taylor", samples=16)
    plans = {m: search(structure, scores, at_most(params=0.5), per="channel", multiple=m) for m in MULTIPLES}
    paths = {m: folder / f"{m}.onnx" for m in (0, *MULTIPLES)}
    folder.mkdir(parents=True, exist_ok=True)
    for m, path in paths.items():
        to_onnx(apply(model, plans[m], example) if m else model, example, path)
    for t in compare_latency({str(m): p for m, p in paths.items()}, example.numpy(), seconds=30.0):
        key = {"multiple": int(t.name), "batch": t.batch}
        ratio = {"ratio": t.ratio.median, "low": t.ratio.low, "high": t.ratio.high, "milliseconds": t.wall.median}
        costs = vars(cost(plans[int(t.name)] if int(t.name) else Plan(structure)))
        records.once(HERE / "cifar10_widths.jsonl", key, lambda ratio=ratio, costs=costs: ratio | costs)
    print("| widths in multiples of | parameters | MACs | latency, batch 1 | batch 64 |\n|---|---|---|---|---|")
    rows = {(r["multiple"], r["batch"]): r for r in records.read(HERE / "cifar10_widths.jsonl")}
    for m in MULTIPLES:
        one, many, whole = rows[m, 1], rows[m, 64], rows[0, 1]
        params, macs = (one[k] / whole[k] for k in ("params", "macs"))
        print(f"| {m} | {params:.1%} | {macs:.2f} | {one['ratio']:.2f} | {many['ratio']:.2f} |")


def table() -> None:
    """Print the table in Markdown: means over seeds, and half the spread where there are several."""
    rows = records.read(FILE)
    speeds = {r["model"]: r for r in records.read(HERE / "cifar10_latency.jsonl")}
    for depth in sorted({r["depth"] for r in rows}):
        own = [r for r in rows if r["depth"] == depth and "share" in r]
        whole = next(r for r in rows if r["depth"] == depth and r["method"] == "original")
        sizes = f"{whole['params']:,} parameters, {whole['macs'] / 1e6:.1f} M multiply-accumulates"
        print(f"\nResNet-{depth}: {whole['accuracy']:.2f} %, {sizes}\n")
        epochs = sorted({r["epochs"] for r in own})
        heads = ["after pruning" if not e else "1 epoch" if e == 1 else f"{e} epochs" for e in epochs]
        columns = ("parameters", "score", "seeds", *heads, "MACs", "latency, batch 1", "batch 64")
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for share, method in sorted({(r["share"], r["method"]) for r in own}, key=lambda k: (-k[0], _order(k[1]))):
            print(_line([r for r in own if (r["share"], r["method"]) == (share, method)], epochs, whole, speeds))


def _order(method: str) -> int:
    return (*METHODS, PEER).index(method)


def _line(rows: list[records.Record], epochs: list[int], whole: records.Record, speeds: dict[str, records.Record]) -> str:
    first, seeds = rows[0], sorted({r["seed"] for r in rows})
    accuracies = [spread([r["accuracy"] for r in rows if r["epochs"] == e]) for e in epochs]
    raced = [speeds.get(f"resnet{first['depth']}-{first['method']}-{first['share']}-{s}") for s in seeds]
    times = [spread([r[f"batch{b}"] for r in raced if r], "{:.2f}") for b in (1, 64)]
    macs = mean(r["macs"] for r in rows) / whole["macs"]
    params = mean(r["params"] for r in rows) / whole["params"]
    return " | ".join(["", f"{params:.1%}", first["method"], str(len(seeds)), *accuracies, f"{macs:.2f}", *times, ""]).strip()


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The mean, and half the spread where there are several."""
    if not values:
        return "–"
    half = (max(values) - min(values)) / 2
    return form.format(mean(values)) + (f" ± {form.format(half)}" if len(values) > 1 else "")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "latency", "widths", "table"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, PEER])
    parser.add_argument("--epochs", type=int, nargs="+", default=list(EPOCHS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "measure":
        measure(options.depth, options.seeds, options.shares, options.methods, options.epochs)
    else:
        {"latency": latency, "widths": widths, "table": table}[options.what]()


if __name__ == "__main__":
    main()
