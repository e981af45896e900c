"""The best plan of widths and bits there is, proven by integer programming: for small problems, and to check the sweep against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import coo_matrix

from ..bitplan import FLOAT
from ..solver import solved
from .tradeoffs import COSTS, Problem, State

MOST = 200_000
"""Combinations of widths and bits in one program, at most."""


@dataclass(frozen=True)
class Exact:
    """A choice, its predicted rise, and the lower bound that was proven; they are equal where the solver finished."""

    state: State
    rise: float
    bound: float


@dataclass(frozen=True, eq=False)
class _Block:
    """All combinations of the ladders and bits on which one tensor depends: its rise and costs at each.

    ``variables`` name the choices; ``combinations`` ``[n, variables]`` are the rung or column each takes.
    """

    variables: tuple[tuple[str, int], ...]
    combinations: np.ndarray
    rise: np.ndarray
    costs: np.ndarray


def exact(problem: Problem, limits: Mapping[str, float], seconds: float = 60.0) -> Exact:
    """The choice of least predicted rise within absolute limits of some costs.

    Every tensor has a variable for each combination of the widths and bits that decide its size, so the program is linear though sizes
    are products.  Bits of activations must leave no choice, and weights can have no implants.

    Raises:
        ValueError: if the problem is too large, leaves a choice of activations or of ranks, or nothing fits.
    """
    if problem.ranks.names:
        raise ValueError("the exact plan does not choose ranks of implants; make the problem without them")
    if problem.activations.names and np.isfinite(problem.activations.rise).sum() > len(problem.activations.names):
        raise ValueError("the exact plan takes one number of bits for all activations; allow one, such as 8")
    blocks = list(_blocks(problem))
    if (size := sum(len(b.combinations) for b in blocks)) > MOST:
        raise ValueError(
            f"an exact plan would look at {size:,} combinations, more than {MOST:,}; hold widths to larger multiples, or allow fewer bits"
        )
    return _solved(problem, blocks, limits, seconds)


def _blocks(problem: Problem) -> Iterator[_Block]:
    """One for each ladder's channels, and one for each tensor that is not always the same."""
    a = problem.arrays
    for n, ladder in enumerate(problem.ladders):
        around = [("ladder", k) for k in a["around"][a["inner"] == n].tolist()]
        taken = np.array(list(product(range(len(ladder.widths)), *(_choices(problem, v) for v in around))))
        rise = np.where(taken[:, 1:].any(axis=1), 0.0, ladder.rises[taken[:, 0]])
        yield _Block((("ladder", n), *around), taken, rise, np.zeros((len(taken), len(COSTS))))
    ladders_of: dict[int, list[int]] = {}
    for site, ladder_index in zip(a["site"].tolist(), a["ladder"].tolist(), strict=True):
        ladders_of.setdefault(int(a["tensor"][site]), []).append(ladder_index)
    scales = dict(zip(a["scale"].tolist(), range(len(a["scale"])), strict=True))
    weights = dict(zip(a["weight"].tolist(), range(len(a["weight"])), strict=True))
    for tensor in range(len(a["elements"])):
        bits = weights.get(tensor, scales.get(tensor))
        variables = [("ladder", n) for n in dict.fromkeys(ladders_of.get(tensor, []))] + ([("weight", bits)] if bits is not None else [])
        if variables:
            yield _block(problem, tensor, variables)


def _block(problem: Problem, tensor: int, variables: list[tuple[str, int]]) -> _Block:
    full = problem.full()
    base_cost, base_rise = _alone(problem, tensor, full)
    combinations = list(product(*(_choices(problem, v) for v in variables)))
    costs, rises = [], []
    for combination in combinations:
        rungs, columns = full.rungs.copy(), full.weights.copy()
        for (kind, n), chosen in zip(variables, combination, strict=True):
            (rungs if kind == "ladder" else columns)[n] = chosen
        found = _alone(problem, tensor, replace(full, rungs=rungs, weights=columns))
        costs.append(found[0] - base_cost)
        rises.append(found[1] - base_rise)
    return _Block(tuple(variables), np.array(combinations), np.array(rises), np.array(costs))


def _choices(problem: Problem, variable: tuple[str, int]) -> list[int]:
    kind, n = variable
    return (
        list(range(len(problem.ladders[n].widths))) if kind == "ladder" else np.flatnonzero(np.isfinite(problem.weights.rise[n])).tolist()
    )


def _alone(problem: Problem, tensor: int, state: State) -> tuple[np.ndarray, float]:
    """The part of one tensor in costs and rise."""
    a = problem.arrays
    elements = problem.elements(problem.lengths(state))
    own, factors = problem.bits(state)
    size = elements[tensor]
    mine = a["p_tensor"] == tensor
    saved = (a["p_positions"] * (FLOAT**2 - factors[a["p_first"]] * factors[a["p_second"]]))[mine].sum()
    stored = np.ceil(size * problem.item_bytes(own)[tensor])
    cost = np.array(
        [size * a["parameter"][tensor], stored, size * a["positions"][tensor], size * (FLOAT**2 * a["positions"][tensor] - saved)]
    )
    which = np.flatnonzero(a["weight"] == tensor)
    if not len(which):
        return cost, 0.0
    w = int(which[0])
    shares = problem.shares(elements)
    reads = a["read_by_activation"][a["read_by_weight"] == w]
    activations = problem.activations.rise[reads, state.activations[reads]].sum() * shares[1][reads].mean() if len(reads) else 0.0
    return cost, float(problem.weights.rise[w, state.weights[w]] * shares[0][w] + activations)


def _solved(problem: Problem, blocks: list[_Block], limits: Mapping[str, float], seconds: float) -> Exact:
    own = list(dict.fromkeys(v for b in blocks for v in b.variables))
    first, count = {}, 0
    for v in own:
        first[v], count = count, count + max(_choices(problem, v)) + 1
    whole = count
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    sums: list[float] = []

    def row(at: list[int], terms: list[float], total: float) -> None:
        rows.extend([len(sums)] * len(at))
        columns.extend(at)
        values.extend(terms)
        sums.append(total)

    for v in own:
        at = [first[v] + c for c in _choices(problem, v)]
        row(at, [1.0] * len(at), 1.0)
    starts = []
    for b in blocks:
        starts.append(count)
        for place, v in enumerate(b.variables):
            for c in _choices(problem, v):
                taken = (np.flatnonzero(b.combinations[:, place] == c) + count).tolist()
                row([*taken, first[v] + c], [*[1.0] * len(taken), -1.0], 0.0)
        count += len(b.combinations)
    equal = LinearConstraint(coo_matrix((values, (rows, columns)), shape=(len(sums), count)).tocsr(), sums, sums)
    rises = np.concatenate([np.zeros(whole), *(b.rise for b in blocks)])
    base = problem.costs(problem.full())
    bounds = []
    for name, limit in limits.items():
        n = COSTS.index(name)
        terms = np.concatenate([np.zeros(whole), *(b.costs[:, n] for b in blocks)])
        bounds.append(LinearConstraint(terms[None, :] / max(base[n], 1), -np.inf, (limit - base[n]) / max(base[n], 1)))
    scale = max(np.abs(rises).max(), 1e-300)
    found = solved(
        rises / scale, integrality=np.arange(count) < whole, bounds=Bounds(0, 1), constraints=[equal, *bounds],
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )  # fmt: skip
    if found.x is None:
        raise ValueError(
            f"no choice within {', '.join(f'{k} {v:,.0f}' for k, v in limits.items())} was found in {seconds:g} s: {found.message}"
        )
    state = problem.full()
    for (kind, n), start in first.items():
        chosen = [c for c in _choices(problem, (kind, n)) if found.x[start + c] > 0.5]
        (state.rungs if kind == "ladder" else state.weights)[n] = chosen[0]
    constant = problem.rises(problem.full())[:-1].sum()
    return Exact(state, float(problem.rises(state)[:-1].sum()), float(found.mip_dual_bound * scale + constant))
