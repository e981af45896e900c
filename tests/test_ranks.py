"""Ranks of implants as choices of the planner: costs and bits are those of the model that comes of it, budgets are kept."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from joint_zoo import attention, blocks, branch_prices, chain, drawn_ranks, everything, residual
from safetensors import safe_open
from test_joint import BITS, states
from torch import nn

from curvepress.bitplan import Wiring
from curvepress.costs import cost
from curvepress.implants import RankPrice
from curvepress.plan import Plan, after, from_json, lost, to_json
from curvepress.planner.channels import at_most
from curvepress.planner.depth import around
from curvepress.planner.exactly import exact
from curvepress.planner.joint import Exchange, choose, family, joint_problem, search_jointly
from curvepress.planner.ranks import priced, rank_rise
from curvepress.planner.tradeoffs import COSTS, Problem, State
from curvepress.planner.wiring import bits_of_plan, wiring
from curvepress.quantization.bitwidths import BitPrices
from curvepress.quantization.quantized import calibrate, packed, quantize
from curvepress.scores import Scores, predicted_rise
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply

MODELS = {"residual": residual, "attention": attention, "chain": chain, "blocks": blocks}


@cache
def given(name: str) -> tuple[nn.Module, torch.Tensor, Structure, Scores, BitPrices, Wiring]:
    """A model, an example, and what is known of it."""
    model, x = MODELS[name]()
    return model, x, *everything(model, x)


def problem_of(name: str, *, bits: bool = True) -> Problem:
    """A problem, with a price for every branch and every implant."""
    model, _, structure, scores, prices, wired = given(name)
    more: dict[str, Any] = {"ranks": drawn_ranks(model, structure), "branches": branch_prices(structure)}
    return joint_problem(structure, scores, prices, wired, bits=BITS, **more) if bits else joint_problem(structure, scores, **more)


def with_ranks(problem: Problem, count: int = 8) -> list[State]:
    """Choices with ranks drawn at random."""
    rng = np.random.default_rng(5)
    drawn = [[rng.choice(np.flatnonzero(np.isfinite(row))) for row in problem.ranks.rise] for _ in range(count)]
    return [replace(s, ranks=np.array(r)) for s, r in zip(states(problem, count - 1), drawn, strict=True)]


def lowest(problem: Problem) -> State:
    """Every width one step down, fewest bits, and the lowest rank of every weight."""
    narrow = np.array([min(1, len(w.widths) - 1) for w in problem.ladders], dtype=np.int64)
    columns = [[np.flatnonzero(np.isfinite(row))[-1] for row in o.rise] for o in (problem.weights, problem.activations, problem.ranks)]
    return State(narrow, *(np.array(c, dtype=np.int64) for c in columns))


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_costs_in_arrays_are_those_of_the_plan(name: str, bits: bool) -> None:
    problem = problem_of(name, bits=bits)
    assert problem.ranks.names
    seen = 0
    for state in with_ranks(problem):
        plan = problem.plan(state)
        assert dict(zip(COSTS, problem.costs(state).tolist(), strict=True)) == cost(plan).known()
        assert from_json(to_json(plan)) == plan
        seen += len(plan.implants)
    assert seen


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"blocks"}))
def test_bits_of_a_plan_with_implants_are_for_the_model_that_comes_of_it(name: str, tmp_path: Path) -> None:
    model, x, structure, scores, prices, wired = given(name)
    problem = joint_problem(structure, scores, prices, wired, bits=BITS, ranks=drawn_ranks(model, structure))
    plan = problem.plan(lowest(problem))
    assert len(plan.implants) > 1 and plan.keep
    small = apply(model, plan, x)
    bare = Plan(structure, implants=plan.implants)
    assert plan.bits is not None and plan.bits.wiring == wiring(apply(model, bare, x), after(bare), x)
    module = quantize(small, bits_of_plan(plan), x)
    packed.save(calibrate(module, [(x, x)]), tmp_path / "packed.safetensors")
    with safe_open(tmp_path / "packed.safetensors", "pt") as file:
        content = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for k, t in content.items() if k not in ("index", "digest")) == cost(plan).bytes


@pytest.mark.parametrize("bits", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_budgets_are_met_and_looser_ones_predict_no_larger_rise(name: str, bits: bool) -> None:
    problem = problem_of(name, bits=bits)
    whole, seen = cost(Plan(problem.structure)), 0
    for costs in (("bytes",), ("params", "macs")):
        candidates, last = family(problem, costs), np.inf
        low = candidates.costs.min(axis=0)
        for part in (0.05, 0.3, 0.6, 0.9):
            limits = {c: int(low[COSTS.index(c)] + part * (getattr(whole, c) - low[COSTS.index(c)])) for c in costs}
            found = choose(candidates, at_most(**limits))
            assert all(getattr(found.cost, k) <= v for k, v in limits.items()) and found.cost == cost(found.plan)
            assert found.predicted.rise <= last
            last, seen = found.predicted.rise, seen + len(found.plan.implants)
    assert seen or name in ("blocks", "chain")


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_to_allow_implants_never_predicts_a_larger_rise_and_without_any_nothing_changes(name: str) -> None:
    model, _, structure, scores, *_ = given(name)
    allowed, gained = drawn_ranks(model, structure), []
    dear = {n: {r: RankPrice(1e6, 0.0, 0, 0) for r in own} for n, own in allowed.items()}
    for share in (0.2, 0.4, 0.7):
        plain, none, free, closed = (
            search_jointly(structure, scores, None, Wiring(), at_most(params=share), **how)
            for how in ({}, {"ranks": {}}, {"ranks": allowed}, {"ranks": dear})
        )
        assert none == plain and closed.plan == plain.plan
        gained.append(plain.predicted.rise - free.predicted.rise)
    assert min(gained) >= 0 < max(gained)


def test_the_predicted_rise_is_that_of_channels_and_of_ranks_by_the_share_that_is_left() -> None:
    model, _, structure, scores, *_ = given("residual")
    prices = drawn_ranks(model, structure)
    for rate in (1.0, 0.5):
        problem = joint_problem(structure, scores, ranks=prices, exchange=Exchange(implants=rate))
        for state in with_ranks(problem):
            plan, rises = problem.plan(state), problem.rises(state)
            wanted, error = rank_rise(prices, plan)
            assert rises[4] == pytest.approx(rate * wanted)
            gone, spread = predicted_rise(scores, {g.name: lost(plan, g) for g in structure.free})
            assert rises[0] == pytest.approx(gone) and rises[5] == pytest.approx((rate * error) ** 2 + spread**2)


def test_an_implant_that_is_no_smaller_than_what_is_left_of_the_weight_is_not_made() -> None:
    (model, x, *_), problem = given("chain"), problem_of("chain", bits=False)
    state = replace(problem.full(), ranks=np.array([np.flatnonzero(np.isfinite(row))[1] for row in problem.ranks.rise]))
    narrow = replace(state, rungs=np.array([len(w.widths) - 1 for w in problem.ladders]))
    assert problem.plan(state).implants and not problem.plan(narrow).implants
    assert problem.rises(narrow)[4] == 0
    apply(model, problem.plan(state), x)


def test_around_branches_that_are_left_out_implants_stay() -> None:
    model, _, structure, scores, *_ = given("blocks")
    skip = [structure.branches[0].name]
    prices = drawn_ranks(model, structure)
    state = {n: own for n, own in prices.items() if n not in structure.branches[0].tensors}

    def all_implants(short: object, own: object) -> Plan:
        problem = joint_problem(short, own, ranks=state)  # type: ignore[arg-type]
        return problem.plan(replace(problem.full(), ranks=lowest(problem).ranks))

    plan = around(structure, scores, skip, all_implants)  # type: ignore[arg-type]
    assert plan.implants and plan.implants.keys() <= state.keys() and plan.skip == tuple(skip)


def test_what_cannot_be_weighed_is_refused() -> None:
    model, _, structure, scores, *_ = given("chain")
    name, own = next(iter(drawn_ranks(model, structure).items()))
    with pytest.raises(ValueError, match=f"rank 1 of '{name}' has the price nan"):
        joint_problem(structure, scores, ranks={name: {1: RankPrice(np.nan, 0.0, 0, 0)}})
    with pytest.raises(ValueError, match="cannot be weighed against bits or ranks"):
        joint_problem(structure, replace(scores, unit="relative"), ranks={name: own})
    with pytest.raises(ValueError, match="the smallest that widths and ranks can make this model is"):
        search_jointly(structure, scores, None, Wiring(), at_most(params=2), ranks={name: own})
    with pytest.raises(ValueError, match="does not choose ranks"):
        exact(joint_problem(structure, scores, ranks={name: own}), {"params": 10})
    problem = joint_problem(structure, scores, ranks={name: own})
    plan = problem.plan(replace(problem.full(), ranks=np.array([1])))
    with pytest.raises(ValueError, match=r"rank \d has no price; those of this weight that have one are 7"):
        priced({name: {7: RankPrice(0.0, 0.0, 0, 0)}}, plan, name)


def test_a_weight_that_is_read_twice_stays_whole() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.shared(self.shared(self.first(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 3)
    structure, scores, prices, wired = everything(model, x)
    ranks = drawn_ranks(model, structure)
    assert "shared.weight" in ranks
    assert "shared.weight" not in joint_problem(structure, scores, prices, wired, bits=BITS, ranks=ranks).ranks.names
    assert "shared.weight" in joint_problem(structure, scores, ranks=ranks).ranks.names


def test_both_parts_of_an_implant_are_rounded_and_each_is_charged_for() -> None:
    _, _, structure, scores, prices, wired = given("chain")
    low = drawn_ranks(given("chain")[0], structure)
    problem = joint_problem(structure, scores, prices, wired, bits=BITS, ranks=low)
    state = replace(lowest(problem), rungs=problem.full().rungs)
    implants, rise = problem.plan(state).implants, 0.0
    for row, name in enumerate(problem.weights.names):
        rise += problem.weights.rise[row, state.weights[row]] * (2 if name in implants else 1)
    assert implants and problem.rises(state)[1] == pytest.approx(rise)
