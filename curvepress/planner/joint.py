"""One plan for widths, bits, branches and ranks of implants, all priced as predicted rise of the loss, under any budgets at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from ..bitplan import FLOAT, READ, Wiring
from ..costs import Cost, cost
from ..plan import Plan
from ..quantization.allocation import SUM
from ..quantization.bitwidths import BitPrices, Prices
from ..scores import LOSS_UNIT, Scores
from ..structure import Structure
from .alignment import Shape
from .channels import AtMost, Budget, unreachable
from .ladders import branch_ladders, ladders
from .neighbours import Points, nearby, points, room, stacked
from .ranks import WHOLE, RankPrices, rank_choices
from .sweep import POINTS, Moves, sweep
from .tradeoffs import COSTS, Problem, State, options, problem

WIDTHS, NO_WIRING = Shape(), Wiring()
"""Any widths; a model of which nothing is quantized."""
MIXES = 4
"""Steps in which the weights of several costs are tried."""


@dataclass(frozen=True)
class Exchange:
    """What the predicted rises of each kind of decision are multiplied with, so that they count what is left of them after recovery."""

    channels: float = 1.0
    weights: float = 1.0
    activations: float = 1.0
    branches: float = 1.0
    implants: float = 1.0

    def __post_init__(self) -> None:
        for kind, rate in vars(self).items():
            if not (np.isfinite(rate) and rate > 0):
                raise ValueError(f"exchange of {kind} must be a positive number; got {rate}")


@dataclass(frozen=True)
class Prediction:
    """Predicted rise of the loss by kind of decision, and the standard error of their sum."""

    channels: float
    weights: float
    activations: float
    branches: float
    implants: float
    stderr: float

    @property
    def rise(self) -> float:
        """The sum of the parts."""
        return self.channels + self.weights + self.activations + self.branches + self.implants


@dataclass(frozen=True)
class Choice:
    """A plan, what it costs, and the rise of the loss that is predicted for it."""

    plan: Plan
    cost: Cost
    predicted: Prediction


@dataclass(frozen=True)
class Bitwidths:
    """The bits that may be chosen: of weights, for all or by name, and of activations that products read.  32 is float."""

    weights: Sequence[int] | Mapping[str, Sequence[int]] = (2, 3, 4, 5, 6, 7, 8)
    activations: Sequence[int] = (8,)


def joint_problem(
    structure: Structure,
    scores: Scores,
    prices: BitPrices | None = None,
    wiring: Wiring = NO_WIRING,
    *,
    bits: Bitwidths = Bitwidths(),
    shape: Shape = WIDTHS,
    exchange: Exchange = Exchange(),
    branches: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    ranks: RankPrices = MappingProxyType({}),
) -> Problem:
    """All choices of widths, bits, residual branches and ranks of implants, with prices and costs.

    Args:
        scores: of channels; in units of the loss.
        prices: of bits, of the same model, and ``wiring`` of it; without them everything stays in float.
        bits: those that may be chosen, where there are prices; what has none stays in float.
        shape: the widths that may be chosen.
        branches: those that may be left out, each with the rise of the loss without it and its standard error.
        ranks: of the implants that weights may have, with prices.

    Raises:
        ValueError: if scores are in another unit, a price is missing or not finite, or an option is out of range.
    """
    if scores.unit != LOSS_UNIT:
        raise ValueError(
            f"scores by {scores.method!r} only rank channels and cannot be weighed against bits or ranks; make others with "
            "`curvepress score --method mask_curvature`"
        )
    own = [*ladders(structure, scores, shape, exchange.channels), *branch_ladders(structure, branches, exchange.branches)]
    low = options(*rank_choices(ranks, wiring, exchange.implants), WHOLE)
    if prices is None:
        return problem(structure, own, options({}, {}), options({}, {}), wiring, low)
    return problem(
        structure,
        own,
        options(_checked(prices.weights, "weight", exchange.weights), _of_weights(prices, bits)),
        options(_with_idle(_checked(prices.sites, "activation", exchange.activations)), _of_activations(prices, bits)),
        wiring,
        low,
    )


def _of_weights(prices: BitPrices, bits: Bitwidths) -> dict[str, list[int]]:
    allowed = bits.weights
    found = {n: list(allowed[n] if isinstance(allowed, Mapping) else allowed) for n in prices.weights}
    _check_known(found, prices.weights)
    return found


def _of_activations(prices: BitPrices, bits: Bitwidths) -> dict[str, list[int]]:
    found = {s.name: list(bits.activations if s.role == "product" else (SUM,)) for s in prices.layout.sites if s.name in prices.sites}
    if all(set(own) == {FLOAT} for own in _of_weights(prices, bits).values()):
        found = {}  # no product is one of integers
    _check_known(found, prices.sites)
    return found


def _check_known(allowed: Mapping[str, Sequence[int]], prices: Prices) -> None:
    for name, own in allowed.items():
        known = [*prices[name], FLOAT]
        if not own or not set(own) <= set(known):
            raise ValueError(f"{name} may have {', '.join(map(str, own)) or 'no'} bits, but has prices for {', '.join(map(str, known))}")


def _checked(prices: Prices, kind: str, exchange: float) -> dict[str, dict[int, tuple[float, float]]]:
    for name, own in prices.items():
        for b, p in own.items():
            if not (np.isfinite(p.rise) and np.isfinite(p.stderr)):
                raise ValueError(f"{kind} {name!r} at {b} bits has the price {p.rise} ± {p.stderr}; prices must be finite: make them again")
    return {n: {b: (p.rise * exchange, p.stderr * exchange) for b, p in own.items()} for n, own in prices.items()}


def _with_idle(prices: dict[str, dict[int, tuple[float, float]]]) -> dict[str, dict[int, tuple[float, float]]]:
    """A read that is as wide as its tensor costs nothing more."""
    return {n: {b: (0.0, 0.0) if n.endswith(READ) and b >= SUM else p for b, p in own.items()} for n, own in prices.items()}


def chosen(problem: Problem, state: State, rises: np.ndarray, measure: Callable[[Plan], Cost] = cost) -> Choice:
    """A state of a problem as a plan, with its exact cost; ``rises`` are those of :meth:`~.tradeoffs.Problem.rises`."""
    plan, (channels, weights, activations, branches, implants, variance) = problem.plan(state), rises.tolist()
    return Choice(plan, measure(plan), Prediction(channels, weights, activations, branches, implants, variance**0.5))


@dataclass(frozen=True, eq=False)
class Family:
    """The choices along the sweeps of a problem, and near them: moves, how many of them each candidate has made, the candidates that
    follow on these, and costs and rise of all."""

    problem: Problem
    moves: tuple[Moves, ...]
    line: np.ndarray
    stop: np.ndarray
    near: State
    costs: np.ndarray
    rises: np.ndarray

    def state(self, candidate: int) -> State:
        """A candidate."""
        if (n := candidate - len(self.stop)) >= 0:
            return State(*(own[n] for own in vars(self.near).values()))
        stops = self.stop[candidate : candidate + 1]
        return next(self.moves[int(self.line[candidate])].states(self.problem.full(), stops))

    def choice(self, candidate: int, measure: Callable[[Plan], Cost] = cost) -> Choice:
        """A candidate with its exact cost."""
        return chosen(self.problem, self.state(candidate), self.rises[candidate], measure)


def family(problem: Problem, costs: Collection[str] = ("bytes",)) -> Family:
    """Candidates for budgets of these costs: sweeps in which they count by themselves and in even mixtures, and the best there are near
    these.  Where weights may have implants, all of those without any are candidates too, so that to allow them never predicts a larger
    rise."""
    whole = cost(Plan(problem.structure))
    mixes = [np.array([mix.get(c, 0.0) / max(getattr(whole, c), 1) for c in COSTS]) for mix in _mixes(costs)]
    lines = [sweep(problem, mix) for mix in mixes]
    stops = [_stops(len(m.kind), max(POINTS // len(mixes), 100)) for m in lines]
    found = [(problem.costs(s), problem.rises(s)) for m, stop in zip(lines, stops, strict=True) for s in m.states(problem.full(), stop)]
    table = [np.array(column) for column in zip(*found, strict=True)]
    own = _with_near(problem, lines, stops, table, mixes)
    return _united(own, family(problem.without_ranks(), costs)) if problem.ranks.names else own


def _with_near(problem: Problem, lines: list[Moves], stops: list[np.ndarray], table: list[np.ndarray], mixes: list[np.ndarray]) -> Family:
    line = np.repeat(np.arange(len(lines)), [len(s) for s in stops])
    walked = (s for m, stop in zip(lines, stops, strict=True) for s in m.states(problem.full(), stop))
    start = Points(stacked(walked), table[0], table[1]) if room(problem) else points(problem, stacked([problem.full()]))
    near = nearby(problem, start, mixes)
    both = (np.concatenate(pair) for pair in zip(table, (near.costs, near.rises), strict=True))
    return Family(problem, tuple(lines), line, np.concatenate(stops), near.states, *both)


def _united(own: Family, bare: Family) -> Family:
    """The candidates of a problem, and those it has where no weight may have an implant."""
    ranks = np.tile(own.problem.full().ranks, (len(bare.near.rungs), 1))
    near = [np.concatenate(pair) for pair in zip(vars(own.near).values(), vars(replace(bare.near, ranks=ranks)).values(), strict=True)]
    split = len(own.stop), len(bare.stop)
    tables = ((own.costs, bare.costs), (own.rises, bare.rises))
    both = (np.concatenate([a[: split[0]], b[: split[1]], a[split[0] :], b[split[1] :]]) for a, b in tables)
    line, stop = np.concatenate([own.line, bare.line + len(own.moves)]), np.concatenate([own.stop, bare.stop])
    return Family(own.problem, (*own.moves, *bare.moves), line, stop, State(*near), *both)


def _mixes(costs: Collection[str]) -> Iterator[dict[str, float]]:
    """All shares of the costs in steps of one part in :data:`MIXES`; a cost that has no slope here goes with the arithmetic."""
    known = list(dict.fromkeys(c if c in COSTS else "macs" for c in costs))
    for shares in product(range(MIXES + 1), repeat=len(known)):
        if sum(shares) == (MIXES if len(known) > 1 else 1):
            yield dict(zip(known, map(float, shares), strict=True))


def _stops(moves: int, points: int) -> np.ndarray:
    return np.unique(np.linspace(0, moves, min(moves, points) + 1).round().astype(np.int64))


def choose(family: Family, budget: Budget, measure: Callable[[Plan], Cost] = cost) -> Choice:
    """The candidate of least predicted rise that fits the budget.

    Args:
        measure: the cost of a plan, where the budget looks at more than :func:`~curvepress.costs.cost` knows.

    Raises:
        ValueError: if none fits; the message has the smallest costs that can be reached.
    """
    whole = measure(Plan(family.problem.structure))
    fitting = [n for n in np.argsort(family.rises[:, :-1].sum(axis=1), kind="stable").tolist() if _fits(family.costs[n], budget, whole)]
    for n in fitting:
        if budget((found := family.choice(n, measure)).cost, whole):
            return found
    smallest = measure(family.problem.plan(family.state(_nearest(family, budget, whole))))
    kinds = [k for k, o in (("bits", family.problem.weights), ("ranks", family.problem.ranks)) if o.names]
    way_out = f"lower the floor or the multiple{', or allow fewer bits' if 'bits' in kinds else ''}"
    raise ValueError(unreachable(smallest, whole, budget, way_out, by=" and ".join(["widths", *kinds])))


def _nearest(family: Family, budget: Budget, whole: Cost) -> int:
    """The candidate that misses its worst limit by the smallest factor."""
    limits = budget.absolute(whole) if isinstance(budget, AtMost) else {}
    weights = [1 / limits[k] if k in limits else 0.0 for k in COSTS]
    over = (family.costs * (weights if any(weights) else 1.0)).max(axis=1)
    return int(np.lexsort((family.costs.sum(axis=1), over))[0])


def _fits(costs: np.ndarray, budget: Budget, whole: Cost) -> bool:
    known = dict(zip(COSTS, (int(c) for c in costs), strict=True))
    if isinstance(budget, AtMost):
        return all(known[k] <= limit for k, limit in budget.absolute(whole).items() if k in known)
    return budget(Cost(**known), whole)


def search_jointly(
    structure: Structure, scores: Scores, prices: BitPrices | None, wiring: Wiring, budget: Budget, **options: Any
) -> Choice:
    """The gentlest plan that fits the budget; ``options`` are those of :func:`joint_problem`.  Without ``prices`` it is one of widths, and,
    where ``ranks`` are given, of implants, in float.

    Raises:
        ValueError: as that and :func:`choose` do.
    """
    found = joint_problem(structure, scores, prices, wiring, **options)
    return choose(family(found, tuple(budget.limits) if isinstance(budget, AtMost) else ("bytes", "bops")), budget)


@dataclass(frozen=True)
class Probe:
    """One kind of decision made alone: predicted and measured rise of the loss; the latter after recovery."""

    kind: str
    predicted: float
    measured: float


def exchange_rates(probes: Sequence[Probe]) -> Exchange:
    """For each kind, measured over predicted rise of all its probes together; 1 for a kind without probes.

    A rise that recovery takes away altogether counts as a thousandth of what was predicted, for nothing is free.

    Raises:
        ValueError: if a kind is unknown, or nothing was predicted for it.
    """
    rates = {}
    for kind in dict.fromkeys(p.kind for p in probes):
        if kind not in Exchange.__dataclass_fields__:
            raise ValueError(f"probes of {kind!r} are unknown; the kinds are {', '.join(Exchange.__dataclass_fields__)}")
        predicted, measured = (sum(getattr(p, part) for p in probes if p.kind == kind) for part in ("predicted", "measured"))
        if not predicted > 0:
            raise ValueError(f"the probes of {kind} predict a rise of {predicted}; a rate needs one above zero")
        rates[kind] = max(measured / predicted, 1e-3)
    return Exchange(**rates)


def frontier(family: Family, count: int = 12) -> list[Choice]:
    """So many choices that no other candidate beats in both bytes and predicted rise, from the largest, in even ratios of bytes."""
    size, rise = family.costs[:, COSTS.index("bytes")], family.rises[:, :-1].sum(axis=1)
    order = np.lexsort((rise, size))
    kept = order[rise[order] < np.concatenate([[np.inf], np.minimum.accumulate(rise[order])[:-1]])]
    marks = np.geomspace(size[kept].max(), size[kept].min(), count)
    picked = dict.fromkeys(int(kept[np.argmin(np.abs(size[kept] - m))]) for m in marks)
    return [family.choice(n) for n in picked]
