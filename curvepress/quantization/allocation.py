"""The best choice of bits under budgets: exact, by integer programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import lil_matrix

from ..bitplan import FLOAT, READ
from ..solver import solved
from .bitwidths import BitPrices, Price
from .packing import packed_size
from .quantized import Bits, Layout, Product

SUM = 8
"""Bits of activations that residual sums read: fewer save no arithmetic."""
TARGETS = {"storage": ((2, 3, 4, 5, 6, 7, 8), (2, 3, 4, 5, 6, 7, 8)), "onnxruntime": ((8,), (4, 8))}
"""Bits of weights that a target makes use of: of any, and of those of linear layers."""
LINEAR = ("linear", "addmm", "matmul", "mm")


@dataclass(frozen=True)
class Allocation:
    """Bits, what they cost, and the rise of the loss that is predicted for them.

    ``bytes`` are those of the packed weights without scales, ``average`` the mean bits of a weight, ``bops`` bit operations per
    example: multiply-accumulates times the bits of both factors.  What stays in float has 32 bits.
    """

    bits: Bits
    rise: float
    stderr: float
    bytes: int
    average: float
    bops: int


def allocation(prices: BitPrices, bits: Bits) -> Allocation:
    """What a choice of bits costs.

    Raises:
        ValueError: if something has a number of bits without a price.
    """
    what = prices.layout
    widths = {w.name: bits.of_weight(w.name) for w in what.weights}
    chosen = [priced(prices.weights, name, b) for name, b in widths.items()]
    chosen += [priced(prices.sites, name, b) for name, b in _site_bits(what, bits).items()]
    return Allocation(
        bits,
        sum(p.rise for p in chosen),
        sum(p.stderr**2 for p in chosen) ** 0.5,
        sum(packed_size(w.size, widths[w.name] or FLOAT) for w in what.weights),
        sum(w.size * (widths[w.name] or FLOAT) for w in what.weights) / sum(w.size for w in what.weights),
        sum(bops_of(p, what, bits) for p in what.products),
    )


def uniform(prices: BitPrices, weight: int, activation: int = 8) -> Allocation:
    """The same bits for every weight and every activation that products read, where they have prices."""
    return allocation(prices, bits_by_name(prices, dict.fromkeys(prices.weights, weight), activation))


def runnable(layout: Layout, target: str) -> dict[str, tuple[int, ...]]:
    """The bits of each weight that a target makes use of: ``storage`` of 2 to 8, which all run as int8; ``onnxruntime`` has kernels
    for 8, and for 4 where only linear layers read it.

    Raises:
        ValueError: if the target is unknown.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; choose one of {', '.join(TARGETS)}")
    linear = {w.name: [p.operator in LINEAR for p in layout.products if p.weight == w.name] for w in layout.weights}
    return {name: TARGETS[target][all(readers)] for name, readers in linear.items()}


def refuse_unrunnable(layout: Layout, target: str, bits: Bits) -> None:
    """See whether a target makes use of the bits of every weight.

    Raises:
        ValueError: naming the first weight of which it does not.
    """
    for name, allowed in runnable(layout, target).items():
        own = bits.of_weight(name)
        if own is not None and own not in allowed:
            known = " and ".join(map(str, allowed))
            raise ValueError(
                f"{name} has {own} bits, for which {target} has no kernel, only for {known}; give such bits, or target storage"
            )


def allocate(
    prices: BitPrices,
    *,
    bytes: float | None = None,
    average: float | None = None,
    bops: float | None = None,
    rise: float | None = None,
    weights: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    activations: Sequence[int] = (8,),
) -> Allocation:
    """The bits of least predicted rise within all budgets given, proven best by HiGHS.

    Args:
        bytes, average, bops: at most so much, as in :class:`Allocation`.
        rise: predicted rise of the loss at most; among the choices that keep to it, one of fewest bytes is taken.
        weights: the bits that weights may have, for all or by name; by default all that have prices.
        activations: the bits of activations that products read; those that only sums read have 8.

    Raises:
        ValueError: if there is no budget, bits have no price, or nothing fits; the message says what the least is.
    """
    if bytes is None and average is None and bops is None and rise is None:
        raise ValueError("give a budget: bytes, average bits of a weight, bops, or the rise of the loss")
    program = _program(prices, weights, activations)
    if bytes is not None:
        _limit_bytes(program, prices, bytes)
    if average is not None:
        _limit_average(program, prices, average)
    if bops is not None:
        _limit_bops(program, prices, bops)
    if rise is not None:
        _limit_bytes(program, prices, _fewest_bytes(program, prices, rise))
    return allocation(prices, _solved(program, prices))


def bits_by_name(prices: BitPrices, weights: Mapping[str, int], activation: int | Mapping[str, int]) -> Bits:
    """Bits by name; what has no price stays in float, and activations that have no name here have those of sums."""
    own: dict[str, int | None] = {}
    for s in prices.layout.sites:
        chosen = activation if isinstance(activation, int) else activation.get(s.name, SUM)
        own[s.name] = (chosen if s.role == "product" else SUM) if s.name in prices.sites else None
    return Bits({w.name: weights.get(w.name) for w in prices.layout.weights}, own)


def allowed_bits(
    given: Sequence[int] | Mapping[str, Sequence[int]] | None, name: str, prices: Mapping[str, Mapping[int, Price]]
) -> list[int]:
    """The bits that a weight may have, by name or for all; without any, those that have prices."""
    chosen = prices[name] if given is None else given[name] if isinstance(given, Mapping) else given
    return list(dict.fromkeys(chosen))


def priced(prices: Mapping[str, Mapping[int, Price]], name: str, bits: int | None) -> Price:
    """The price of a number of bits; what stays in float costs nothing.

    Raises:
        ValueError: if there is none.
    """
    if bits is None:
        return Price(0.0, 0.0)
    if bits not in prices.get(name, {}):
        known = ", ".join(map(str, prices.get(name, {}))) or "none at all, for it stays in float"
        raise ValueError(f"{name} has no price at {bits} bits; it has prices for {known}")
    if not np.isfinite((found := prices[name][bits]).rise):
        raise ValueError(f"{name} has the price {found.rise} at {bits} bits; prices must be finite: make them again")
    return found


def _site_bits(what: Layout, bits: Bits) -> dict[str, int | None]:
    """The bits of every site at which it makes a difference: a read has fewer than the tensor, or the tensor none."""
    own = {s.name: bits.of_site(s) for s in what.sites}
    for s in what.sites:
        if s.role == "product" and s.weights and all(bits.of_weight(w) is None for w in s.weights):
            own[s.name] = None  # no product here is one of integers
        if s.name.endswith(READ) and (own.get(s.name.removesuffix(READ)) or FLOAT) <= (own[s.name] or FLOAT):
            own[s.name] = None
    return own


def _factors(product: Product) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    """Kind and name of what is multiplied; None for what is neither a weight nor a site."""
    known = [("weight", product.weight)] if product.weight else []
    known += [("site", s) for s in product.inputs]
    if not product.weight and len(product.inputs) == 1:
        known *= 2  # a tensor times itself
    first, second, *_ = [*known, None, None]
    return first, second


def bops_of(product: Product, what: Layout, bits: Bits) -> int:
    """Bit operations of a product per example: its multiply-accumulates times the bits of both factors."""
    sites = _site_bits(what, bits)

    def held(factor: tuple[str, str] | None) -> int:
        if factor is None:
            return FLOAT
        kind, name = factor
        return (bits.of_weight(name) if kind == "weight" else sites.get(name) or sites.get(name.removesuffix(READ))) or FLOAT

    first, second = _factors(product)
    return product.macs * held(first) * held(second)


Terms = dict[int, float]
"""Coefficients by variable."""


@dataclass
class _Program:
    """Zero-one variables: one for each weight or site and number of bits, of which each has one; then one for each pair of a product."""

    options: list[tuple[str, str, int]]
    rises: list[float]
    of: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    rows: list[tuple[Terms, float, float]] = field(default_factory=list)


def _program(prices: BitPrices, weights: Sequence[int] | Mapping[str, Sequence[int]] | None, activations: Sequence[int]) -> _Program:
    options = [("weight", name, b) for name in prices.weights for b in allowed_bits(weights, name, prices.weights)]
    rises = [priced(prices.weights, name, b).rise for _, name, b in options]
    for site in (s for s in prices.layout.sites if s.name in prices.sites):
        for b in dict.fromkeys(activations if site.role == "product" else (SUM,)):
            idle = site.name.endswith(READ) and b >= SUM
            options.append(("site", site.name, b))
            rises.append(0.0 if idle else priced(prices.sites, site.name, b).rise)
    program = _Program(options, rises)
    for i, (kind, name, _) in enumerate(options):
        program.of.setdefault((kind, name), []).append(i)
    program.rows += [(dict.fromkeys(own, 1.0), 1, 1) for own in program.of.values()]
    return program


def _limit_bytes(program: _Program, prices: BitPrices, limit: float) -> None:
    sizes = {w.name: w.size for w in prices.layout.weights}
    fixed = sum(packed_size(n, FLOAT) for name, n in sizes.items() if name not in prices.weights)
    terms: Terms = {i: packed_size(sizes[n], b) for i, (k, n, b) in enumerate(program.options) if k == "weight"}
    program.rows.append((terms, -np.inf, limit - fixed))


def _fewest_bytes(program: _Program, prices: BitPrices, rise: float) -> int:
    """Bytes of the smallest choice that is predicted to raise the loss by no more than that."""
    if not rise > 0:
        raise ValueError(f"the predicted rise of the loss can be kept below a number above 0, got {rise:g}")
    sizes = {w.name: w.size for w in prices.layout.weights}
    bytes_of = [float(packed_size(sizes[n], b)) if k == "weight" else 0.0 for k, n, b in program.options]
    bytes_of += [0.0] * (len(program.rises) - len(bytes_of))
    limit = ({i: r / rise for i, r in enumerate(program.rises) if r}, -np.inf, 1.0)
    smallest = replace(program, rises=bytes_of, rows=[*program.rows, limit])
    return allocation(prices, _solved(smallest, prices)).bytes


def _limit_average(program: _Program, prices: BitPrices, limit: float) -> None:
    sizes = {w.name: w.size for w in prices.layout.weights}
    fixed = sum(n * FLOAT for name, n in sizes.items() if name not in prices.weights)
    terms: Terms = {i: sizes[n] * b for i, (k, n, b) in enumerate(program.options) if k == "weight"}
    program.rows.append((terms, -np.inf, limit * sum(sizes.values()) * (1 + 1e-12) - fixed))


def _limit_bops(program: _Program, prices: BitPrices, limit: float) -> None:
    """Bits of both factors multiply, so each pair of them has a variable, bound to those of its factors."""
    cost: Terms = {}
    unit, fixed = gcd(*(p.macs for p in prices.layout.products)) or 1, 0  # small numbers, for the solver's sake
    for product in prices.layout.products:
        macs = product.macs // unit
        known = [_options_of(program, f) for f in _factors(product)]
        alone = known[0] or known[1]
        if known[0] and known[1] and known[0] is not known[1]:
            _bind_pairs(program, macs, known[0], known[1], cost)
        elif alone:
            for i in alone:
                b = program.options[i][2]
                cost[i] = cost.get(i, 0) + macs * b * (b if known[0] is known[1] else FLOAT)
        else:
            fixed += macs * FLOAT * FLOAT
    program.rows.append((cost, -np.inf, limit / unit - fixed))


def _options_of(program: _Program, factor: tuple[str, str] | None) -> list[int]:
    """The variables of a factor; a read without any has those of the tensor."""
    if factor is None:
        return []
    kind, name = factor
    return program.of.get(factor) or program.of.get((kind, name.removesuffix(READ)), [])


def _bind_pairs(program: _Program, macs: int, first: list[int], second: list[int], cost: Terms) -> None:
    start, pairs = len(program.rises), [(i, j) for i in first for j in second]
    program.rises += [0.0] * len(pairs)
    cost.update({start + k: macs * program.options[i][2] * program.options[j][2] for k, (i, j) in enumerate(pairs)})
    for i in (*first, *second):
        program.rows.append(({i: -1.0, **{start + k: 1.0 for k, pair in enumerate(pairs) if i in pair}}, 0, 0))


def _solved(program: _Program, prices: BitPrices) -> Bits:
    rows, count = program.rows, len(program.rises)
    matrix = lil_matrix((len(rows), count))
    for r, (terms, _, _) in enumerate(rows):
        for i, c in terms.items():
            matrix[r, i] = c
    constraint = LinearConstraint(matrix.tocsr(), [r[1] for r in rows], [r[2] for r in rows])
    whole = np.arange(count) < len(program.options)
    found = solved(_scaled(program), integrality=whole, bounds=Bounds(0, 1), constraints=constraint, options={"mip_rel_gap": 0})
    if found.x is None:
        raise ValueError(f"no choice of bits fits: {_least(program, prices)}")
    return _chosen(program, prices, [i for i in range(len(program.options)) if found.x[i] > 0.5])


def _scaled(program: _Program) -> np.ndarray:
    """Rises in a unit in which the solver's absolute tolerance of 1e-6 is small against the least rise there can be."""
    rises = np.array(program.rises)
    least = sum(min(rises[own]) for own in program.of.values())
    return rises / max(least, 1e-6 * rises.max(), 1e-300)


def _chosen(program: _Program, prices: BitPrices, taken: Sequence[int]) -> Bits:
    chosen = [program.options[i] for i in taken]
    return bits_by_name(prices, {n: b for k, n, b in chosen if k == "weight"}, {n: b for k, n, b in chosen if k == "site"})


def _least(program: _Program, prices: BitPrices) -> str:
    fewest = _chosen(program, prices, [min(own, key=lambda i: program.options[i][2]) for own in program.of.values()])
    most = _chosen(program, prices, [max(own, key=lambda i: program.options[i][2]) for own in program.of.values()])
    found, least = allocation(prices, fewest), allocation(prices, most).rise
    return (
        f"the fewest bits allowed take {found.bytes:,} bytes, {found.average:.2f} bits a weight and {found.bops:,} bops, "
        f"and the most of them raise the loss by {least:.2g}; allow more"
    )
