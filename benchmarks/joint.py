"""Widths and bits in one plan against either alone and one after the other, at the same bytes; and the planner's time and gap.

    python -m benchmarks.joint measure --networks ResNet-20 MiniLM    # repair, then 60 batches in float and 60 quantized; resumes
    python -m benchmarks.joint latency      # of the files that this leaves, against the original, in turns; leave the machine alone
    python -m benchmarks.joint planner      # time and gap to the exact plan against the number of groups
    python -m benchmarks.joint table

Bytes are those of the content of the packed file, as shares of the float model's.  ``prune, then bits`` cuts half of the parameters
first, and ``none`` is the whole network in float.  Recovery is the same for all plans of a network: repair in closed form where channels
went, so many batches in float, then as many quantized (what is not quantized trains in float again), with the original as the teacher.
Without batches, weights are rounded by the output error instead.  EfficientNet-Lite0 tells a thousand classes and there are training images
of ten only: by default it gets no batches, and ``--methods none --batches 60`` shows what they do to the whole network.  Accuracy is
that of the ONNX file on the test examples, which no choice looks at.  Needs the data of the recipes ``cifar10``, ``imagenette`` and
``sst2`` (``CURVEPRESS_DATA``, ``CURVEPRESS_CACHE``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import records
from benchmarks.joint_planner import SIZES, planner
from benchmarks.joint_table import BATCHES, table
from benchmarks.networks import NETWORKS, Network, arrays, labels, original, percent, predictions
from benchmarks.transformers_models import TEXT
from curvepress.bitplan import FLOAT, Wiring
from curvepress.costs import cost
from curvepress.curvature import Stop
from curvepress.export import compare_latency, to_onnx
from curvepress.export.integers import to_integer_onnx
from curvepress.objective import batch_loss
from curvepress.plan import Plan, after, tensors_after
from curvepress.planner.alignment import Shape
from curvepress.planner.channels import at_most, search
from curvepress.planner.joint import Bitwidths, Exchange, Probe, choose, exchange_rates, family, joint_problem, search_jointly
from curvepress.planner.wiring import bits_of_plan, wiring
from curvepress.quantization.bitwidths import BitPrices, bit_prices
from curvepress.quantization.quantized import calibrate, observe, packed, quantize
from curvepress.quantization.requantization import requantize
from curvepress.repairing.sequential import repair
from curvepress.runs.artifacts import save
from curvepress.scores import LOSS_UNIT, Scores, score
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress.training.fitting import fit

FILE, MODELS = Path(__file__).parent / "results" / "joint.jsonl", Path("runs/benchmarks/joint")
SHARES = (1 / 4, 1 / 8, 1 / 12, 1 / 16)
METHODS = ("none", "joint", "joint, exchanged", "prune", "bits", "prune, then bits")
CORNERS = (1 / 8, 1 / 12), ("none", "joint", "prune", "bits", "prune, then bits")
"""Shares and methods of all but ResNet-20, where none are given."""
TEMPERATURE = 4.0
"""Of the output curvature behind all prices."""
SCORES = {"MiniLM": "mask_curvature"}
"""The scores of channels that are not ``reconstruction``: what measures better on transformers (docs/transformers.md)."""
UNTRAINED = ("EfficientNet-Lite0",)
"""Networks without training data of all their classes."""
EXAMPLES = 512
"""Calibration examples behind the prices of bits and the ranges of activations."""
ROUNDED = 128
"""Those behind rounding by the output error, which runs the network on them once a weight."""
LEAST_SAME = 95.0
"""Percent of predictions in which runtime and simulation must agree; figures are of the runtime, and this is in their records."""
PROBED = 8
"""Calibration batches on which the loss is compared where rates of exchange are measured."""


@lru_cache
def priced(network: str) -> tuple[nn.Module, Structure, Scores, BitPrices, Wiring]:
    """The network, its structure, and all prices, from calibration examples; those of channels are what is left after repair, but for
    :data:`SCORES`."""
    net, given = NETWORKS[network], {"temperature": TEMPERATURE}
    model, x = net.model(), net.recipe.example()
    structure = trace(model, x)
    method, samples = SCORES.get(network, "reconstruction"), max(8, EXAMPLES // net.training)
    scores = score(model, net.recipe.loss, net.calibration(0), structure, method=method, samples=samples, **given)
    prices = bit_prices(model, net.recipe.loss, net.calibration(0), x, stop=Stop(examples=EXAMPLES), **given)
    return model, structure, scores, prices, wiring(model, structure, x)


def planned(method: str, share: float, network: str, batches: int) -> Plan:
    """The plan of a method for a share of the bytes.

    Raises:
        ValueError: if it has none so small.
    """
    _, structure, scores, prices, wired = priced(network)
    limit = {"bytes": int(share * cost(Plan(structure)).bytes)}
    if method == "none":
        return Plan(structure)
    if method == "prune, then bits":
        first = search(structure, scores, at_most(params=0.5), per="channel")
        bits = search_jointly(after(first), scores_of(after(first)), prices, wired, at_most(**limit), shape=Shape(whole=("*",))).plan.bits
        return Plan(structure, first.keep, bits=bits)
    given: dict[str, Any] = {
        "joint": {},
        "joint, exchanged": {"exchange": Exchange(**rates(network, batches))} if method == "joint, exchanged" else {},
        "prune": {"bits": Bitwidths((FLOAT,))},
        "bits": {"shape": Shape(whole=("*",))},
    }[method]
    return search_jointly(structure, scores, prices, wired, at_most(**limit), **given).plan


def scores_of(structure: Structure) -> Scores:
    """None, for groups that stay as they are."""
    zeros = {g.name: np.zeros(g.size) for g in structure.free}
    return Scores(zeros, zeros, "none", LOSS_UNIT, 0, 0)


def rates(network: str, batches: int) -> dict[str, float]:
    """Rates of exchange, measured: channels alone and bits alone, after the recovery that the plans get."""
    key = {"what": "rates", "network": network, "batches": batches}
    return dict(records.once(FILE, key, lambda: _rates(network, batches))["rates"])


def _rates(network: str, batches: int) -> records.Record:
    model, structure, scores, prices, wired = priced(network)
    before, probes = _loss(model, network), []
    for kind, shares, given in (
        ("channels", (0.7, 0.4), {"bits": Bitwidths((FLOAT,))}),
        ("weights", (0.1, 0.08), {"shape": Shape(whole=("*",))}),
    ):
        found = family(joint_problem(structure, scores, prices, wired, **given))
        for share in shares:
            choice = choose(found, at_most(bytes=share))
            measured = _loss(made(choice.plan, network, batches), network) - before
            probes.append(Probe(kind, getattr(choice.predicted, kind), measured))
    return {"rates": vars(exchange_rates(probes)), "probes": [vars(p) for p in probes]}


def _loss(model: nn.Module, network: str) -> float:
    net = NETWORKS[network]
    with torch.no_grad():
        return float(np.mean([batch_loss(model.eval(), net.recipe.loss, b).item() for b in islice(net.calibration(7), PROBED)]))


def made(plan: Plan, network: str, batches: int) -> nn.Module:
    """The network of a plan after recovery."""
    net, model = NETWORKS[network], priced(network)[0]
    small = apply(model, plan, net.recipe.example())
    if plan.keep:
        small = repair(small, model, net.calibration(0), plan).model
    small = _trained(small, network, batches, 0.01, 0).eval()
    if quantized := _quantized(plan):
        small = _rounded(small, plan, net, adaptive=not batches)
    return _trained(small, network, batches, 0.004 if quantized else 0.01, 1).eval()


def _written(small: nn.Module, plan: Plan, network: str, label: str) -> float | None:
    """Its files are kept; for integers comes back for how many percent of examples the runtime predicts what the simulation does."""
    recipe = NETWORKS[network].recipe
    MODELS.mkdir(parents=True, exist_ok=True)
    if not _quantized(plan):
        save(small, _file(label, "safetensors"))
        to_onnx(small, recipe.example(), _file(label, "onnx"))
        return None
    packed.save(small, _file(label, "safetensors"))
    return to_integer_onnx(small, recipe.batches("validation"), _file(label, "onnx"), least_same=LEAST_SAME).same


def _rounded(small: nn.Module, plan: Plan, net: Network, *, adaptive: bool) -> nn.Module:
    """On grids; weights rounded to the nearest, or by the output error."""
    module = quantize(small, bits_of_plan(plan), net.recipe.example())
    seen = observe(module, net.calibration(1), examples=EXAMPLES)
    calibrate(module, seen)
    if adaptive:
        requantize(module, net.calibration(1), examples=ROUNDED)
        calibrate(module, seen)
    return module


def _quantized(plan: Plan) -> bool:
    return plan.bits is not None and any(plan.bits.weights.values())


def _file(label: str, kind: str) -> Path:
    return MODELS / f"{label}.{kind}"


def _trained(model: nn.Module, network: str, batches: int, lr: float, seed: int) -> nn.Module:
    net = NETWORKS[network]
    if not batches:
        return model
    some = lambda n: list(islice(net.train(n), batches))  # noqa: E731
    settings = {"lr": lr, "teacher": priced(network)[0], "distill_weight": 0.9, "clip_norm": 1.0, **net.descent}
    return fit(model, net.recipe.loss, some, epochs=1, seed=seed, **settings).model


def measure(network: str, shares: Sequence[float], methods: Sequence[str], batches: int) -> None:
    """Measure whatever has no record yet."""
    for share, method in dict.fromkeys((1.0 if m == "none" else s, m) for s in shares for m in methods):
        key = {"network": network, "method": method, "share": round(share, 4), "batches": batches, "seed": 0}
        print(records.once(FILE, key, lambda s=share, m=method: _measured(m, s, network, batches)), flush=True)


def _measured(method: str, share: float, network: str, batches: int) -> records.Record:
    start = time.process_time()
    try:
        plan = planned(method, share, network, batches)
    except ValueError as reason:
        return {"impossible": str(reason)}
    label = f"{network.lower().replace('-', '')}-{method}-{share:.4f}-{batches}".replace(", ", "-").replace(" ", "-")
    same = _written(made(plan, network, batches), plan, network, label)
    net, found = NETWORKS[network], cost(plan)
    bits, sizes = plan.bits.weights if plan.bits else {}, {n: prod(t.shape) for n, t in tensors_after(plan).items()}
    return {
        "accuracy": percent(predictions(net, _file(label, "onnx")) == labels(net)), **found.known(),
        "file": _file(label, "safetensors").stat().st_size, "onnx": _file(label, "onnx").name,
        "mean_bits": sum(sizes[n] * (b or FLOAT) for n, b in bits.items()) / sum(sizes[n] for n in bits) if _quantized(plan) else None,
        "same": same, "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def latency(network: str) -> None:
    """Ratios to the original of all files, measured in turns."""
    rows = [r for r in records.read(FILE) if r.get("network") == network and "onnx" in r and (MODELS / r["onnx"]).exists()]
    for name in (r["onnx"] for r in rows):
        key = {"what": "latency", "onnx": name}
        print(records.once(FILE, key, lambda n=name: _latency(network, n)), flush=True)


def _latency(network: str, name: str) -> records.Record:
    paths = {"original": original(network), "small": MODELS / name}
    timings = [t for t in compare_latency(paths, arrays(_timed(network)), seconds=8.0) if t.name == "small"]
    return {f"batch {t.batch}": [t.ratio.low, t.ratio.median, t.ratio.high] for t in timings}


def _timed(network: str) -> Any:
    """Noise, or a sentence of middling length."""
    return TEXT.timed() if network == "MiniLM" else NETWORKS[network].recipe.example()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "latency", "planner", "table"))
    parser.add_argument("--networks", nargs="+", default=["ResNet-20"], choices=NETWORKS)
    parser.add_argument("--shares", type=float, nargs="+", help="1/4, 1/8, 1/12, 1/16 where not given; 1/8, 1/12 for all but ResNet-20")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all where not given; without exchange for all but ResNet-20")
    parser.add_argument("--batches", type=int, help=f"{BATCHES} where not given, and 0 for {', '.join(UNTRAINED)}")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.what == "planner":
        return planner(FILE, o.sizes)
    if o.what == "table":
        return table(records.read(FILE), METHODS)
    for network in o.networks:
        if o.what == "latency":
            latency(network)
        else:
            shares, methods = (SHARES, METHODS) if network == "ResNet-20" else CORNERS
            usual = 0 if network in UNTRAINED else BATCHES
            measure(network, o.shares or shares, o.methods or methods, usual if o.batches is None else o.batches)
    return None


if __name__ == "__main__":
    main()
