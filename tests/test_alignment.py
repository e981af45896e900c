"""Widths that a plan may have: aligned heads, multiples by kind, groups left whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_zoo import Separate, make_block

from curvepress.costs import cost
from curvepress.plan import Plan, kept
from curvepress.planner.alignment import Shape, head_widths
from curvepress.planner.channels import at_most, search
from curvepress.scores import Scores
from curvepress.structure import Structure
from curvepress.surgery.cutting import applied
from curvepress.tracing.watching import trace

X = torch.randn(3, 6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def structure_of(name: str) -> Structure:
    return trace(make_block(name), X)


def scored(structure: Structure) -> Scores:
    rng = np.random.default_rng(0)
    values = {g.name: rng.random(g.size) for g in structure.free}
    return Scores(values, {k: np.zeros_like(v) for k, v in values.items()}, "test", "rise of the loss", 1, 0)


@pytest.mark.parametrize("name", ["separate", "rotary", "chunked", "groupedquery", "multiquery", "library"])
def test_query_key_and_value_widths_of_a_block_belong_together(name: str) -> None:
    (block,) = head_widths(structure_of(name))
    assert [g.kind for g in block] == ["query-key", "value"]


def test_blocks_are_told_apart() -> None:
    two = torch.nn.Sequential(torch.nn.ModuleDict({"a": make_block("separate")})["a"], torch.nn.Linear(5, 3).double())
    assert [len(b) for b in head_widths(trace(two, X))] == [2]
    assert head_widths(structure_of("normalised")) == []


@pytest.mark.parametrize(("name", "rows"), [("separate", 1), ("rotary", 2)])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_aligned_widths_are_equal_and_fit(name: str, rows: int, share: float) -> None:
    structure = structure_of(name)
    budget = at_most(params=share)
    plan = search(structure, scored(structure), budget, aligned=True)
    query_key, value = (next(len(kept(plan, g)) for g in structure.free if g.kind == kind) for kind in ("query-key", "value"))
    assert rows * query_key == value
    assert budget(cost(plan), cost(Plan(structure)))


def test_widths_grow_to_the_next_step_that_both_can_take() -> None:
    structure = structure_of("rotary")
    names = {g.kind: g.name for g in structure.free}
    wanted = {g.name: g.size for g in structure.free} | {names["query-key"]: 1, names["value"]: 1}
    assert Shape(aligned=True).widths(structure, wanted)[names["value"]] == 2
    assert Shape(aligned=True, multiple={"value": 4}).widths(structure, wanted)[names["query-key"]] == 2
    assert Shape(aligned=True).widths(structure, wanted | {names["value"]: 3})[names["query-key"]] == 2


def test_where_one_width_stays_whole_the_other_does_too() -> None:
    structure = structure_of("separate")
    widths = Shape(aligned=True, whole=("value",)).widths(structure, {g.name: 1 for g in structure.free})
    assert {g.kind for g in structure.free if g.name in widths} == {"embedding", "hidden", "head"}


def test_multiples_by_kind_and_heads_by_their_rows() -> None:
    structure = structure_of("separate")
    names = {g.kind: g.name for g in structure.free}
    wanted = {g.name: 1 for g in structure.free}
    widths = Shape(multiple={"hidden": 8, "embedding": 5}).widths(structure, wanted)
    assert (widths[names["hidden"]], widths[names["embedding"]], widths[names["query-key"]]) == (8, 5, 1)
    heads = {m: Shape(multiple=m).widths(structure, wanted)[names["head"]] for m in (1, 4, 8, 16)}
    assert heads == {1: 1, 4: 1, 8: 2, 16: 3}  # a head has four rows; three heads are all


@pytest.mark.parametrize("whole", [("embedding",), ("emb*",), ("up", "q*")])
def test_groups_left_whole_are_not_cut(whole: tuple[str, ...]) -> None:
    structure = structure_of("separate")
    plan = search(structure, scored(structure), at_most(params=0.8), whole=whole)
    left = {g.name for g in structure.free} - plan.keep.keys()
    wanted = {"embed"} if whole[0].startswith("emb") else {"up", "q", "q#2"}
    assert plan.keep and wanted <= left


def test_an_entry_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="whole: 'heads' is no kind and no name of a group; the kinds are embedding, head"):
        Shape(whole=("heads",)).cuttable(structure_of("separate"))


def test_aligned_widths_keep_code_with_one_number_for_the_width_of_a_head() -> None:
    class Numbers(Separate):
        def __init__(self) -> None:
            super().__init__()
            self.width = 4

        def heads(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.shape[0], x.shape[1], -1, self.width).transpose(1, 2)

        def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)

    torch.manual_seed(0)
    model = Numbers().double().eval()
    structure = trace(model, X)
    made = applied(model, search(structure, scored(structure), at_most(params=0.8), aligned=True, whole=("embedding", "hidden", "head")), X)
    assert made.form == "module" and made.model.width < 4 and model.width == 4
