"""Widths and bits in one plan: exact costs, budgets kept, and the best of all choices on small problems."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from joint_zoo import attention, chain, everything, residual
from safetensors import safe_open

from curvepress.costs import cost
from curvepress.exactly import exact
from curvepress.joint import Bitwidths, choose, family, joint_problem
from curvepress.plan import Plan, from_json, lost, tensors_after, to_json
from curvepress.planner import at_most
from curvepress.quantized import calibrate, packed, quantize
from curvepress.scores import predicted_rise
from curvepress.surgery import apply
from curvepress.tradeoffs import COSTS, Problem, State
from curvepress.wiring import bits_of_plan

MODELS = {"residual": residual, "attention": attention, "chain": chain}
BITS = Bitwidths((2, 3, 4, 8), (4, 8))


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
    problem = joint_problem(*everything(*MODELS[name]()), bits=BITS)
    for state in states(problem):
        plan = problem.plan(state)
        assert dict(zip(COSTS, problem.costs(state).tolist(), strict=True)) == vars(cost(plan))
        assert from_json(to_json(plan)) == plan


@pytest.mark.parametrize("name", MODELS)
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
            found = min(found, problem.rises(state)[:3].sum())
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_plan_is_the_best_of_all_and_the_sweep_is_near(seed: int) -> None:
    problem = joint_problem(*everything(*chain((4, 3), seed), seed), bits=Bitwidths((2, 4, 8), (8,)))
    whole = vars(cost(Plan(problem.structure)))
    for limits in ({"bytes": 0.45}, {"bytes": 0.6}, {"bytes": 0.7, "macs": 0.6}, {"params": 0.5}, {"bops": 0.02}):
        absolute = {k: v * whole[k] for k, v in limits.items()}
        best = best_of_all(problem, absolute)
        if not np.isfinite(best):
            continue
        found = exact(problem, absolute)
        assert found.rise == pytest.approx(best, rel=1e-4)
        ours = choose(family(problem, tuple(limits)), at_most(**limits))
        assert best <= ours.predicted.rise * (1 + 1e-9)
        assert ours.predicted.rise <= 2 * best


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_fits_its_budget_and_a_looser_one_never_predicts_a_larger_rise(name: str) -> None:
    problem = joint_problem(*everything(*MODELS[name]()), bits=BITS)
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


def test_the_predicted_rise_is_the_sum_of_its_parts() -> None:
    structure, scores, prices, wiring = everything(*residual())
    problem = joint_problem(structure, scores, prices, wiring, bits=BITS)
    for state in states(problem):
        plan, (channels, weights, _, _) = problem.plan(state), problem.rises(state).tolist()
        wanted, _ = predicted_rise(scores, {g.name: lost(plan, g) for g in structure.free})
        assert channels == pytest.approx(wanted)
        sizes = {n: np.prod(t.shape) / np.prod(structure.tensors[n].shape) for n, t in tensors_after(plan).items()}
        assert weights == pytest.approx(sum(prices.weights[n][b].rise * sizes[n] for n, b in plan.bits.weights.items()))
