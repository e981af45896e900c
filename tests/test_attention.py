"""The laws of structure for attention, in the many ways it is written."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from attention_zoo import BLOCKS, make_block
from test_laws import comparable, random_plan
from torch import Tensor, nn

from curvepress.costs import cost
from curvepress.plan import Plan, after
from curvepress.surgery.cutting import applied, apply
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace


def inputs(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pruned:
    model: nn.Module
    plan: Plan
    small: nn.Module


@pytest.fixture(scope="module", params=[(name, seed) for name in BLOCKS for seed in range(2)], ids=lambda p: f"{p[0]}-{p[1]}")
def pruned(request: pytest.FixtureRequest) -> Pruned:
    name, seed = request.param
    model = make_block(name, seed)
    plan = random_plan(trace(model, inputs()), seed)
    return Pruned(model, plan, apply(model, plan, inputs()))


def test_law_2_pruned_is_masked(pruned: Pruned) -> None:
    other = inputs(5, seed=1)
    torch.testing.assert_close(pruned.small(other), masked_output(pruned.model, pruned.plan, (other,)), rtol=1e-8, atol=1e-9)


def test_law_4_cost_is_known_without_the_model(pruned: Pruned) -> None:
    assert cost(pruned.plan).params == sum(p.numel() for p in pruned.small.parameters())


def test_law_5_tracing_the_result_gives_the_structure_after(pruned: Pruned) -> None:
    assert comparable(trace(pruned.small, inputs())) == comparable(after(pruned.plan))


def test_law_12_surviving_tensors_keep_their_names(pruned: Pruned) -> None:
    assert pruned.small.state_dict().keys() == pruned.model.state_dict().keys()


USUAL = {"embedding": [12], "head": [3], "query-key": [4], "value": [4], "hidden": [20]}
FOUND: dict[str, dict[str, list[int]]] = {
    "library": {**USUAL, "hidden": [12, 20]},
    "library_token": {**USUAL, "hidden": [12, 20]},
    "library_probe": {**USUAL, "hidden": [12, 12, 20], "input": [2]},
    "library_decoder": {"embedding": [12], "head": [3, 3], "query-key": [4, 4], "value": [4, 4], "hidden": [12, 20, 20]},
    "library_with_weights": {**USUAL, "hidden": [12, 20]},
    "library_layer": {**USUAL, "hidden": [20, 20]},
    "library_layer_norm_first": {**USUAL, "hidden": [20, 20]},
    "normalised": {"embedding": [12], "head": [3], "head_dim": [4], "hidden": [20]},
    "rotary": {**USUAL, "query-key": [2]},
    "rotary_by_pairs": {**USUAL, "query-key": [2]},
    "rotarybyconstants": {k: v for k, v in USUAL.items() if k != "query-key"},
    "groupedquery": {**USUAL, "head": [2, 2]},
    "experts": {"hidden": [12]},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_found(name: str) -> None:
    found: dict[str, list[int]] = {}
    for group in trace(make_block(name), inputs()).free:
        found.setdefault(group.kind, []).append(group.size)
    assert {kind: sorted(sizes) for kind, sizes in found.items()} == FOUND.get(name, USUAL)


def test_frequencies_written_as_constants_freeze_the_width_they_turn() -> None:
    structure = trace(make_block("rotarybyconstants"), inputs())
    assert structure["q#2"].kind == "query-key" and "fixed size in aten.mul" in structure["q#2"].frozen


def test_experts_are_frozen_with_a_reason() -> None:
    assert "softmax" in trace(make_block("experts"), inputs())["router"].frozen


def test_the_scale_of_attention_stays_that_of_the_original() -> None:
    model = make_block("separate")
    plan = Plan(trace(model, inputs()), {"q#2": (1,)})
    small, first = apply(model, plan, inputs()), copy.deepcopy(model)
    with torch.no_grad():
        lost = [r for r in range(12) if r % 4 != 1]
        for layer in (first.q, first.k):
            layer.weight[lost], layer.bias[lost] = 0, 0
    torch.testing.assert_close(small(inputs()), first(inputs()))


def test_numbers_of_a_module_are_mended_where_its_stack_is_read_by_pieces() -> None:
    model, other = make_block("reshapedtokens"), inputs(5, seed=1)
    structure = trace(model, inputs())
    plan = Plan(structure, {"qkv": (0, 2), "qkv#2": (0, 2, 3), "qkv#3": (0, 1, 2)})
    made = applied(model, plan, inputs())
    assert made.form == "module" and (made.model.heads, made.model.width) == (2, 3)
    torch.testing.assert_close(made.model(other), masked_output(model, plan, (other,)), rtol=1e-8, atol=1e-9)
    assert applied(model, Plan(structure, {"qkv#3": (0, 2)}), inputs()).form == "graph"


def test_a_piece_that_nobody_reads_is_free_of_those_that_are_read() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.out = nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.both(x).view(-1, 2, 4)[:, 1])

    model, x = First(), torch.randn(3, 3)
    structure = trace(model, x)
    rows = {g.name: g.members[0].rows.ravel().tolist() for g in structure.free}
    assert sorted(rows.values()) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    plan = Plan(structure, {name: (0,) if 0 in kept else (1, 3) for name, kept in rows.items()})
    torch.testing.assert_close(apply(model, plan, x)(x), masked_output(model, plan, (x,)))
