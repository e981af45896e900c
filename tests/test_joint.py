"""Widths and bits in one plan: exact costs, budgets kept, and the best of all choices on small problems."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joint_zoo import attention, blocks, branch_prices, chain, everything, residual
from safetensors import safe_open

from curvepress.costs import Cost, cost
from curvepress.plan import Plan, from_json, lost, tensors_after, to_json
from curvepress.planner.alignment import Shape
from curvepress.planner.channels import at_most
from curvepress.planner.exactly import best, exact
from curvepress.planner.joint import (
    Bitwidths,
    Exchange,
    Family,
    Probe,
    choose,
    exchange_rates,
    family,
    frontier,
    joint_problem,
    search_jointly,
)
from curvepress.planner.neighbours import points, stacked
from curvepress.planner.tradeoffs import COSTS, Problem, State
from curvepress.planner.wiring import bits_of_plan
from curvepress.quantization.bitwidths import Price
from curvepress.quantization.quantized import calibrate, packed, quantize
from curvepress.scores import predicted_rise
from curvepress.surgery.cutting import apply

MODELS = {"residual": residual, "attention": attention, "chain": chain, "blocks": blocks}
BITS = Bitwidths((2, 3, 4, 8), (4, 8))


def problem_of(name: str, seed: int = 0, bits: Bitwidths = BITS) -> Problem:
    """A problem with a price for every residual branch."""
    own = everything(*MODELS[name](seed=seed), seed)
    return joint_problem(*own, bits=bits, branches=branch_prices(own[0], seed))


def states(problem: Problem, count: int = 6, seed: int = 0) -> list[State]:
    rng = np.random.default_rng(seed)
    tops = [len(x.widths) for x in problem.ladders]
    found = [problem.full()]
    for _ in range(count):
        sides = [[rng.choice(np.flatnonzero(np.isfinite(row))) for row in o.rise] for o in (problem.weights, problem.activations)]
        rungs = np.array([rng.integers(0, t) for t in tops])
        found.append(State(rungs, *(np.array(s, dtype=np.int64) for s in sides)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_costs_in_arrays_are_those_of_the_plan(name: str) -> None:
    problem = problem_of(name)
    for state in states(problem):
        plan = problem.plan(state)
        assert dict(zip(COSTS, problem.costs(state).tolist(), strict=True)) == cost(plan).known()
        assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"blocks"}))
def test_bytes_of_a_plan_are_those_in_the_packed_file(name: str, tmp_path: Path) -> None:
    model, x = MODELS[name]()
    problem = joint_problem(*everything(model, x), bits=BITS)
    for state in states(problem, 3):
        plan = problem.plan(state)
        small = apply(model, plan, x)
        module = quantize(small, bits_of_plan(plan), x)
        packed.save(calibrate(module, [(x, x)]), tmp_path / "packed.safetensors")
        with safe_open(tmp_path / "packed.safetensors", "pt") as file:
            content = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        held = sum(t.numel() * t.element_size() for k, t in content.items() if k not in ("index", "digest"))
        assert held == cost(plan).bytes


def best_of_all(problem: Problem, limits: dict[str, float]) -> float:
    """Every choice there is, one by one."""
    ranges = [range(len(x.widths)) for x in problem.ladders]
    columns = [np.flatnonzero(np.isfinite(row)) for o in (problem.weights, problem.activations) for row in o.rise]
    found, split = np.inf, (len(ranges), len(ranges) + len(problem.weights.names))
    for c in product(*ranges, *columns):
        state = State(*(np.array(part, dtype=np.int64) for part in (c[: split[0]], c[split[0] : split[1]], c[split[1] :])))
        costs = dict(zip(COSTS, problem.costs(state), strict=True))
        if all(costs[k] <= v for k, v in limits.items()):
            found = min(found, problem.rises(state)[:-1].sum())
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_plan_is_the_best_of_all_and_the_sweep_is_near(seed: int) -> None:
    check_against_all(joint_problem(*everything(*chain((4, 3), seed), seed), bits=Bitwidths((2, 4, 8), (8,))))


@pytest.mark.parametrize("seed", range(4))
def test_so_it_is_with_branches(seed: int) -> None:
    check_against_all(problem_of("blocks", seed, Bitwidths((4, 8), (8,))))


def check_against_all(problem: Problem) -> None:
    """The proven plan is the best there is, and the sweep's is not far from it."""
    whole = vars(cost(Plan(problem.structure)))
    for limits in ({"bytes": 0.45}, {"bytes": 0.6}, {"bytes": 0.7, "macs": 0.6}, {"params": 0.5}, {"bops": 0.02}):
        absolute = {k: v * whole[k] for k, v in limits.items()}
        least = best_of_all(problem, absolute)
        if not np.isfinite(least):
            continue
        found = exact(problem, absolute)
        assert found.rise == pytest.approx(least, rel=1e-4)
        ours = choose(family(problem, tuple(limits)), at_most(**limits))
        assert least <= ours.predicted.rise * (1 + 1e-9)
        assert ours.predicted.rise <= 1.01 * least


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_fits_its_budget_and_a_looser_one_never_predicts_a_larger_rise(name: str) -> None:
    problem = problem_of(name)
    whole = cost(Plan(problem.structure))
    for costs in (("bytes",), ("bops",), ("params",), ("bytes", "macs")):
        candidates, last = family(problem, costs), np.inf
        low = candidates.costs.min(axis=0)
        for part in (0.0, 0.02, 0.1, 0.3, 0.6, 0.9):
            limits = {c: int(low[COSTS.index(c)] + part * (getattr(whole, c) - low[COSTS.index(c)])) for c in costs}
            try:
                found = choose(candidates, at_most(**limits))
            except ValueError:
                assert part == 0.0 and len(costs) > 1
                continue
            assert all(getattr(found.cost, k) <= v for k, v in limits.items())
            assert found.predicted.rise <= last
            last = found.predicted.rise


@pytest.mark.parametrize("name", MODELS)
def test_several_choices_at_once_are_what_each_is_alone(name: str) -> None:
    problem = problem_of(name)
    alone = states(problem)
    found = points(problem, stacked(alone))
    assert np.array_equal(found.costs, [problem.costs(s) for s in alone])
    assert found.rises == pytest.approx(np.array([problem.rises(s) for s in alone]), rel=1e-12)


@lru_cache
def searched(name: str, costs: tuple[str, ...]) -> tuple[Family, Cost]:
    problem = problem_of(name)
    return family(problem, costs), cost(Plan(problem.structure))


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), parts=st.lists(st.floats(0, 1), min_size=2, max_size=12), both=st.booleans())
def test_over_all_budgets_the_rise_only_falls_and_is_never_above_that_of_the_sweep(name: str, parts: list[float], both: bool) -> None:
    costs = ("bytes", "macs") if both else ("bytes",)
    (found, whole), last = searched(name, costs), np.inf
    columns, swept = [COSTS.index(c) for c in costs], len(found.stop)
    low, rises = found.costs[:, columns].max(axis=0) * 0.2, found.rises[:, :-1].sum(axis=1)
    for part in sorted(parts):
        limits = {c: int(x + part * (getattr(whole, c) - x)) for c, x in zip(costs, low.tolist(), strict=True)}
        fits = (found.costs[:swept, columns] <= list(limits.values())).all(axis=1)
        if not fits.any():
            continue
        choice = choose(found, at_most(**limits))
        assert all(getattr(choice.cost, c) <= limit for c, limit in limits.items())
        assert choice.predicted.rise <= min(last, rises[:swept][fits].min()) + 1e-12
        last = choice.predicted.rise


def test_the_same_problem_has_the_same_candidates() -> None:
    one, other = (family(problem_of("residual"), ("bytes", "macs")) for _ in range(2))
    assert np.array_equal(one.costs, other.costs) and np.array_equal(one.rises, other.rises)


@pytest.mark.parametrize("seconds", [1e-3, 20.0])
def test_the_proven_choice_fits_and_is_never_worse_than_the_search(seconds: float) -> None:
    problem = joint_problem(*everything(*residual()), bits=Bitwidths((2, 4, 8), (8,)), shape=Shape(multiple=2))
    candidates = family(problem)
    for share in (0.2, 0.4):
        limit = at_most(bytes=share)
        try:
            found, bound = best(candidates, limit, seconds)
        except ValueError as error:
            assert seconds < 1 and "was found in 0.001 s" in str(error)
            continue
        assert limit(found.cost, cost(Plan(problem.structure)))
        assert bound * (1 - 1e-6) <= found.predicted.rise <= choose(candidates, limit).predicted.rise
        assert seconds < 1 or found.predicted.rise == pytest.approx(bound, rel=1e-4)


def test_the_nearest_to_budgets_out_of_reach_is_the_least_of_what_is_limited() -> None:
    candidates = family(problem_of("residual"), ("macs",))
    with pytest.raises(ValueError, match="no plan fits") as error:
        choose(candidates, at_most(macs=2))
    assert f"macs {int(candidates.costs[:, COSTS.index('macs')].min()):,} (" in str(error.value)
    with pytest.raises(ValueError, match=r"\(\d.*; too much is still macs\. Allow more"):
        choose(candidates, at_most(macs=2, params=0.9))


def test_the_predicted_rise_is_the_sum_of_its_parts() -> None:
    structure, scores, prices, wiring = everything(*residual())
    problem = joint_problem(structure, scores, prices, wiring, bits=BITS)
    for state in states(problem):
        plan, (channels, weights, *_) = problem.plan(state), problem.rises(state).tolist()
        wanted, _ = predicted_rise(scores, {g.name: lost(plan, g) for g in structure.free})
        assert channels == pytest.approx(wanted)
        sizes = {n: np.prod(t.shape) / np.prod(structure.tensors[n].shape) for n, t in tensors_after(plan).items()}
        assert weights == pytest.approx(sum(prices.weights[n][b].rise * sizes[n] for n, b in plan.bits.weights.items()))


def test_what_is_inside_a_branch_that_is_gone_costs_nothing_and_is_not_charged_for() -> None:
    problem = problem_of("blocks")
    branch = next(n for n, w in enumerate(problem.ladders) if w.branch)
    inner = [k for k, n in zip(problem.arrays["inner"], problem.arrays["around"], strict=True) if n == branch]
    assert inner and all(problem.ladders[k].groups for k in inner)
    whole = problem.full()
    gone, narrow = (replace(whole, rungs=whole.rungs.copy()) for _ in range(2))
    gone.rungs[branch], narrow.rungs[branch] = 1, 1
    narrow.rungs[inner] = 1
    assert problem.costs(gone).tolist() == problem.costs(narrow).tolist()
    assert problem.rises(gone).tolist() == problem.rises(narrow).tolist()
    assert problem.rises(gone)[3] == problem.ladders[branch].rises[1] > 0
    assert problem.rises(gone)[1] < problem.rises(whole)[1]


def test_a_branch_that_costs_next_to_nothing_goes_first() -> None:
    own = everything(*blocks())
    names = [b.name for b in own[0].branches]
    found = search_jointly(*own, at_most(bytes=0.7), bits=BITS, branches={names[1]: (1e-9, 0.0), names[0]: (1e9, 0.0)})
    assert found.plan.skip == (names[1],) and found.predicted.branches == 1e-9
    with pytest.raises(ValueError, match=f"branch '{names[0]}' has the price nan"):
        joint_problem(*own, bits=BITS, branches={names[0]: (float("nan"), 0.0)})
    with pytest.raises(ValueError, match="a price for branch 'none': the branches are"):
        joint_problem(*own, bits=BITS, branches={"none": (0.1, 0.0)})


def test_prices_that_are_not_numbers_and_budgets_out_of_reach_are_refused() -> None:
    structure, scores, prices, wiring = everything(*chain())
    (name,) = [g.name for g in structure.free][:1]
    bad = replace(scores, values={**scores.values, name: scores.values[name] * np.nan})
    with pytest.raises(ValueError, match=f"group '{name}' has the score nan; scores must be finite"):
        joint_problem(structure, bad, prices, wiring, bits=BITS)
    weights = {**prices.weights, "0.weight": {4: Price(float("nan"), 0.0)}}
    with pytest.raises(ValueError, match=r"weight '0.weight' at 4 bits has the price nan"):
        joint_problem(structure, scores, replace(prices, weights=weights), wiring, bits=BITS)
    with pytest.raises(ValueError, match=r"0.weight may have 5 bits, but has prices for 2, 3, 4, 8, 32"):
        joint_problem(structure, scores, prices, wiring, bits=Bitwidths((5,)))
    with pytest.raises(ValueError, match="cannot be weighed against bits"):
        joint_problem(structure, replace(scores, unit="relative"), prices, wiring, bits=BITS)
    with pytest.raises(
        ValueError, match=r"no plan fits .*bytes at most 10.*the smallest that widths and bits can make this model is: .*bytes"
    ):
        search_jointly(structure, scores, prices, wiring, at_most(bytes=10, macs=0.9), bits=BITS)


def test_constraints_are_kept() -> None:
    structure, scores, prices, wiring = everything(*residual())
    bits = Bitwidths({n: (8,) if n == "stem.weight" else (2, 4) for n in prices.weights}, (8,))
    problem = joint_problem(structure, scores, prices, wiring, bits=bits, shape=Shape(multiple=4, floor=0.5, whole=("stem",)))
    candidates = family(problem)
    smallest = problem.plan(candidates.state(len(candidates.stop) - 1))
    assert smallest.bits is not None and smallest.bits.weights["stem.weight"] == 8 and set(smallest.bits.weights.values()) == {2, 8}
    assert "stem" not in smallest.keep and smallest.keep
    assert all(len(c) % 4 == 0 and len(c) >= structure[n].size / 2 for n, c in smallest.keep.items())


def test_with_all_channels_held_only_bits_are_chosen() -> None:
    plan = search_jointly(*everything(*residual()), at_most(bytes=0.3), bits=BITS, shape=Shape(whole=("*",))).plan
    assert not plan.keep and plan.bits is not None and min(b for b in plan.bits.weights.values() if b) < 8


def test_rates_of_exchange_are_measured_over_predicted() -> None:
    probes = [Probe("channels", 2.0, 0.1), Probe("channels", 4.0, 0.2), Probe("weights", 1.0, -0.5)]
    assert vars(exchange_rates(probes)) == pytest.approx(
        {"channels": 0.05, "weights": 1e-3, "activations": 1.0, "branches": 1.0, "implants": 1.0}
    )
    with pytest.raises(ValueError, match="probes of 'heads' are unknown"):
        exchange_rates([Probe("heads", 1.0, 1.0)])
    with pytest.raises(ValueError, match="predict a rise of 0"):
        exchange_rates([Probe("weights", 0.0, 1.0)])


def test_rates_move_the_plan_towards_what_recovers() -> None:
    own = everything(*residual())
    cheap, dear = (
        search_jointly(*own, at_most(bytes=0.3), bits=BITS, exchange=Exchange(channels=rate)).cost.params for rate in (1e-3, 1e3)
    )
    assert cheap < dear


def test_the_frontier_falls_in_bytes_as_it_rises_in_loss() -> None:
    points = frontier(family(joint_problem(*everything(*residual()), bits=BITS)), 6)
    assert len(points) > 3
    for one, other in pairwise(points):
        assert one.cost.bytes > other.cost.bytes and one.predicted.rise < other.predicted.rise


def test_a_budget_is_met_where_nothing_costs_anything_and_bits_leave_no_choice() -> None:
    structure, scores, prices, wired = everything(*residual())
    zeros = replace(scores, values={g: np.zeros_like(v) for g, v in scores.values.items()})
    found = search_jointly(structure, zeros, prices, wired, at_most(params=0.3), bits=Bitwidths((8,)))
    assert found.cost.params <= 0.3 * cost(Plan(structure)).params
