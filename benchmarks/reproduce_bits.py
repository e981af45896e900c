"""Cells of the results page about bits: HAWQ-V2 beside uniform bits, its own ablation and curvepress's choice at equal bytes and bops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any

from torch import nn

from benchmarks import records
from benchmarks.networks import NETWORKS, Network
from benchmarks.quantization import EXAMPLES, TRAINING, Eighth
from curvepress.curvature import Stop
from curvepress.quantization.allocation import Allocation, allocate, allocation, bits_by_name
from curvepress.quantization.bitwidths import BitPrices, bit_prices
from curvepress.quantization.quantized import calibrate, observe, quantize
from curvepress.reproduce import hawq_v2
from curvepress.training.fitting import fit
from curvepress_recipes import digits

Key = Mapping[str, Any]
WARM = "curvepress, direction, temperature 4"
WAYS = ("HAWQ-V2", "HAWQ-V2, reversed", "uniform", "curvepress, direction", WARM)
UNIFORM = {8.0: 4, 10.67: 3}
"""Size ratios at which there are uniform bits, 32 / ratio."""
RATIOS = (8.0, 10.67, 12.0)
MEAN = 6
SHORT = {"digits": 16, "ResNet-20": 2}
"""Eighths of an epoch of training on grids."""
LARGE = {"ResNet-20": 0, "ResNet-56": 11, "EfficientNet-Lite0": 12}
"""How late each network has its turn."""
NETS = {"digits": Network(digits, {}, 64, 512), **{name: NETWORKS[name] for name in LARGE}}


def cells() -> Iterator[tuple[int, dict[str, Any], Any]]:
    """``(rank, key, measure)``."""
    for network, ratio, way, trained in product(NETS, RATIOS, WAYS, (False, True)):
        if (way == "uniform" and ratio not in UNIFORM) or (trained and network not in SHORT):
            continue
        large = LARGE.get(network, -40)
        key = {"part": "hawq", "network": network, "ratio": ratio, "way": way, "eighths": SHORT[network] if trained else 0, "seed": 0}
        yield 1 + large + (4 if trained else 0), key, measured


@cache
def prices(network: str, price: str, temperature: float = 1.0) -> BitPrices:
    """Prices from training images: HAWQ-V2's mean traces without the noise of random vectors, or curvature along the error."""
    of = NETS[network]
    count = EXAMPLES if network != "EfficientNet-Lite0" else 128
    how = {"price": price, "temperature": temperature, "stop": Stop(examples=count)}
    return bit_prices(of.model(), of.recipe.loss, of.calibration(0), of.recipe.example(), **how)


@cache
def choice(network: str, ratio: float, way: str) -> Allocation:
    """The bits: all at equal bytes of weights; curvepress's also within the bit operations of HAWQ-V2's."""
    found = prices(network, "trace")
    settings = {**hawq_v2.PRESET.settings, "ratio": ratio, "mean": MEAN, "reversed": way.endswith("reversed")}
    if way == "uniform":
        return allocation(found, bits_by_name(found, dict.fromkeys(found.weights, UNIFORM[ratio]), MEAN))
    if way.startswith("HAWQ-V2"):
        return hawq_v2.chosen(found, settings)
    published = choice(network, ratio, "HAWQ-V2")
    limit = sum(4 * w.size for w in found.layout.weights) / ratio
    own = prices(network, "direction", 4.0 if way == WARM else 1.0)
    return allocate(own, bytes=limit, bops=published.bops, activations=settings["activation_bits"])


def measured(key: Key) -> records.Record:
    """Accuracy on the test images after calibration, and after training on grids for eighths of an epoch where asked."""
    of, found = NETS[key["network"]], choice(key["network"], key["ratio"], key["way"])
    module = quantize(of.model(), found.bits, of.recipe.example())
    calibrate(module, observe(module, of.calibration(key["seed"] + 1), examples=EXAMPLES))
    if key["eighths"]:
        module = _trained(module.eval(), key)
    weights = list(found.bits.weights.values())
    return {
        **of.recipe.evaluate(module.eval(), "test"),
        "bytes": found.bytes,
        "float_bytes": sum(4 * w.size for w in prices(key["network"], "trace").layout.weights),
        "average": found.average,
        "bops": found.bops,
        "predicted": found.rise,
        "chosen": weights,
        "activations": [b for b in found.bits.sites.values() if b is not None],
    }


def _trained(module: nn.Module, key: Key) -> nn.Module:
    of = NETS[key["network"]]
    settings: dict[str, Any] = dict(TRAINING)
    return fit(
        module, of.recipe.loss, lambda seed: Eighth(of.train(seed)), epochs=key["eighths"], teacher=of.model(), seed=key["seed"], **settings
    ).model
