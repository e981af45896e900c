"""Widths, bits and ranks as one problem in arrays: what every choice costs and is predicted to do to the loss, and the slopes of both.

A tensor has as many elements as the product of its lengths, and a length is a sum over the groups that share it (or, where two
groups cross, as heads and their widths do, a product).  So the saving of a channel follows from all other widths and from the bits of
the tensors it lives in, and all of that is a few sums over one flat list of members.

A weight that may have an implant of low rank has two more tensors, there as often as the rank is high: ``down``, with the inputs of a
filter, and ``up``, with the outputs.  They take the weight's place where they have fewer elements than what is left of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from ..bitplan import FLOAT, READ, SCALE, ZERO_POINT, BitPlan, Wiring
from ..costs import ITEM_BYTES, STORED
from ..implants import Implant
from ..plan import Plan
from ..structure import Structure
from .ladders import Ladder
from .ranks import bits_with

COSTS = ("params", "bytes", "macs", "bops")
"""The costs of a problem, in the order of its arrays."""
Table = Mapping[str, Mapping[int, tuple[float, float]]]
"""Predicted rise and its standard error, by name and number of bits."""


@dataclass(frozen=True, eq=False)
class State:
    """A choice: the rung of every ladder, the column of bits of every weight and activation, and of the rank of every weight that may
    have an implant.  Integer arrays; with one more axis in front they are several choices, and so is all that follows from them."""

    rungs: np.ndarray
    weights: np.ndarray
    activations: np.ndarray
    ranks: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class Options:
    """Bits or ranks that tensors may have: ``levels[column]``, with ``rise`` (infinite where not allowed) and ``variance``, both
    ``[tensors, columns]``."""

    names: tuple[str, ...]
    levels: np.ndarray
    rise: np.ndarray
    variance: np.ndarray

    def best(self, price: np.ndarray, share: np.ndarray, now: np.ndarray) -> np.ndarray:
        """The columns of least ``rise * share + price`` that have no more bits than those of ``now``."""
        return self.least(self.rise * share[:, None] + price, now)

    def least(self, total: np.ndarray, now: np.ndarray) -> np.ndarray:
        """The columns of the least ``total`` whose levels are not above those of ``now``."""
        total = np.where(self.levels[None, :] > self.levels[now][:, None], np.inf, total)
        return np.argmin(total, axis=1) if len(now) else now


def options(table: Table, allowed: Mapping[str, Sequence[int]], whole: int = FLOAT) -> Options:
    """Bits, or ranks, from most to fewest; ``whole``, which for bits is float, costs nothing."""
    levels = np.array(sorted({b for own in allowed.values() for b in own}, reverse=True), dtype=np.int64)
    rise, variance = np.full((len(allowed), len(levels)), np.inf), np.zeros((len(allowed), len(levels)))
    for row, (name, own) in enumerate(allowed.items()):
        for column, b in enumerate(levels.tolist()):
            if b in own:
                value, stderr = (0.0, 0.0) if b == whole else table[name][b]
                rise[row, column], variance[row, column] = value, stderr**2
    return Options(tuple(allowed), levels, rise, variance)


@dataclass(frozen=True, eq=False)
class Problem:
    """All that can be decided, and what follows.  Arrays over members, dimensions, tensors and products; see :func:`problem`."""

    structure: Structure
    ladders: tuple[Ladder, ...]
    weights: Options
    activations: Options
    wiring: Wiring
    arrays: Mapping[str, np.ndarray]
    ranks: Options = field(default_factory=lambda: options({}, {}))

    def full(self) -> State:
        """All channels, for every tensor the most bits it may have, and no implants."""
        sides = (self.weights, self.activations, self.ranks)
        first = [np.argmax(np.isfinite(o.rise), axis=1) if len(o.names) else np.zeros(0, np.int64) for o in sides]
        return State(np.zeros(len(self.ladders), np.int64), *first)

    def without_ranks(self) -> Problem:
        """The same problem where no weight may have an implant."""
        return problem(self.structure, self.ladders, self.weights, self.activations, self.wiring)

    def lengths(self, state: State) -> np.ndarray:
        """Of every dimension that some group shares."""
        a = self.arrays
        width = a["width"][a["offset"] + state.rungs]
        added = a["fixed"] + _sums(a["site"], a["rows"] * width[..., a["ladder"]], len(a["fixed"]))
        crossed = _sums(a["site"], np.log(np.maximum(width, 1e-9) / a["size"])[..., a["ladder"]], len(a["fixed"]))
        return np.where(a["additive"], added, np.rint(a["length"] * np.exp(crossed)))

    def elements(self, lengths: np.ndarray) -> np.ndarray:
        """Of every tensor; of those that weights of low rank are made of, for each rank."""
        a = self.arrays
        share = np.log(np.maximum(lengths, 1e-9) / a["length"])
        return np.rint(a["elements"] * np.exp(_sums(a["tensor"], share, len(a["elements"]))))

    def worth(self, elements: np.ndarray, ranks: np.ndarray) -> np.ndarray:
        """Whether implants of these ranks, ``[..., weights]``, have fewer elements than what is left of the weights."""
        a = self.arrays
        return ranks * (elements[..., a["down"]] + elements[..., a["up"]]) < elements[..., a["ranked"]]

    def implanted(self, state: State, elements: np.ndarray) -> np.ndarray:
        """The rank of every weight that has an implant, 0 of those that are whole."""
        ranks = self.ranks.levels[state.ranks]
        return np.where(self.worth(elements, ranks), ranks, 0)

    def times(self, ranks: np.ndarray) -> np.ndarray:
        """How often every tensor is there, with implants of these ranks."""
        a = self.arrays
        found = np.ones((*ranks.shape[:-1], len(a["elements"])))
        found[..., a["ranked"]] = ranks == 0
        for part in ("down", "up", "grid"):
            found[..., a[part]] = ranks
        return found

    def bits(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Bits of every weight, and those with which every factor is multiplied: weights, activations, and one in float."""
        own = self.weights.levels[state.weights]
        acts = self.activations.levels[state.activations]
        parents = self.arrays["parent"]
        read = np.where(parents >= 0, np.minimum(acts, acts[..., parents]), acts) if len(parents) else acts
        return own, np.concatenate([own, read, np.full((*own.shape[:-1], 1), FLOAT)], axis=-1)

    def item_bytes(self, own: np.ndarray) -> np.ndarray:
        """Bytes of an element of every tensor, a fraction where it is packed."""
        a = self.arrays
        found = np.broadcast_to(a["item"], (*own.shape[:-1], len(a["item"]))).copy()
        found[..., a["weight"]] = np.where(own < FLOAT, own / 8, found[..., a["weight"]])
        found[..., a["scale"]] = np.where(own < FLOAT, SCALE, 0)
        packed = a["rounded"] >= 0
        found[..., a["grid"][packed]] = found[..., a["scale"][a["rounded"][packed]]]
        for part in ("down", "up"):
            found[..., a[part]] = found[..., a["ranked"]]
        return found

    def costs(self, state: State) -> np.ndarray:
        """The costs in the order of :data:`COSTS`, the last axis."""
        a, dense = self.arrays, self.elements(self.lengths(state))
        ranks = self.implanted(state, dense)
        elements = dense * self.times(ranks)
        own, factors = self.bits(state)
        macs = elements * a["positions"]
        each = elements[..., a["p_tensor"]] * a["p_positions"]
        saved = each * (FLOAT**2 - factors[..., a["p_first"]] * factors[..., a["p_second"]])
        bops = FLOAT**2 * macs.sum(axis=-1) - saved.sum(axis=-1)
        stored = np.ceil(elements * self.item_bytes(own)).sum(axis=-1) + self.wiring.constants + self._grids(state, ranks, factors)
        return np.stack([elements[..., a["parameter"] > 0].sum(axis=-1), stored, macs.sum(axis=-1), bops], axis=-1)

    def _grids(self, state: State, ranks: np.ndarray, factors: np.ndarray) -> Any:
        acts, a = self.activations.levels[state.activations], self.arrays
        if not len(a["parent"]):
            return 0
        there = (acts < FLOAT) & ((a["parent"] < 0) | (acts < acts[..., a["parent"]]))
        inner = (ranks > 0) & (factors[..., a["beside"]] < FLOAT)
        return (SCALE + ZERO_POINT) * (there.sum(axis=-1) + inner.sum(axis=-1))

    def shares(self, elements: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much of every weight is left, and of what products read of every activation."""
        a = self.arrays
        left = elements / a["elements"]
        weights, outputs = left[..., a["weight"]], left[..., a["scale"]]
        reads, inputs = np.ones((*left.shape[:-1], len(self.activations.names))), np.zeros_like(weights)
        reads[..., a["read_by_activation"]] = np.divide(weights, outputs, out=inputs, where=outputs > 0)[..., a["read_by_weight"]]
        return weights, reads

    def steps(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Predicted rise of the loss by every ladder, and its variance; a group inside a branch that is gone adds nothing to that."""
        a, at = self.arrays, self.arrays["offset"] + state.rungs
        stays = _sums(a["inner"], state.rungs[..., a["around"]], len(self.ladders)) == 0
        return a["rise"][at] * stays, a["variance"][at] * stays

    def twice(self, ranks: np.ndarray) -> np.ndarray:
        """By how much more the rounding of every weight costs as it has an implant: both parts are rounded, each with as much error."""
        found, rounded = np.ones((*ranks.shape[:-1], len(self.weights.names))), self.arrays["rounded"]
        packed = rounded >= 0
        found[..., rounded[packed]] += ranks[..., packed] > 0
        return found

    def rises(self, state: State) -> np.ndarray:
        """Predicted rise of the loss by channels, weights, activations, branches and implants, and the variance of their sum."""
        a, elements = self.arrays, self.elements(self.lengths(state))
        (weights, reads), ranks = self.shares(elements), self.implanted(state, elements)
        steps, spread = self.steps(state)
        left = elements[..., a["ranked"]] / a["elements"][a["ranked"]] * (ranks > 0)
        parts, variance = [steps[..., ~a["whole"]].sum(axis=-1)], spread.sum(axis=-1)
        for own, column, share in (
            (self.weights, state.weights, weights * self.twice(ranks)),
            (self.activations, state.activations, reads),
            (self.ranks, state.ranks, left),
        ):
            rows = np.arange(column.shape[-1])
            parts.append((own.rise[rows, column] * share).sum(axis=-1))
            variance = variance + (own.variance[rows, column] * share**2).sum(axis=-1)
        return np.stack([*parts[:3], steps[..., a["whole"]].sum(axis=-1), parts[3], variance], axis=-1)

    def plan(self, state: State) -> Plan:
        """The plan of a choice."""
        keep = {n: c for ladder, r in zip(self.ladders, state.rungs.tolist(), strict=True) for n, c in ladder.kept(r).items()}
        both = zip(self.ladders, state.rungs.tolist(), strict=True)
        skip = tuple(ladder.branch.name for ladder, rung in both if ladder.branch and rung)
        ranks = self.implanted(state, self.elements(self.lengths(state)))
        implants = {n: Implant("low_rank", r) for n, r in zip(self.ranks.names, ranks.tolist(), strict=True) if r}
        if not (self.weights.names or self.activations.names):
            return Plan(self.structure, keep, skip, implants)
        named = [
            {n: (b if b < FLOAT else None) for n, b in zip(o.names, o.levels[c].tolist(), strict=True)}
            for o, c in ((self.weights, state.weights), (self.activations, state.activations))
        ]
        return Plan(self.structure, keep, skip, implants, bits_with(BitPlan(named[0], named[1], self.wiring), implants))


def _sums(index: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Of the last axis, by index."""
    if not (lead := values.shape[:-1]):
        return np.bincount(index, values, count)
    first = np.arange(prod(lead)).reshape(*lead, 1) * count
    return np.bincount((index + first).ravel(), values.ravel(), prod(lead) * count).reshape(*lead, count)


NO_RANKS = options({}, {})


def problem(
    structure: Structure, ladders: Sequence[Ladder], weights: Options, activations: Options, wiring: Wiring, ranks: Options = NO_RANKS
) -> Problem:
    """The problem in arrays.

    ``ladder``, ``site`` and ``rows`` are over members; ``tensor``, ``length``, ``fixed`` and ``additive`` over dimensions, where a branch
    is one more dimension, of length one, of all its tensors; ``elements``, ``item``, ``positions`` and ``parameter`` over tensors: the
    structure's, the scales of every weight, new biases, then ``down``, ``up`` and ``grid`` (the scales of ``down``), for a rank of one, of
    every weight that may have an implant.  ``ranked`` are these weights, ``rounded`` their numbers among those with bits or -1, ``beside``
    the factors they are multiplied with.  ``inner`` and ``around`` are pairs of ladders: a group or branch, and a branch around it.
    """
    tensors = {**structure.tensors}
    number = {n: i for i, n in enumerate(tensors)}
    biases = list(wiring.biases.values())
    scaled = [(w, wiring.axes[w]) for w in (*weights.names, *biases)]
    stored = [ITEM_BYTES[t.dtype] if t.kind in STORED and n not in wiring.gone else 0 for n, t in tensors.items()]
    arrays: dict[str, np.ndarray] = {
        "elements": np.array([*(prod(t.shape) for t in tensors.values()), *(tensors[w].shape[d] for w, d in scaled)], dtype=np.float64),
        "item": np.array(
            [*stored, *(0 for _ in weights.names), *(ITEM_BYTES[tensors[w].dtype] for w in wiring.biases.values())], np.float64
        ),
        "positions": np.array([*(t.positions for t in tensors.values()), *(0 for _ in scaled)], dtype=np.float64),
        "parameter": np.array([*(t.kind == "parameter" for t in tensors.values()), *(0 for _ in scaled)]),
        "weight": np.array([number[w] for w in weights.names], dtype=np.int64),
        "scale": len(tensors) + np.arange(len(weights.names)),
    }
    arrays |= _rank_arrays(structure, ranks.names, arrays, weights.names)
    extra = [*scaled, *((w, 1) for w in ranks.names), *((w, 0) for w in ranks.names)]
    copies: dict[tuple[str, int], list[int]] = {}
    for n, site in enumerate(extra):
        copies.setdefault(site, []).append(len(tensors) + n)
    parts = dict(zip(ranks.names, zip(arrays["down"].tolist(), arrays["up"].tolist(), strict=True), strict=True))
    arrays |= (
        _ladder_arrays(ladders)
        | _nesting(ladders)
        | _member_arrays(structure, ladders, number, copies)
        | _product_arrays(weights, activations, wiring, number, parts)
    )
    return Problem(structure, tuple(ladders), weights, activations, wiring, arrays, ranks)


def _rank_arrays(
    structure: Structure, ranked: Sequence[str], arrays: Mapping[str, np.ndarray], rounded: Sequence[str]
) -> dict[str, np.ndarray]:
    """What implants add to the arrays over tensors, and where."""
    number, place = {n: i for i, n in enumerate(structure.tensors)}, {n: i for i, n in enumerate(rounded)}
    first, count = len(arrays["elements"]), len(ranked)
    own = np.array([number[n] for n in ranked], dtype=np.int64)
    out = np.array([structure.tensors[n].shape[0] for n in ranked], dtype=np.float64)
    nothing = np.zeros(count)
    return {
        "elements": np.concatenate([arrays["elements"], arrays["elements"][own] / out, out, nothing + 1]),
        **{k: np.concatenate([arrays[k], arrays[k][own], arrays[k][own], nothing]) for k in ("item", "positions", "parameter")},
        "ranked": own,
        **{part: first + n * count + np.arange(count) for n, part in enumerate(("down", "up", "grid"))},
        "rounded": np.array([place.get(n, -1) for n in ranked], dtype=np.int64),
    }


def _ladder_arrays(ladders: Sequence[Ladder]) -> dict[str, np.ndarray]:
    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0), *parts])

    counts = np.array([len(w.widths) for w in ladders], dtype=np.int64)
    return {
        "offset": np.cumsum(counts) - counts,
        "of_rung": np.repeat(np.arange(len(ladders)), counts),
        "width": joined([w.widths for w in ladders]),
        "rise": joined([w.rises for w in ladders]),
        "variance": joined([w.variances for w in ladders]),
        "price": joined([w.prices for w in ladders]),
        "size": np.array([w.widths[0] for w in ladders], dtype=np.float64),
    }


def _nesting(ladders: Sequence[Ladder]) -> dict[str, np.ndarray]:
    branches = [(n, ladder.branch, set(ladder.branch.tensors)) for n, ladder in enumerate(ladders) if ladder.branch]
    own = [{m.tensor for g, _ in w.groups for m in g.members} | {*(w.branch.tensors if w.branch else ())} for w in ladders]
    pairs = [(k, n) for k, tensors in enumerate(own) for n, branch, held in branches if ladders[k].branch != branch and tensors <= held]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return {"inner": columns[:, 0], "around": columns[:, 1], "whole": np.array([w.branch is not None for w in ladders], dtype=bool)}


def _member_arrays(
    structure: Structure, ladders: Sequence[Ladder], number: Mapping[str, int], copies: Mapping[tuple[str, int], list[int]]
) -> dict[str, np.ndarray]:
    owner = {g.name: (n, divisor) for n, ladder in enumerate(ladders) for g, divisor in ladder.groups}
    shared: dict[tuple[str, int], list[tuple[int, float, np.ndarray]]] = {}
    for group in structure.groups:
        if group.name in owner:
            ladder, divisor = owner[group.name]
            for m in group.members:
                shared.setdefault((m.tensor, m.dim), []).append((ladder, m.rows.shape[1] / divisor, m.rows))
    members: list[tuple[int, int, float]] = []
    sites: list[tuple[int, float, float, bool]] = []
    for (tensor, dim), own in shared.items():
        length, covered = structure.tensors[tensor].shape[dim], sum(r.size for _, _, r in own)
        additive = len(own) == 1 or len(np.unique(np.concatenate([r.ravel() for _, _, r in own]))) == covered
        for t in (number[tensor], *copies.get((tensor, dim), [])):
            members += [(ladder, len(sites), rows) for ladder, rows, _ in own]
            sites.append((t, length, length - covered, additive))
    for n, branch in ((n, w.branch) for n, w in enumerate(ladders) if w.branch):
        for tensor in branch.tensors:
            for t in (number[tensor], *(t for (name, _), more in copies.items() if name == tensor for t in more)):
                members.append((n, len(sites), 1.0))
                sites.append((t, 1, 0, True))
    columns = list(zip(*members, strict=True)) or [(), (), ()]
    about = list(zip(*sites, strict=True)) or [(), (), (), ()]
    return {
        "ladder": np.array(columns[0], dtype=np.int64), "site": np.array(columns[1], dtype=np.int64),
        "rows": np.array(columns[2], dtype=np.float64),
        "tensor": np.array(about[0], dtype=np.int64), "length": np.array(about[1], dtype=np.float64),
        "fixed": np.array(about[2], dtype=np.float64), "additive": np.array(about[3], dtype=bool),
    }  # fmt: skip


def _product_arrays(
    weights: Options, activations: Options, wiring: Wiring, number: Mapping[str, int], parts: Mapping[str, tuple[int, int]]
) -> dict[str, np.ndarray]:
    names = [*weights.names, *activations.names]
    place = {n: i for i, n in enumerate(names)}
    last, acts = len(names), {n: i for i, n in enumerate(activations.names)}

    def factor(name: str) -> int:
        return place.get(name, place.get(name.removesuffix(READ), last))

    reads = [
        (acts[f], weights.names.index(p.tensor)) for p in wiring.products for f in p.factors if f in acts and p.tensor in weights.names
    ]
    products = [(number[p.tensor], p) for p in wiring.products]
    products += [(part, p) for p in wiring.products for part in parts.get(p.tensor, ())]
    beside = {p.tensor: factor(next(f for f in (*p.factors, "") if f != p.tensor)) for p in wiring.products}
    return {
        "p_tensor": np.array([n for n, _ in products], dtype=np.int64),
        "p_positions": np.array([p.positions for _, p in products], dtype=np.float64),
        "p_first": np.array([factor(p.factors[0]) for _, p in products], dtype=np.int64),
        "p_second": np.array([factor(p.factors[1]) for _, p in products], dtype=np.int64),
        "beside": np.array([beside.get(n, last) for n in parts], dtype=np.int64),
        "parent": np.array([acts.get(n.removesuffix(READ), -1) if n.endswith(READ) else -1 for n in activations.names], dtype=np.int64),
        "read_by_activation": np.array([a for a, _ in reads], dtype=np.int64),
        "read_by_weight": np.array([w for _, w in reads], dtype=np.int64),
    }
