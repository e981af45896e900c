"""HAWQ-V2: bits by the mean Hessian trace of each layer, never more bits for a layer of less curvature, the best of all such choices.

Source: Dong et al., "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020, arXiv:1911.03852.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..curvature import Stop
from ..files import write_text
from ..plan import dumps
from ..quantization.allocation import Allocation, allocation, bits_by_name
from ..quantization.bitwidths import BitPrices, bit_prices, prices_to_dict
from ..quantization.packing import packed_size
from ..runs.desk import Desk
from ..stages.quantizing import float_model, load_prices
from .preset import Preset, Published

Settings = Mapping[str, Any]
SECOND_HAND = "second hand: notes on the paper, NNCF's documentation and tables that quote it"
PRESET = Preset(
    "hawq-v2",
    "HAWQ-V2",
    "Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, NeurIPS 2020, arXiv:1911.03852",
    "Omega = sum over layers of (tr(H_i) / n_i) * |Q(W_i) - W_i|^2, least at a size, bits falling with tr(H_i) / n_i (eq. 2.11)",
    settings={
        "estimator": "hessian",
        "probes": 50,
        "examples": 512,
        "bits": (2, 3, 4, 5, 6, 7, 8),
        "activation_bits": (4, 5, 6, 7, 8),
        "asymmetric": False,
        "rounding": "nearest",
        "ranges": "minmax",
    },
    sources={
        "estimator": SECOND_HAND + ": Hutchinson; that of activations from one example at a time, averaged",
        "probes": SECOND_HAND + ": its figure 5 is said to converge in about 50",
        "examples": "could not be read; what prices of bits take here",
        "bits": "the authors' model zoo: 2 to 8 bits",
        "activation_bits": "its tables, as quoted, have 4 bits at least",
        "asymmetric": "sources disagree: the authors' model zoo says asymmetric by layer, a table that quotes it symmetric by channel",
        "rounding": SECOND_HAND,
        "ranges": "could not be read; the authors' later code takes least and largest values",
    },
    deviations=(
        "There is no released code of it, so nothing to correct.",
        "The frontier is exact, by dynamic programming over all choices that are monotone, not drawn from samples.",
        "Activations have a frontier of their own, at a mean number of bits: how the paper weighs them against weights could not be read.",
        "Its recipe for training could not be read: the recipe's own is used, with the float network as the teacher where it says so.",
        "Every layer has a choice, the first and the last too; those that residual sums alone read have eight bits.",
    ),
    published=(
        Published("ImageNet, ResNet-50, 2 and 4 bits at least", "75.92 %, 7.99 MB, 12.24 times smaller", "notes of NeurIPS version"),
        Published("the same, as quoted by EQ-Net (ICCV 2023)", "75.8 % of 77.4 %, 12.24 times smaller", "EQ-Net's table"),
        Published("ImageNet, InceptionV3", "75.98 %, 7.57 MB, 12.04 times smaller", "notes of NeurIPS version"),
        Published("ImageNet, SqueezeNext", "68.68 %, 1.07 MB, 9.40 times smaller", "notes of NeurIPS version"),
        Published("least Omega against a large one", "more than 1 % better", "notes of NeurIPS version"),
        Published("weighting by the trace against the error alone", "0.85 % better", "notes of NeurIPS version"),
    ),
    unread=("the full text; its recipe for training, its batch for the Hessian, how the bits of activations were chosen",),
)


@dataclass(frozen=True, eq=False)
class Layer:
    """What has bits to be chosen: elements, mean trace, and the rise of the loss at each number of bits."""

    name: str
    size: int
    trace: float
    rises: Mapping[int, float]


@dataclass(frozen=True, eq=False)
class Frontier:
    """Monotone choices that no other beats in both bytes and rise, from the smallest: ``choices[i]`` is bits by name."""

    bytes: np.ndarray
    rises: np.ndarray
    choices: Sequence[Mapping[str, int]]

    def within(self, limit: float) -> Mapping[str, int]:
        """The choice of least rise that takes at most so many bytes.

        Raises:
            ValueError: if none does.
        """
        if limit < self.bytes[0]:
            raise ValueError(f"the fewest bits take {self.bytes[0]:,} bytes, more than the {limit:,.0f} allowed; ask for a smaller ratio")
        return self.choices[int(np.searchsorted(self.bytes, limit, side="right")) - 1]


def monotone(layers: Sequence[Layer], bits: Sequence[int]) -> Frontier:
    """The frontier of all choices in which a layer of a smaller trace never has more bits."""
    ordered, falling = sorted(layers, key=lambda x: -x.trace), sorted(bits, reverse=True)
    start = np.zeros(1, dtype=np.int64)
    before = [(start, np.zeros(1), start - 1, start)] + [(start[:0], np.zeros(0), start[:0], start[:0])] * (len(falling) - 1)
    steps = []
    for layer in ordered:
        found, so_far = [], before[0]
        for level, width in enumerate(falling):
            so_far = _best(so_far, before[level]) if level else so_far
            found.append((so_far[0] + packed_size(layer.size, width), so_far[1] + max(layer.rises[width], 0.0), so_far[2], so_far[3]))
        steps.append(found)
        before = [(c, r, np.full(len(c), level), np.arange(len(c))) for level, (c, r, _, _) in enumerate(found)]
    whole = before[0]
    for level in range(1, len(falling)):
        whole = _best(whole, before[level])
    ends = zip(whole[2].tolist(), whole[3].tolist(), strict=True)
    return Frontier(whole[0], whole[1], [_walked(ordered, falling, steps, level, at) for level, at in ends])


Points = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Bytes, rises, and where each point came from: the level of the layer before, and its place there."""


def _best(a: Points, b: Points) -> Points:
    """Those of both that no other beats in bytes and rise, by rising bytes."""
    joined = [np.concatenate(pair) for pair in zip(a, b, strict=True)]
    order = np.lexsort((joined[1], joined[0]))
    rises = joined[1][order]
    kept = order[rises < np.concatenate([[np.inf], np.minimum.accumulate(rises)[:-1]])]
    return joined[0][kept], joined[1][kept], joined[2][kept], joined[3][kept]


def _walked(layers: Sequence[Layer], falling: Sequence[int], steps: Sequence[Sequence[Points]], level: int, at: int) -> dict[str, int]:
    found = {}
    for layer, own in zip(reversed(layers), reversed(steps), strict=True):
        found[layer.name] = falling[level]
        _, _, levels, places = own[level]
        level, at = int(levels[at]), int(places[at])
    return found


def layers_of(prices: BitPrices, kind: str, *, backwards: bool = False) -> list[Layer]:
    """The ``weights``, or the ``sites`` that products read, with their traces; ``backwards`` gives each the trace of its opposite in
    their order, which is what a wrong sensitivity does."""
    table = prices.weights if kind == "weights" else prices.sites
    sizes = {x.name: x.size for x in getattr(prices.layout, kind) if x.name in table and (kind == "weights" or x.role == "product")}
    order = sorted(sizes, key=lambda n: -prices.traces[n])
    given = dict(zip(order, reversed(order) if backwards else order, strict=True))
    return [_layer(n, sizes[n], prices.traces[n], prices.traces[given[n]], {b: p.rise for b, p in table[n].items()}) for n in sizes]


def _layer(name: str, size: int, own: float, given: float, rises: Mapping[int, float]) -> Layer:
    return Layer(name, size, given, {b: rise * given / own if own > 0 else 0.0 for b, rise in rises.items()})


def chosen(prices: BitPrices, settings: Settings) -> Allocation:
    """The bits of least rise at ``settings["ratio"]`` times fewer bytes than in float, and ``settings["mean"]`` bits an activation."""
    weights, sites = (layers_of(prices, kind, backwards=settings["reversed"]) for kind in ("weights", "sites"))
    limit = sum(4 * w.size for w in prices.layout.weights) / settings["ratio"]
    own = monotone(weights, settings["bits"]).within(limit)
    activations = monotone(sites, settings["activation_bits"]).within(sum(s.size for s in sites) * settings["mean"] / 8) if sites else {}
    return allocation(prices, bits_by_name(prices, own, activations))


def priced(desk: Desk, settings: Settings) -> None:
    """The work of the price stage: the mean trace of every weight and activation, times the error of rounding it."""
    recipe = desk.recipe
    probed = {"probes": settings["probes"]} if settings["estimator"] == "hessian" else {}
    prices = bit_prices(
        float_model(desk), recipe.loss, recipe.batches("calibration", seed=settings["seed"]), recipe.inputs(), price="trace",
        asymmetric=settings["asymmetric"], estimator=settings["estimator"], stop=Stop(examples=settings["examples"]), seed=settings["seed"],
        **probed,
    )  # fmt: skip
    desk.note(prices.detail)
    write_text(desk.path("prices.json"), dumps(prices_to_dict(prices)))


def assigned(desk: Desk, settings: Settings) -> None:
    """The work of the choose stage."""
    bits = replace(chosen(load_prices(desk), settings).bits, asymmetric=settings["asymmetric"])
    write_text(desk.path("bits.json"), dumps(json.loads(bits.to_json())))
