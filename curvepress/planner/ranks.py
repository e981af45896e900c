"""Ranks of implants as choices of a plan: which may be chosen, at what price, and what bits are called where they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import numpy as np

from ..bitplan import FLOAT, READ, BitPlan, Multiplication, Wiring
from ..implants import Implants, RankPrice, bias_of, names
from ..plan import Plan, tensors_after

WHOLE = 1 << 31
"""Stands for the rank of a weight that has no implant: above all others."""
RankPrices = Mapping[str, Mapping[int, RankPrice]]
"""Predicted rise of the loss by weight and rank."""


def rank_choices(
    prices: RankPrices, wiring: Wiring, exchange: float = 1.0
) -> tuple[dict[str, dict[int, tuple[float, float]]], dict[str, list[int]]]:
    """Rises and their standard errors by weight and rank, and the ranks that may be chosen; a weight that several products read, whose
    parts would have several sites, stays whole.

    Args:
        exchange: what all rises are multiplied with.

    Raises:
        ValueError: if a price is not finite.
    """
    for name, own in prices.items():
        for rank, p in own.items():
            if not np.isfinite([p.rise, p.stderr]).all():
                raise ValueError(f"rank {rank} of {name!r} has the price {p.rise} ± {p.stderr}; prices must be finite: make them again")
    read = Counter(p.tensor for p in wiring.products)
    able = {n: own for n, own in prices.items() if own and read[n] <= 1}
    table = {n: {r: (max(p.rise, 0.0) * exchange, p.stderr * exchange) for r, p in own.items()} for n, own in able.items()}
    return table, {n: [WHOLE, *own] for n, own in able.items()}


def bits_with(bits: BitPlan, implants: Implants) -> BitPlan:
    """The bits once implants have taken the place of their weights: both parts have those of the weight, and what the first makes, which
    only the second reads, has those of what the layer reads."""
    parts = {n: names(n, i) for n, i in implants.items()}
    stems = {n.removesuffix(".weight"): up.removesuffix(".weight") for n, (_, up) in parts.items()}

    def site(name: str) -> str:
        stem = name.removesuffix(READ)
        return stems.get(stem, stem) + name[len(stem) :]

    read = {p.tensor: next(f for f in (*p.factors, "") if f != p.tensor) for p in bits.wiring.products if p.tensor in parts}
    inner = {parts[n][0].removesuffix(".weight"): bits.of(f) for n, f in read.items()}
    activations = {site(n): b for n, b in bits.activations.items()}
    return BitPlan(
        {part: b for n, b in bits.weights.items() for part in parts.get(n, (n,))},
        activations | {n: b if b < FLOAT else None for n, b in inner.items()},
        _rewired(bits.wiring, parts, site),
    )


def _rewired(wiring: Wiring, parts: Mapping[str, tuple[str, str]], site: Callable[[str], str]) -> Wiring:
    products: list[Multiplication] = []
    for p in wiring.products:
        if p.tensor in parts:
            (down, up), read = parts[p.tensor], next(f for f in (*p.factors, "") if f != p.tensor)
            products.append(Multiplication(down, p.positions, (down, site(read))))
            products.append(Multiplication(up, p.positions, (up, down.removesuffix(".weight"))))
        else:
            products.append(replace(p, factors=(site(p.factors[0]), site(p.factors[1]))))
    biases = {bias_of(n): bias_of(up) for n, (_, up) in parts.items()}
    return Wiring(
        tuple(products),
        {part: axis for n, axis in wiring.axes.items() for part in parts.get(n, (n,))},
        tuple(biases.get(n, n) for n in wiring.gone),
        {biases.get(n, n): parts[w][1] if w in parts else w for n, w in wiring.biases.items()},
        wiring.constants,
    )


def rank_rise(prices: RankPrices, plan: Plan) -> tuple[float, float]:
    """Predicted rise of the loss by all low-rank implants of a plan, each times the share of its weight that is left, and the standard
    error of that.

    Raises:
        ValueError: if a rank has no price.
    """
    found = [priced(prices, plan, n) for n, i in plan.implants.items() if i.kind == "low_rank"]
    return sum(rise for rise, _ in found), sum(e**2 for _, e in found) ** 0.5


def priced(prices: RankPrices, plan: Plan, weight: str) -> tuple[float, float]:
    """What one implant is predicted to cost where it is in the plan, and the standard error.

    Raises:
        ValueError: if its rank has no price.
    """
    rank = plan.implants[weight].rank
    if rank not in prices.get(weight, {}):
        known = ", ".join(map(str, prices.get(weight, {}))) or "none"
        raise ValueError(f"implants[{weight!r}]: rank {rank} has no price; those of this weight that have one are {known}")
    left = prod(tensors_after(replace(plan, implants={}, bits=None))[weight].shape) / prod(plan.structure.tensors[weight].shape)
    return prices[weight][rank].rise * left, prices[weight][rank].stderr * left
