"""What bits chosen by curvature are worth: mixed against uniform bits of the same bytes, prices, and rounding.

    python -m benchmarks.bits measure                                                   # half an hour on one core; resumes
    python -m benchmarks.bits measure --networks ResNet-56 --averages 3 --roundings nearest
    python -m benchmarks.bits table

Weights have 2 to 8 bits, activations 8, nothing is trained: accuracy is that of the simulation on the test images, which no choice
looks at; prices and ranges come from training images.  ``reversed`` gives every layer the price per element of its opposite in the order
of prices per element, which is what a wrong sensitivity does.  Needs the data of the recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.networks import MODELS, NETWORKS
from curvepress.curvature import Stop
from curvepress.files import write_text
from curvepress.quantization.allocation import Allocation, allocate, uniform
from curvepress.quantization.bitwidths import BitPrices, Price, bit_prices, prices_from_dict, prices_to_dict
from curvepress.quantization.quantized import calibrate, observe, quantize
from curvepress.quantization.requantization import requantize

FILE = Path(__file__).parent / "results" / "bits.jsonl"
AVERAGES = (3, 2.5, 4)
PRICED = {
    "direction": ("direction", 1.0, "nearest"),
    "trace": ("trace", 1.0, "nearest"),
    "direction, temperature 4": ("direction", 4.0, "nearest"),
    "trace, temperature 4": ("trace", 4.0, "nearest"),
    "direction, compensated": ("direction", 1.0, "compensated"),
    "direction, compensated, temperature 4": ("direction", 4.0, "compensated"),
}
"""Curvature of weights, temperature, and the rounding whose error is priced."""
ROUNDINGS = ("nearest", "adaptive", "compensated")
EXAMPLES = 512


def measure(networks: list[str], averages: list[float], roundings: list[str], choices: list[str]) -> None:
    """Measure every combination that has no record yet."""
    torch.set_num_threads(1)
    for network, average, rounding, how in product(networks, averages, roundings, choices):
        if how != "uniform" or average == int(average):
            key = {"network": network, "average": average, "rounding": rounding, "bits": how}
            print(records.once(FILE, key, lambda key=key: measured(**key)), flush=True)


def measured(network: str, average: float, rounding: str, bits: str) -> records.Record:
    """Accuracy on the test images, what was predicted, and what was chosen."""
    found, of = choice(network, average, bits), NETWORKS[network]
    module = quantize(of.model(), found.bits, of.recipe.example())
    seen = observe(module, of.calibration(1), examples=EXAMPLES)
    calibrate(module, seen)
    requantize(module, of.calibration(1), method=rounding)
    calibrate(module, seen)
    chosen = list(found.bits.weights.values())
    return {
        **of.recipe.evaluate(module.eval(), "test"),
        "predicted": found.rise,
        "bytes": found.bytes,
        "average_bits": found.average,
        "chosen": chosen,
    }


def choice(network: str, average: float, bits: str) -> Allocation:
    """The bits, within the bytes that uniform bits take."""
    found = prices(network, bits if bits in PRICED else "direction")
    if bits == "uniform":
        return uniform(found, int(average))
    budget = int(sum(w.size for w in found.layout.weights) * average / 8)
    return allocate(reversed_prices(found) if bits == "reversed" else found, bytes=budget)


@lru_cache
def prices(network: str, how: str) -> BitPrices:
    """Prices from calibration images, made once and kept beside the models."""
    (price, temperature, rounding), of, path = PRICED[how], NETWORKS[network], MODELS / f"{network}-prices-{how.replace(' ', '-')}.json"
    if not path.exists():
        options = {"price": price, "temperature": temperature, "rounding": rounding, "stop": Stop(examples=EXAMPLES)}
        found = bit_prices(of.model(), of.recipe.loss, of.calibration(0), of.recipe.example(), **options)
        write_text(path, json.dumps(prices_to_dict(found)))
    return prices_from_dict(json.loads(path.read_text()))


def reversed_prices(given: BitPrices) -> BitPrices:
    """Every weight with the prices per element of its opposite."""
    sizes = {w.name: w.size for w in given.layout.weights}
    order = sorted(given.weights, key=lambda n: given.weights[n][4].rise / sizes[n])
    weights = {
        name: {b: Price(p.rise * sizes[name] / sizes[other], p.stderr) for b, p in given.weights[other].items()}
        for name, other in zip(order, reversed(order), strict=True)
    }
    return BitPrices(given.layout, {n: weights[n] for n in given.weights}, given.sites, given.detail)


def table() -> None:
    """Print the table in Markdown."""
    rows = {(r["network"], r["average"], r["bits"], r["rounding"]): r for r in records.read(FILE)}
    print(f"| network | mean bits | chosen by | {' | '.join(ROUNDINGS)} |\n|---|---|---|{'---|' * len(ROUNDINGS)}")
    for network, average, how in product(NETWORKS, sorted(AVERAGES, reverse=True), ("uniform", *PRICED, "reversed")):
        found = [rows.get((network, average, how, rounding)) for rounding in ROUNDINGS]
        accuracies = ["–" if r is None else f"{r['accuracy']:.2f}" for r in found]
        if any(found):
            print(f"| {network} | {average:g} | {how} | {' | '.join(accuracies)} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("--networks", nargs="+", default=["ResNet-20"], choices=NETWORKS)
    parser.add_argument("--averages", nargs="+", type=float, default=[*AVERAGES])
    parser.add_argument("--roundings", nargs="+", default=[*ROUNDINGS], choices=ROUNDINGS)
    parser.add_argument("--choices", nargs="+", default=["uniform", *PRICED, "reversed"])
    o = parser.parse_args()
    return table() if o.what == "table" else measure(o.networks, o.averages, o.roundings, o.choices)


if __name__ == "__main__":
    main()
