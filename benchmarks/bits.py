"""What bits chosen by curvature are worth on ResNet-20: mixed against uniform bits of the same bytes, prices, and rounding.

    python -m benchmarks.bits measure      # half an hour on one core; resumes
    python -m benchmarks.bits table

Weights have 2 to 8 bits, activations 8, nothing is trained: accuracy is that of the simulation on the test images, which no choice
looks at; prices and ranges come from training images.  ``reversed`` gives every layer the price per element of its opposite in the order
of prices per element, which is what a wrong sensitivity does.  Needs the data of the recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks import records
from curvepress.allocation import Allocation, allocate, uniform
from curvepress.bitwidths import BitPrices, Price, bit_prices
from curvepress.curvature import Stop
from curvepress.quantized import calibrate, observe, quantize
from curvepress.requantization import requantize
from curvepress_recipes import cifar10 as recipe

FILE = Path(__file__).parent / "results" / "bits.jsonl"
AVERAGES = (3, 2.5, 4)
PRICED = {
    "direction": ("direction", 1.0),
    "trace": ("trace", 1.0),
    "direction, temperature 4": ("direction", 4.0),
    "trace, temperature 4": ("trace", 4.0),
}
ROUNDINGS = ("nearest", "adaptive", "compensated")
EXAMPLES = 512


def measure() -> None:
    """Measure every combination that has no record yet."""
    torch.set_num_threads(1)
    for average in AVERAGES:
        for rounding in ROUNDINGS:
            for how in ("uniform", *PRICED, "reversed"):
                if how != "uniform" or average == int(average):
                    key = {"average": average, "rounding": rounding, "bits": how}
                    print(records.once(FILE, key, lambda key=key: measured(**key)), flush=True)


def measured(average: float, rounding: str, bits: str) -> records.Record:
    """Accuracy on the test images, what was predicted, and what was chosen."""
    found = choice(average, bits)
    module = quantize(recipe.model(), found.bits, recipe.example())
    seen = observe(module, recipe.batches("calibration", seed=1), examples=EXAMPLES)
    calibrate(module, seen)
    requantize(module, recipe.batches("calibration", seed=1), method=rounding)
    calibrate(module, seen)
    chosen = list(found.bits.weights.values())
    return {
        **recipe.evaluate(module.eval(), "test"),
        "predicted": found.rise,
        "bytes": found.bytes,
        "average_bits": found.average,
        "chosen": chosen,
    }


def choice(average: float, bits: str) -> Allocation:
    """The bits, within the bytes that uniform bits take."""
    if bits == "uniform":
        return uniform(prices("direction"), int(average))
    budget = int(sum(w.size for w in prices("direction").layout.weights) * average / 8)
    if bits == "reversed":
        return allocate(reversed_prices(prices("direction")), bytes=budget)
    return allocate(prices(bits), bytes=budget)


@lru_cache
def prices(how: str) -> BitPrices:
    """Prices from calibration images."""
    price, temperature = PRICED[how]
    batches = recipe.batches("calibration", seed=0)
    return bit_prices(
        recipe.model(), recipe.loss, batches, recipe.example(), price=price, temperature=temperature, stop=Stop(examples=EXAMPLES)
    )


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
    rows = {(r["average"], r["bits"], r["rounding"]): r for r in records.read(FILE)}
    print(f"| mean bits | chosen by | {' | '.join(ROUNDINGS)} |\n|---|---|{'---|' * len(ROUNDINGS)}")
    for average in sorted(AVERAGES, reverse=True):
        for how in ("uniform", *PRICED, "reversed"):
            found = [rows.get((average, how, rounding)) for rounding in ROUNDINGS]
            accuracies = ["–" if r is None else f"{r['accuracy']:.2f}" for r in found]
            if any(found):
                print(f"| {average:g} | {how} | {' | '.join(accuracies)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "table"))
    {"measure": measure, "table": table}[parser.parse_args().what]()
