"""One price for what is saved, rising from zero: the moves it calls for, in order, each a narrower group, fewer bits or an implant.

At a price the choice is that of least predicted rise plus price times cost (the Lagrangian of the budgeted problem).  What a channel
saves depends on the other widths, bits and implants, what bits and ranks save on the widths, and the errors of rounding and truncation fall
with what is left of a tensor; so at each price bits, ranks and widths are chosen in turns until nothing changes.  Choices only shrink, so
that all of them together are one line of moves, from the whole model to the smallest there can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..bitplan import FLOAT, SCALE
from .tradeoffs import Options, Problem, State

ROUNDS = 8
"""Turns of widths and bits at one price, at most."""
PRICES = 192
"""Prices of a sweep before the last ones, which rise by :data:`STEP`."""
STEP = 1.1
LAST = 200
POINTS = 1500
"""Choices along a sweep that are looked at as candidates, about."""


@dataclass(frozen=True, eq=False)
class Slopes:
    """By what the mixed cost falls: for a channel of every ladder, and by how much the rise of what goes with it does; and the price of
    all bits and ranks, these with the rise at each, as it is with what is left of the weight."""

    channels: np.ndarray
    relief: np.ndarray
    weights: np.ndarray
    activations: np.ndarray
    shares: tuple[np.ndarray, np.ndarray]
    ranks: np.ndarray
    truncations: np.ndarray


@dataclass(frozen=True, eq=False)
class Moves:
    """A line of moves: ``kind`` 0 takes a ladder, 1 a weight, 2 an activation, 3 an implant to the rung or column ``target``."""

    kind: np.ndarray
    index: np.ndarray
    target: np.ndarray

    def states(self, start: State, stops: np.ndarray) -> Iterator[State]:
        """The choices after so many moves, for each of some ascending numbers."""
        now = [own.copy() for own in vars(start).values()]
        done = 0
        for stop in stops.tolist():
            for kind, own in enumerate(now):
                taken = np.flatnonzero(self.kind[done:stop] == kind) + done
                own[self.index[taken]] = self.target[taken]
            done = stop
            yield State(*(own.copy() for own in now))


def sweep(problem: Problem, mix: np.ndarray) -> Moves:
    """All moves as the price rises; ``mix`` says what a unit of each cost is worth."""
    state, parts = problem.full(), [[np.zeros(0, np.int64)] * 3]
    for price in _prices(problem, mix):
        start, slopes = state, _slopes(problem, state, mix)
        state = _settled(problem, state, mix, price)
        parts.append(_ordered(problem, start, state, slopes))
    return Moves(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _prices(problem: Problem, mix: np.ndarray) -> Iterator[float]:
    """Those at which about as many moves each are worth while, judged at the start; then rising ones, as savings shrink; then any."""
    ratios = np.sort(_first_ratios(problem, mix))
    if not len(ratios):  # nothing costs anything: all goes at once
        yield np.inf
        return
    low = np.quantile(ratios, np.linspace(0, 1, min(PRICES, len(ratios))))
    yield 0.0
    yield from low[low > 0]
    top = max(float(low[-1]), 1e-300)
    yield from (top * STEP**n for n in range(1, LAST))
    yield np.inf


def _first_ratios(problem: Problem, mix: np.ndarray) -> np.ndarray:
    state = problem.full()
    s, a = _slopes(problem, state, mix), problem.arrays
    below = np.isfinite(a["price"])
    parts = [a["price"][below] / np.maximum(s.channels, 1e-300)[a["of_rung"]][below]]
    for own, price, column in ((problem.weights, s.weights, state.weights), (problem.activations, s.activations, state.activations)):
        rows = np.arange(len(column))
        if len(rows):
            saved = price[rows, column][:, None] - price
            ratio = (own.rise - own.rise[rows, column][:, None]) / np.maximum(saved, 1e-300)
            parts.append(ratio[np.isfinite(own.rise) & (saved > 0)])
    saved = s.ranks[:, :1] - s.ranks
    parts.append((s.truncations / np.maximum(saved, 1e-300))[np.isfinite(s.truncations) & (saved > 0)])
    found = np.concatenate(parts)
    return found[(found > 0) & np.isfinite(found) & (found < 1e200)]


def _settled(problem: Problem, state: State, mix: np.ndarray, price: float) -> State:
    """Bits, ranks and widths in turns at one price."""
    a = problem.arrays
    price = min(price, 1e250)
    for _ in range(ROUNDS if price < 1e250 else 10**6):
        before = state
        s = _slopes(problem, state, mix)
        state = State(
            state.rungs,
            problem.weights.best(price * s.weights, s.shares[0], state.weights),
            problem.activations.best(price * s.activations, s.shares[1], state.activations),
            state.ranks,
        )
        if len(state.ranks):
            s = _slopes(problem, state, mix)
            state = replace(state, ranks=problem.ranks.least(s.truncations + price * s.ranks, state.ranks))
        s = _slopes(problem, state, mix)
        worth = price * s.channels + s.relief
        reached = np.bincount(a["of_rung"], a["price"] <= worth[a["of_rung"]], len(problem.ladders)).astype(np.int64)
        state = replace(state, rungs=np.maximum(state.rungs, reached))
        if all(np.array_equal(x, y) for x, y in zip(vars(before).values(), vars(state).values(), strict=True)):
            break
    return state


def _slopes(problem: Problem, state: State, mix: np.ndarray) -> Slopes:
    a = problem.arrays
    lengths = problem.lengths(state)
    dense = problem.elements(lengths)
    ranks = problem.implanted(state, dense)
    elements = dense * problem.times(ranks)
    own, factors = problem.bits(state)
    products = factors[a["p_first"]] * factors[a["p_second"]]
    bops = FLOAT**2 * a["positions"] - np.bincount(a["p_tensor"], a["p_positions"] * (FLOAT**2 - products), len(elements))
    cost = mix[0] * a["parameter"] + mix[1] * problem.item_bytes(own) + mix[2] * a["positions"] + mix[3] * bops
    errors = np.zeros(len(elements))
    errors[a["weight"]] = problem.weights.rise[np.arange(len(own)), state.weights] * problem.twice(ranks)
    errors[a["ranked"]] += np.where(ranks > 0, problem.ranks.rise[np.arange(len(ranks)), state.ranks], 0)
    width = (a["width"][a["offset"] + state.rungs])[a["ladder"]]
    by_row = np.where(a["additive"][a["site"]], a["rows"] / np.maximum(lengths[a["site"]], 1e-9), 1 / np.maximum(width, 1e-9))
    at = a["tensor"][a["site"]]
    channels, relief = (
        np.bincount(a["ladder"], v[at] * by_row, len(problem.ladders)) for v in (cost * elements, errors * dense / a["elements"])
    )
    relief = relief + np.bincount(a["around"], problem.steps(state)[0][a["inner"]], len(problem.ladders))
    each = mix[3] * elements[a["p_tensor"]] * a["p_positions"]
    weights, reads = problem.shares(dense)
    return Slopes(
        channels, relief, *_bit_prices(problem, mix, elements, factors, each), (weights * problem.twice(ranks), reads),
        *_rank_prices(problem, cost, dense),
    )  # fmt: skip


def _rank_prices(problem: Problem, cost: np.ndarray, dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What every weight costs at each of its ranks, and the predicted rise; where an implant is no smaller than the weight, it is whole."""
    a, levels = problem.arrays, np.tile(problem.ranks.levels, (len(problem.ranks.names), 1))
    each = sum(cost[a[part]] * dense[a[part]] for part in ("down", "up", "grid"))
    less, left = problem.worth(dense, levels.T).T, dense[a["ranked"]] / a["elements"][a["ranked"]]
    known = np.isfinite(problem.ranks.rise)
    rises = np.where(known & less, np.where(known, problem.ranks.rise, 0) * left[:, None], np.where(known, 0.0, np.inf))
    return np.where(less, levels * each[:, None], (cost[a["ranked"]] * dense[a["ranked"]])[:, None]), rises


def _bit_prices(
    problem: Problem, mix: np.ndarray, elements: np.ndarray, factors: np.ndarray, each: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What every weight and activation costs at each of its bits."""
    a, count = problem.arrays, len(problem.weights.names)
    multiplied = np.bincount(a["p_first"], each * factors[a["p_second"]], len(factors))
    multiplied = multiplied + np.bincount(a["p_second"], each * factors[a["p_first"]] * (a["p_first"] != a["p_second"]), len(factors))
    levels = problem.weights.levels
    sizes, grids, packed = elements[a["weight"]], elements[a["scale"]], a["rounded"] >= 0
    sizes[a["rounded"][packed]] += (elements[a["down"]] + elements[a["up"]])[packed]
    grids[a["rounded"][packed]] += elements[a["grid"]][packed]
    held = np.where(levels[None, :] < FLOAT, levels[None, :] / 8, a["item"][a["weight"]][:, None]) * sizes[:, None]
    scales = np.where(levels[None, :] < FLOAT, SCALE, 0) * grids[:, None]
    weights = mix[1] * (held + scales) + multiplied[:count, None] * levels[None, :]
    return weights, multiplied[count:-1, None] * problem.activations.levels[None, :]


def _ordered(problem: Problem, start: State, end: State, s: Slopes) -> list[np.ndarray]:
    """The moves between two choices, the cheapest for what it saves first."""
    a = problem.arrays
    steps = end.rungs - start.rungs
    index = np.repeat(np.arange(len(steps)), steps)
    target = np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(r, e) + 1 for r, e in zip(start.rungs[steps > 0], end.rungs[steps > 0], strict=True))]
    )
    ratio = (a["price"][a["offset"][index] + target] - s.relief[index]) / np.maximum(s.channels[index], 1e-300)
    rows: list[tuple[np.ndarray, ...]] = [(np.zeros(len(index)), index, target, ratio)]
    sides = (
        (problem.weights, start.weights, end.weights, s.weights),
        (problem.activations, start.activations, end.activations, s.activations),
    )
    for kind, side in enumerate(sides, 1):
        rows.append(_bit_moves(kind, *side, s.shares[kind - 1]))
    rows.append(_moved(3, start.ranks, end.ranks, s.truncations, s.ranks))
    kinds, indices, targets, ratios = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.lexsort((targets, ratios))
    return [kinds[order].astype(np.int64), indices[order].astype(np.int64), targets[order].astype(np.int64)]


def _bit_moves(kind: int, own: Options, start: np.ndarray, end: np.ndarray, price: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, ...]:
    return _moved(kind, start, end, np.where(np.isfinite(own.rise), own.rise, 0) * share[:, None], price)


def _moved(kind: int, start: np.ndarray, end: np.ndarray, rises: np.ndarray, price: np.ndarray) -> tuple[np.ndarray, ...]:
    """Moves from one column to another, with the ratio of what they cost to what they save."""
    index = np.flatnonzero(start != end)
    rise = rises[index, end[index]] - rises[index, start[index]]
    saved = price[index, start[index]] - price[index, end[index]]
    return np.full(len(index), kind), index, end[index], rise / np.maximum(saved, 1e-300)
