"""The whole frontier of what bits cost against the rise of the loss that is predicted for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .allocation import Allocation, allocation, allowed_bits, bits_by_name, bops_of, priced
from .bitwidths import BitPrices
from .packing import packed_size
from .quantized import Weight

POINTS = 200_000
"""Most points kept while the frontier is built.  Beyond, points within one part in this many of the largest cost stand for each other."""


def frontier(
    prices: BitPrices, *, weights: Sequence[int] | Mapping[str, Sequence[int]] | None = None, activation: int = 8, cost: str = "bytes"
) -> list[Allocation]:
    """Every choice of weight bits that no other beats in both cost (``bytes`` or ``bops``) and predicted rise, from the smallest.

    Activations are held.  Exact as long as no more than :data:`POINTS` choices are on the way: costs and rises add up over weights, so the
    frontier of a set of weights is made of those of its parts (HAWQ-V2, section 3.2, draws it from samples under a monotonicity rule).

    Raises:
        ValueError: if the cost is another.
    """
    if cost not in ("bytes", "bops"):
        raise ValueError(f"a frontier is of bytes or bops against the predicted rise, got {cost!r}")
    total, rise = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[tuple[str, np.ndarray, np.ndarray]] = []
    for weight in (w for w in prices.layout.weights if w.name in prices.weights):
        bits = np.array(sorted(allowed_bits(weights, weight.name, prices.weights)))
        costs = total[:, None] + np.array([_cost_of(prices, weight, int(b), activation, cost) for b in bits])
        rises = rise[:, None] + np.array([priced(prices.weights, weight.name, int(b)).rise for b in bits])
        kept = _undominated(costs.ravel(), rises.ravel())
        total, rise = costs.ravel()[kept], rises.ravel()[kept]
        steps.append((weight.name, bits[kept % len(bits)], kept // len(bits)))
    return [allocation(prices, bits_by_name(prices, _walked(steps, i), activation)) for i in range(len(total))]


def _cost_of(prices: BitPrices, weight: Weight, bits: int, activation: int, cost: str) -> int:
    """What a weight adds to the cost of a choice at so many bits."""
    if cost == "bytes":
        return packed_size(weight.size, bits)
    alike = bits_by_name(prices, dict.fromkeys(prices.weights, bits), activation)
    return sum(bops_of(p, prices.layout, alike) for p in prices.layout.products if p.weight == weight.name)


def _undominated(costs: np.ndarray, rises: np.ndarray) -> np.ndarray:
    """Where no other has both a cost and a rise as low, by rising cost."""
    order = np.lexsort((rises, costs))
    kept = order[rises[order] < np.concatenate([[np.inf], np.minimum.accumulate(rises[order])[:-1]])]
    if len(kept) > POINTS:
        place = costs[kept] * POINTS // costs.max()
        kept = kept[np.append(place[1:] != place[:-1], True)]
    return kept


def _walked(steps: Sequence[tuple[str, np.ndarray, np.ndarray]], last: int) -> dict[str, int]:
    found = {}
    for name, bits, before in reversed(steps):
        found[name] = int(bits[last])
        last = int(before[last])
    return dict(reversed(found.items()))
