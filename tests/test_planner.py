"""Budgets, the search, and the exact cost of small cases."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from zoo import make

from curvepress.costs import Cost, cost
from curvepress.plan import Plan, kept, lost
from curvepress.planner.channels import at_most, search, usual
from curvepress.scores import RELATIVE_UNIT, Scores, predicted_rise
from curvepress.structure import Structure
from curvepress.tracing.watching import trace


def structure_of(name: str = "vgg") -> Structure:
    case = make(name)
    return trace(case.model, *case.example)


def scored(structure: Structure, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    values = {g.name: rng.random(g.size) for g in structure.free}
    return Scores(values, {k: np.zeros_like(v) for k, v in values.items()}, "test", "rise of the loss", 1, seed)


def test_the_cost_of_a_plan_written_out() -> None:
    structure = structure_of("mlp")
    plan = Plan(structure, {"net.1": (0, 5), "net.3": (1, 2, 3)})
    params = (192 * 2 + 2) + (2 * 3 + 3) + 3 + (3 * 5 + 5)
    assert cost(plan) == Cost(params=params, bytes=8 * params, macs=192 * 2 + 2 * 3 + 3 * 5, bops=1024 * (192 * 2 + 2 * 3 + 3 * 5))


@pytest.mark.parametrize(
    ("limits", "fits"),
    [({"params": 0.5}, True), ({"params": 0.49}, False), ({"params": 50}, True), ({"params": 49}, False), ({"params": 1.0}, True),
     ({"params": 1}, False), ({"params": 0.5, "macs": 0.2}, False), ({"bytes": 200.0}, True)],
)  # fmt: skip
def test_limits_are_shares_or_absolute(limits: dict[str, float], fits: bool) -> None:
    assert at_most(**limits)(Cost(50, 200, 300), Cost(100, 400, 1000)) is fits


def test_wrong_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="the costs are params, bytes, macs"):
        at_most(flops=0.5)
    with pytest.raises(ValueError, match="params=-1.* must be positive"):
        at_most(params=-1)
    with pytest.raises(ValueError, match="needs a limit"):
        at_most()


def test_a_budget_reads_as_it_was_meant() -> None:
    assert str(at_most(params=0.5, macs=100000)) == "params at most 0.5 of the original, macs at most 100,000"


def test_any_function_is_a_budget() -> None:
    structure = structure_of()
    plan = search(structure, scored(structure), lambda now, whole: now.params + now.macs / 10 <= whole.params)
    now, whole = cost(plan), cost(Plan(structure))
    assert now.params + now.macs / 10 <= whole.params


def test_an_impossible_budget_names_the_smallest_cost() -> None:
    structure = structure_of()
    least = cost(Plan(structure, {g.name: (0,) for g in structure.free}))
    with pytest.raises(ValueError, match=f"params at most 0.01 of the original.*params {least.params:,} "):
        search(structure, scored(structure), at_most(params=0.01), floor=0)


@pytest.mark.parametrize("multiple", [2, 4, 5])
def test_widths_are_held_to_multiples(multiple: int) -> None:
    structure = structure_of()
    plan = search(structure, scored(structure), at_most(params=0.6), multiple=multiple)
    assert plan.keep
    assert all(len(kept(plan, g)) % multiple == 0 or len(kept(plan, g)) == g.size for g in structure.free)


def test_the_floor_holds() -> None:
    structure = structure_of()
    plan = search(structure, scored(structure), at_most(params=0.5), floor=0.5)
    assert all(len(kept(plan, g)) >= g.size / 2 for g in structure.free)


def test_the_search_cannot_be_bettered_by_dropping_fewer_of_the_same_order() -> None:
    """Every plan of the family that fits drops at least as much as the one found."""
    structure, budget = structure_of(), at_most(params=0.7)
    scores = scored(structure)
    plan = search(structure, scores, budget, floor=0)
    dropped = sum(len(lost(plan, g)) for g in structure.free)
    ranked = sorted((v, g.name, c) for g in structure.free for c, v in enumerate(scores.values[g.name]))
    for count in range(dropped):
        gone = {(name, c) for _, name, c in ranked[:count]}
        keep = {g.name: tuple(c for c in range(g.size) if (g.name, c) not in gone) for g in structure.free}
        assert not budget(cost(Plan(structure, keep)), cost(Plan(structure)))


def test_worth_per_parameter_is_the_lagrangian_optimum_on_a_separable_model() -> None:
    """With one group, any way to keep k channels costs the same: the best k must stay."""
    structure = structure_of("groupnormnet")
    scores = scored(structure)
    plan = search(structure, scores, at_most(params=0.6), per="params", floor=0)
    for g in structure.free:
        stay = set(kept(plan, g).tolist())
        best = set(np.argsort(-scores.values[g.name], kind="stable")[: len(stay)].tolist())
        assert stay == best


@pytest.mark.parametrize(
    ("limits", "per"),
    [({"params": 0.5}, "params"), ({"macs": 0.5}, "macs"), ({"params": 0.5, "macs": 0.5}, "channel"),
     ({"params": 1.0, "latency": 0.5}, "latency")],
)  # fmt: skip
def test_scores_are_divided_by_what_is_limited_where_that_is_one_cost(limits: dict[str, float], per: str) -> None:
    scores = scored(structure_of())
    assert usual(scores, at_most(**limits)) == per
    assert usual(replace(scores, unit=RELATIVE_UNIT), at_most(**limits)) == (per if per == "latency" else "channel")
    assert usual(scores, lambda now, whole: True) == "channel"


def test_the_rise_of_plans_adds_up_exactly() -> None:
    structure = structure_of()
    scores = scored(structure)
    for keep in product([(0, 1), (0, 2, 3)], repeat=2):
        plan = Plan(structure, {"features.0": keep[0], "features.4": keep[1]})
        gone = {g.name: lost(plan, g) for g in structure.free}
        by_hand = sum(v for g in structure.free for c, v in enumerate(scores.values[g.name]) if c not in kept(plan, g))
        assert predicted_rise(scores, gone)[0] == pytest.approx(by_hand)


def test_scores_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        search(structure_of("vgg"), scored(structure_of("mlp")), at_most(params=0.5))


@pytest.mark.parametrize("wrong", [{"per": "watt"}, {"multiple": 0}, {"floor": 2.0}, {"multiple": {"head": 0}}, {"whole": "head"}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    structure = structure_of()
    with pytest.raises(ValueError, match="search needs per in|widths need multiple"):
        search(structure, scored(structure), at_most(params=0.5), **wrong)
