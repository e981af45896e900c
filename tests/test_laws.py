"""The laws that every network of the zoo must satisfy, for random plans."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO, Case, make

from curvepress.costs import cost
from curvepress.plan import Plan, after, from_json, kept, lost, to_json
from curvepress.planner.channels import at_most, search, worths
from curvepress.planner.rounds import composed, remainder
from curvepress.runs.artifacts import fill
from curvepress.scores import Scores, predicted_rise
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace

SEEDS = range(3)


def random_plan(structure: Structure, seed: int, least: int = 2) -> Plan:
    """Random channels of about two thirds of the free groups, at least ``least`` of each."""
    rng, keep = random.Random(seed), {}
    for group in structure.free:
        if rng.random() < 0.67 and group.size > least:
            keep[group.name] = tuple(rng.sample(range(group.size), rng.randint(least, group.size)))
    return Plan(structure, keep)


@dataclass(frozen=True)
class Cut(Case):
    structure: Structure
    plan: Plan


@pytest.fixture(scope="module", params=[(name, seed) for name in ZOO for seed in SEEDS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Cut:
    name, seed = request.param
    made = make(name, seed)
    structure = trace(made.model, *made.example)
    return Cut(made.name, made.model, made.example, structure, random_plan(structure, seed))


@pytest.fixture(scope="module")
def small(case: Cut) -> torch.nn.Module:
    return apply(case.model, case.plan, *case.example)


def test_law_1_an_empty_plan_changes_no_bit(case: Cut) -> None:
    assert torch.equal(apply(case.model, Plan(case.structure))(*case.example), case.model(*case.example))


def test_law_2_pruned_is_masked(case: Cut, small: torch.nn.Module) -> None:
    other = tuple(torch.randn_like(x) for x in case.example)
    torch.testing.assert_close(small(*other), masked_output(case.model, case.plan, other), rtol=1e-9, atol=1e-10)


def test_law_2_any_batch_size(case: Cut, small: torch.nn.Module) -> None:
    single = tuple(x[:1] for x in case.example)
    torch.testing.assert_close(small(*single), small(*case.example)[:1], rtol=1e-8, atol=1e-9)


def test_law_3_the_given_model_is_untouched(case: Cut) -> None:
    before, modes = copy.deepcopy(case.model.state_dict()), [m.training for m in case.model.modules()]
    apply(case.model, case.plan, *case.example)
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
    assert modes == [m.training for m in case.model.modules()]


def test_law_4_cost_is_known_without_the_model(case: Cut, small: torch.nn.Module) -> None:
    now = cost(case.plan)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel of the CPU is not counted
        small(*case.example)
    unique = {id(t): t for t in small.state_dict(keep_vars=True).values()}.values()
    assert now.params == sum(p.numel() for p in small.parameters())
    assert now.bytes == sum(t.numel() * t.element_size() for t in unique)
    assert 2 * now.macs * len(case.example[0]) == counter.get_total_flops()


def comparable(structure: Structure) -> tuple[object, ...]:
    groups = [(g.name, g.size, g.members, g.frozen) for g in structure.groups if g.size > 1]
    return (dict(structure.tensors), groups)


def test_law_5_tracing_the_result_gives_the_structure_after(case: Cut, small: torch.nn.Module) -> None:
    assert comparable(trace(small, *case.example)) == comparable(after(case.plan))


def test_law_7_rounds_compose(case: Cut, small: torch.nn.Module) -> None:
    second = random_plan(after(case.plan), 7)
    smaller = apply(small, second, *case.example)
    assert cost(second).params == sum(p.numel() for p in smaller.parameters())
    keep = {}
    for group in case.structure.free:
        for later in second.structure.groups:
            if (later.name, later.size) == (group.name, len(kept(case.plan, group))):
                keep[group.name] = tuple(kept(case.plan, group)[kept(second, later)].tolist())
    at_once = apply(case.model, Plan(case.structure, keep), *case.example)
    torch.testing.assert_close(smaller(*case.example), at_once(*case.example), rtol=1e-8, atol=1e-9)
    assert composed(case.plan, second) == Plan(case.structure, keep)
    assert remainder(case.plan, composed(case.plan, second)) == second
    filled = fill(apply(copy.deepcopy(case.model), composed(case.plan, second), *case.example), smaller)
    assert torch.equal(filled(*case.example), smaller(*case.example))


def test_law_8_json_round_trip(case: Cut) -> None:
    assert from_json(to_json(case.plan)) == case.plan


def uniform(structure: Structure, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    values = {g.name: rng.random(g.size) for g in structure.free}
    return Scores(values, {k: np.zeros_like(v) for k, v in values.items()}, "uniform", "rise of the loss", 0, seed)


@pytest.mark.parametrize("per", ["channel", "params", "macs"])
def test_law_9_search_fits_and_a_looser_budget_never_loses_more(case: Cut, per: str) -> None:
    scores, whole, rises = uniform(case.structure, 1), cost(Plan(case.structure)), []
    for share in (1.0, 0.9, 0.8, 0.7):
        try:
            plan = search(case.structure, scores, at_most(params=share, macs=share), per=per)
        except ValueError as error:
            assert "smallest" in str(error)
            break
        assert cost(plan).params <= share * whole.params and cost(plan).macs <= share * whole.macs
        rises.append(predicted_rise(scores, {g.name: lost(plan, g) for g in case.structure.free})[0])
    assert rises == sorted(rises)
    assert rises[0] == 0


@pytest.mark.parametrize("per", ["channel", None])
def test_law_9_search_drops_the_least_valuable(case: Cut, per: str | None) -> None:
    """By the score itself, or by default for what it saves of the one cost that is limited."""
    scores = uniform(case.structure, 2)
    worth = worths(case.structure, scores, per or "params")
    plan = search(case.structure, scores, at_most(params=0.9), per=per, floor=0) if case.name != "odd" else Plan(case.structure)
    gone = [v for g in case.structure.free for v in worth[g.name][lost(plan, g)] if len(kept(plan, g)) > 1]
    stay = [v for g in case.structure.free for v in worth[g.name][kept(plan, g)]]
    assert max(gone, default=0) < min(stay, default=1)


def test_law_12_surviving_tensors_keep_their_names(case: Cut, small: torch.nn.Module) -> None:
    assert small.state_dict().keys() == case.model.state_dict().keys()
    assert dict(small.named_parameters()).keys() == dict(case.model.named_parameters()).keys()


def test_the_result_trains(case: Cut, small: torch.nn.Module) -> None:
    student = copy.deepcopy(small).train()
    student(*case.example).square().mean().backward()
    used = [n for n, p in student.named_parameters() if p.grad is not None]
    assert len(used) == len([n for n, _ in student.named_parameters() if "spare" not in n])


def test_one_channel_of_each_group_is_enough(case: Cut) -> None:
    plan = Plan(case.structure, {g.name: (g.size - 1,) for g in case.structure.free})
    tiny = apply(case.model, plan, *case.example)
    assert cost(plan).params == sum(p.numel() for p in tiny.parameters())
