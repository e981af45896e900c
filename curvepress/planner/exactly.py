"""The best plan of widths and bits there is, proven by integer programming: for small problems, and to check the sweep against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import coo_matrix

from ..bitplan import FLOAT
from ..costs import Cost, cost
from ..plan import Plan
from ..solver import solved
from .channels import AtMost
from .joint import Choice, Family, choose, chosen
from .tradeoffs import COSTS, Problem, State

MOST = 200_000
"""Combinations of widths and bits in one program, at most."""
CHUNK = 1024
"""Combinations that are looked at together."""


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
    check(problem)
    return _solved(problem, list(_blocks(problem)), limits, seconds)


def check(problem: Problem) -> None:
    """See whether a problem can be solved exactly; it raises as :func:`exact` does."""
    if problem.ranks.names:
        raise ValueError("the exact plan does not choose ranks of implants; make the problem without them")
    if problem.activations.names and np.isfinite(problem.activations.rise).sum() > len(problem.activations.names):
        raise ValueError("the exact plan takes one number of bits for all activations; allow one, such as 8")
    if (size := sum(prod(len(_choices(problem, v)) for v in variables) for _, variables in _tensors(problem))) > MOST:
        raise ValueError(
            f"an exact plan would look at {size:,} combinations, more than {MOST:,}; hold widths to larger multiples, or allow fewer bits"
        )


def best(family: Family, budget: AtMost, seconds: float, measure: Callable[[Plan], Cost] = cost) -> tuple[Choice, float]:
    """The proven choice within a budget, or that of the family where the solver has no better one in this time; and the lower bound.

    Raises:
        ValueError: if latency is limited, or as :func:`~.joint.choose` and :func:`exact` do.
    """
    ours, problem = choose(family, budget, measure), family.problem
    whole = measure(Plan(problem.structure))
    if "latency" in budget.limits:
        raise ValueError("the exact plan knows no measured times; limit params, bytes, macs or bops instead")
    found = exact(problem, budget.absolute(whole), seconds)
    proven = chosen(problem, found.state, problem.rises(found.state), measure)
    return proven if budget(proven.cost, whole) and proven.predicted.rise < ours.predicted.rise else ours, found.bound


def _blocks(problem: Problem) -> Iterator[_Block]:
    """One for each ladder's channels, and one for each tensor that is not always the same."""
    a = problem.arrays
    for n, ladder in enumerate(problem.ladders):
        around = [("ladder", k) for k in a["around"][a["inner"] == n].tolist()]
        taken = np.array(list(product(range(len(ladder.widths)), *(_choices(problem, v) for v in around))))
        rise = np.where(taken[:, 1:].any(axis=1), 0.0, ladder.rises[taken[:, 0]])
        yield _Block((("ladder", n), *around), taken, rise, np.zeros((len(taken), len(COSTS))))
    for tensor, variables in _tensors(problem):
        yield _block(problem, tensor, variables)


def _tensors(problem: Problem) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """The tensors that are not always the same, each with the choices it depends on."""
    a = problem.arrays
    ladders_of: dict[int, list[int]] = {}
    for site, ladder_index in zip(a["site"].tolist(), a["ladder"].tolist(), strict=True):
        ladders_of.setdefault(int(a["tensor"][site]), []).append(ladder_index)
    scales = dict(zip(a["scale"].tolist(), range(len(a["scale"])), strict=True))
    weights = dict(zip(a["weight"].tolist(), range(len(a["weight"])), strict=True))
    for tensor in range(len(a["elements"])):
        bits = weights.get(tensor, scales.get(tensor))
        variables = [("ladder", n) for n in dict.fromkeys(ladders_of.get(tensor, []))] + ([("weight", bits)] if bits is not None else [])
        if variables:
            yield tensor, variables


def _block(problem: Problem, tensor: int, variables: list[tuple[str, int]]) -> _Block:
    full = problem.full()
    base_cost, base_rise = _alone(problem, tensor, full)
    combinations = np.array(list(product(*(_choices(problem, v) for v in variables))))
    costs, rises = [], []
    for part in np.array_split(combinations, np.arange(CHUNK, len(combinations), CHUNK)):
        rungs, columns, *others = (np.tile(own, (len(part), 1)) for own in vars(full).values())
        for place, (kind, n) in enumerate(variables):
            (rungs if kind == "ladder" else columns)[:, n] = part[:, place]
        found = _alone(problem, tensor, State(rungs, columns, *others))
        costs.append(found[0] - base_cost)
        rises.append(found[1] - base_rise)
    return _Block(tuple(variables), combinations, np.concatenate(rises), np.concatenate(costs))


def _choices(problem: Problem, variable: tuple[str, int]) -> list[int]:
    kind, n = variable
    return (
        list(range(len(problem.ladders[n].widths))) if kind == "ladder" else np.flatnonzero(np.isfinite(problem.weights.rise[n])).tolist()
    )


def _alone(problem: Problem, tensor: int, state: State) -> tuple[np.ndarray, np.ndarray]:
    """The part of one tensor in costs and rise."""
    a = problem.arrays
    elements = problem.elements(problem.lengths(state))
    own, factors = problem.bits(state)
    size, mine = elements[..., tensor], a["p_tensor"] == tensor
    products = factors[..., a["p_first"][mine]] * factors[..., a["p_second"][mine]]
    saved = (a["p_positions"][mine] * (FLOAT**2 - products)).sum(axis=-1)
    stored = np.ceil(size * problem.item_bytes(own)[..., tensor])
    parts = size * a["parameter"][tensor], stored, size * a["positions"][tensor], size * (FLOAT**2 * a["positions"][tensor] - saved)
    costs, which = np.stack(parts, axis=-1), np.flatnonzero(a["weight"] == tensor)
    if not len(which):
        return costs, np.zeros(size.shape)
    w = int(which[0])
    weights, inputs = problem.shares(elements)
    reads = a["read_by_activation"][a["read_by_weight"] == w]
    rise = problem.activations.rise[reads, state.activations[..., reads]].sum(axis=-1)
    read = inputs[..., reads].mean(axis=-1) if len(reads) else 1.0
    return costs, problem.weights.rise[w, state.weights[..., w]] * weights[..., w] + rise * read


def _solved(problem: Problem, blocks: list[_Block], limits: Mapping[str, float], seconds: float) -> Exact:
    variables = list(dict.fromkeys(v for b in blocks for v in b.variables))
    starts = np.cumsum([0, *(max(_choices(problem, v)) + 1 for v in variables), *(len(b.combinations) for b in blocks)]).tolist()
    first, whole = dict(zip(variables, starts, strict=False)), starts[len(variables)]
    rises = np.concatenate([np.zeros(whole), *(b.rise for b in blocks)])
    scale = max(np.abs(rises).max(), 1e-300)
    found = solved(
        rises / scale, integrality=np.arange(len(rises)) < whole, bounds=Bounds(0, 1),
        constraints=[_consistent(problem, blocks, first, starts[len(variables) :]), *_within(problem, blocks, limits, whole)],
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


def _consistent(problem: Problem, blocks: list[_Block], first: Mapping[tuple[str, int], int], starts: list[int]) -> LinearConstraint:
    """Every variable has one of its choices, and every tensor the combination of those of its variables."""
    rows: list[tuple[list[int], list[float], float]] = []
    for v, start in first.items():
        at = [start + c for c in _choices(problem, v)]
        rows.append((at, [1.0] * len(at), 1.0))
    for b, start in zip(blocks, starts, strict=False):
        for place, v in enumerate(b.variables):
            for c in _choices(problem, v):
                taken = (np.flatnonzero(b.combinations[:, place] == c) + start).tolist()
                rows.append(([*taken, first[v] + c], [*[1.0] * len(taken), -1.0], 0.0))
    index = np.repeat(np.arange(len(rows)), [len(at) for at, _, _ in rows])
    columns, values = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
    sums = [total for _, _, total in rows]
    return LinearConstraint(coo_matrix((values, (index, columns)), shape=(len(rows), starts[-1])).tocsr(), sums, sums)


def _within(problem: Problem, blocks: list[_Block], limits: Mapping[str, float], whole: int) -> Iterator[LinearConstraint]:
    """The costs within their limits, as shares of those of the whole model."""
    base = problem.costs(problem.full())
    for name, limit in limits.items():
        n = COSTS.index(name)
        terms, unit = np.concatenate([np.zeros(whole), *(b.costs[:, n] for b in blocks)]), max(base[n], 1)
        yield LinearConstraint(terms[None, :] / unit, -np.inf, (limit - base[n]) / unit)
