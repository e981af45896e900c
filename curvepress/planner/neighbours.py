"""Choices near those of a sweep: whatever one more decision, or one taken back, makes better, as long as that is little work.

This is Pareto local search: of the best choices known so far, by cost and predicted rise, all that differ in one decision are looked at,
the best of all kept, and so on until nothing new is found.  No budget has a part in it, so that a looser one has all the choices of a
tighter.

Source: Paquete, Chiarandini, Stuetzle, "Pareto local optimum sets in the biobjective traveling salesman problem", 2004.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .tradeoffs import Problem, State

WORK = 40_000_000
"""Elements of arrays that are looked at, about: a second.  So a large problem, where one decision hardly counts, is left as it is."""
FEW = 16
STEPS = (-1, 1)
"""A decision goes on by one rung or column, or back."""
BATCH = 200_000
"""Elements of arrays at a time."""


@dataclass(frozen=True, eq=False)
class Points:
    """Choices with their costs and rises, ``[choices, ...]``."""

    states: State
    costs: np.ndarray
    rises: np.ndarray

    def __len__(self) -> int:
        return len(self.costs)

    def at(self, index: np.ndarray) -> Points:
        """Some of them."""
        return Points(State(*(own[index] for own in vars(self.states).values())), self.costs[index], self.rises[index])


def points(problem: Problem, states: State) -> Points:
    """Choices with what they cost."""
    return Points(states, problem.costs(states), problem.rises(states))


def stacked(states: Iterable[State]) -> State:
    """Several choices as one, with one more axis in front."""
    return State(*(np.stack(own) for own in zip(*(vars(s).values() for s in states), strict=True)))


def joined(parts: Sequence[Points]) -> Points:
    """All of them, in order."""
    states = State(*(np.concatenate(own) for own in zip(*(vars(p.states).values() for p in parts), strict=True)))
    return Points(states, np.concatenate([p.costs for p in parts]), np.concatenate([p.rises for p in parts]))


def room(problem: Problem) -> int:
    """Of how many choices the neighbours may be looked at; of none where that would be too few to matter."""
    count = WORK // max(_size(problem) * len(STEPS) * sum(len(own) for own in vars(problem.full()).values()), 1)
    return count if count >= FEW else 0


def nearby(problem: Problem, start: Points, mixes: Sequence[np.ndarray]) -> Points:
    """The best choices that are found from some, by one decision after the other; those themselves are among them, where none beats them.

    Args:
        mixes: what a unit of each cost is worth, once for each way to compare choices.
    """
    best, seen = _best(start, np.zeros(len(start), bool), mixes)
    left = room(problem)
    while left and not seen.all():
        new = np.flatnonzero(~seen)
        new = new[np.unique(np.linspace(0, len(new) - 1, min(left, len(new))).round().astype(np.int64))]
        left -= len(new)
        seen[new] = True
        found = [points(problem, s) for s in _moved(problem, best.at(new).states, max(BATCH // _size(problem), 1))]
        both = joined([best, *found])
        best, seen = _best(both, np.concatenate([seen, np.zeros(len(both) - len(best), bool)]), mixes)
    return best


def _size(problem: Problem) -> int:
    return len(problem.arrays["elements"]) + len(problem.arrays["site"])


def _best(found: Points, seen: np.ndarray, mixes: Sequence[np.ndarray]) -> tuple[Points, np.ndarray]:
    """Those that none beats in both mixed cost and rise; of equals the first."""
    rise, kept = found.rises[:, :-1].sum(axis=1), np.zeros(len(found), bool)
    for mix in mixes:
        cost = found.costs @ mix
        order = np.lexsort((rise, cost))
        kept[order[rise[order] < np.concatenate([[np.inf], np.minimum.accumulate(rise[order])[:-1]])]] = True
    index = np.flatnonzero(kept)
    return found.at(index), seen[index]


def _moved(problem: Problem, states: State, batch: int) -> Iterator[State]:
    """All that differ in one decision, so many at a time at most."""
    for kind, (own, allowed) in enumerate(zip(vars(states).values(), _allowed(problem), strict=True)):
        place = np.cumsum(allowed, axis=1) - 1
        for step in STEPS if len(allowed) else ():
            choice, index = np.nonzero(np.ones_like(own, dtype=bool))
            wanted = place[index, own[choice, index]] + step
            there = (wanted >= 0) & (wanted <= place[index, -1])
            choice, index, wanted = choice[there], index[there], wanted[there]
            target = np.argmax(place[index] == wanted[:, None], axis=1)
            for first in range(0, len(choice), batch):
                part = slice(first, first + batch)
                sides = [side[choice[part]] for side in vars(states).values()]
                sides[kind][np.arange(len(sides[kind])), index[part]] = target[part]
                yield State(*sides)


def _allowed(problem: Problem) -> list[np.ndarray]:
    """For ladders, weights, activations and ranks: which rungs and columns there are, ``[tensors, columns]``."""
    lengths = np.array([len(w.widths) for w in problem.ladders], dtype=np.int64)
    rungs = np.arange(max(lengths, default=1)) < lengths[:, None]
    return [rungs, *(np.isfinite(o.rise) for o in (problem.weights, problem.activations, problem.ranks))]
