"""Residual branches: found, left out whole, and chosen by what the loss says."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hf_zoo import make_hf
from test_laws import random_plan, uniform
from torch import Tensor, nn
from zoo import ZOO, Case, make

from curvepress.costs import Cost, cost
from curvepress.objective import call, outputs
from curvepress.plan import Plan, after, dropped, from_json, to_json
from curvepress.planner.channels import at_most, search
from curvepress.planner.depth import around, shorten
from curvepress.structure import Structure
from curvepress.surgery.cutting import applied, apply
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace

RESIDUAL = [name for name in ZOO if trace(make(name).model, *make(name).example).branches]
TRANSFORMERS = {"BERT": 4, "GPT-2": 4, "Llama, grouped-query": 4, "ViT": 4, "ConvNeXt": None}
"""How many branches there are, where it is two for each layer."""


class Block(nn.Module):
    def __init__(self, width: int, *, on: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.on = on

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) if self.on else x


class Stream(nn.Module):
    """Blocks that can be switched off by hand."""

    def __init__(self, off: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block(6, on=n not in off) for n in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Embedded(nn.Module):
    """Sums that are no residual branches: of a token and its place, of scores and a mask, of two heads of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.query, self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1])).expand(len(ids), -1, -1)
        scores = self.query(x) @ self.key(x).mT
        return self.out((scores + torch.zeros_like(scores).tril()).softmax(-1) @ x)


def some(structure: Structure, seed: int) -> tuple[str, ...]:
    names = [b.name for b in structure.branches]
    return tuple(random.Random(seed).sample(names, max(1, len(names) // 2)))


def narrower(case: Case, seed: int) -> Plan:
    structure = trace(case.model, *case.example)
    return Plan(structure, random_plan(structure, seed).keep, some(structure, seed))


@pytest.fixture(scope="module", params=RESIDUAL)
def case(request: pytest.FixtureRequest) -> Case:
    return make(request.param)


def test_without_its_branch_a_block_is_switched_off() -> None:
    torch.manual_seed(0)
    model, x = Stream().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    structure = trace(model, x)
    assert [b.name for b in structure.branches] == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    small = apply(model, Plan(structure, skip=("blocks.1", "blocks.3")), x)
    by_hand = Stream(off=(1, 3)).double().eval()
    by_hand.load_state_dict(model.state_dict())
    assert torch.equal(small(x), by_hand(x))
    assert {n.split(".")[1] for n, _ in small.named_parameters() if n.startswith("blocks")} == {"0", "2"}


def test_laws_hold_for_branches_and_channels_together(case: Case) -> None:
    before = copy.deepcopy(case.model.state_dict())
    for seed in range(2):
        plan = narrower(case, seed)
        made = applied(case.model, plan, *case.example)
        assert made.form == "graph" and made.reason
        other = tuple(torch.randn_like(x) if x.is_floating_point() else x for x in case.example)
        torch.testing.assert_close(made.model(*other), masked_output(case.model, plan, other), rtol=1e-9, atol=1e-10)
        assert cost(plan).params == sum(p.numel() for p in made.model.parameters())
        assert made.model.state_dict().keys() == case.model.state_dict().keys() - dropped(plan)
        assert trace(made.model, *case.example).tensors == after(plan).tensors
        assert trace(made.model, *case.example).branches == after(plan).branches
        assert from_json(to_json(plan)) == plan
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_of_transformers(name: str) -> None:
    case = make_hf(name)
    structure = trace(case.model, *case.example)
    assert len(structure.branches) == (TRANSFORMERS[name] or len(structure.branches)) >= 3
    plan = Plan(structure, skip=(structure.branches[1].name, structure.branches[2].name))
    small = apply(case.model, plan, *case.example)
    assert cost(plan).params == sum(p.numel() for p in small.parameters()) < cost(Plan(structure)).params
    got, wanted = outputs(call(small, case.example))[0], outputs(masked_output(case.model, plan, case.example))[0]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_other_sums_are_left_alone() -> None:
    assert trace(Embedded().eval(), torch.randint(7, (2, 5))).branches == ()


def test_a_branch_that_is_read_elsewhere_stays() -> None:
    class Peeking(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            inner = self.blocks[0].up(x)
            return self.last(x + self.blocks[0].down(inner)) + inner.mean()

    assert trace(Peeking().eval(), torch.randn(3, 5)).branches == ()


def test_unknown_branches_are_refused() -> None:
    structure = trace(Stream().eval(), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"no branch 'blocks.9'; the branches are blocks.0"):
        Plan(structure, skip=("blocks.9",))


def test_shorten_leaves_out_what_does_nothing_first() -> None:
    torch.manual_seed(1)
    model = Stream().eval()
    with torch.no_grad():
        for n, size in enumerate((1.0, 0.0, 3.0, 0.01)):
            model.blocks[n].down.weight.mul_(size)
            model.blocks[n].down.bias.zero_()
    inputs = [torch.randn(32, 5) for _ in range(3)]
    batches = [(x, copy.deepcopy(model).train()(x).detach()) for x in inputs]
    structure = trace(model, batches[0][0])
    gone = shorten(model, nn.functional.mse_loss, batches, structure, at_most(params=0.6), example=(batches[0][0],))
    assert [r.name for r in gone] == ["blocks.1", "blocks.3"]
    assert gone[0].rise == pytest.approx(0, abs=1e-6) and gone[1].rise > 0
    assert cost(Plan(structure, skip=tuple(r.name for r in gone))).params <= 0.6 * cost(Plan(structure)).params


def test_shorten_measures_what_the_short_model_will_lose() -> None:
    torch.manual_seed(2)
    model = Stream().double().eval()
    batches = [(torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))) for _ in range(4)]
    structure = trace(model, batches[0][0])
    gone = shorten(model, nn.functional.cross_entropy, batches, structure, at_most(params=0.5), example=(batches[0][0],))
    short = apply(model, Plan(structure, skip=tuple(r.name for r in gone)), batches[0][0])

    def loss(network: nn.Module) -> float:
        return sum(nn.functional.cross_entropy(network.train()(x), y).item() for x, y in batches) / len(batches)

    torch.testing.assert_close(gone[-1].rise, loss(copy.deepcopy(short)) - loss(copy.deepcopy(model)), rtol=1e-9, atol=1e-12)


def test_a_budget_that_branches_cannot_meet_is_refused() -> None:
    model, x = Stream().eval(), torch.randn(8, 5)
    batches = [(x, torch.randint(3, (8,)))] * 2
    with pytest.raises(ValueError, match="the smallest this model can be made is: params 57"):
        shorten(model, nn.functional.cross_entropy, batches, trace(model, x), at_most(params=0.01), example=(x,))


def test_channels_are_searched_around_what_is_left_out() -> None:
    model = make("resnet").model
    example = make("resnet").example
    structure = trace(model, *example)
    scores, skip = uniform(structure, 3), (structure.branches[0].name,)
    whole = cost(Plan(structure))

    def half(now: Cost, _: Cost) -> bool:
        return now.params <= 0.5 * whole.params

    plan = around(structure, scores, skip, lambda s, v: search(s, v, half))
    assert plan.skip == skip and plan.keep and cost(plan).params <= 0.5 * whole.params
    small = apply(model, plan, *example)
    assert sum(p.numel() for p in small.parameters()) == cost(plan).params
    kept_worth = [scores.values[g][c] for g, channels in plan.keep.items() for c in channels]
    gone_worth = [scores.values[g][c] for g, channels in plan.keep.items() for c in set(range(structure[g].size)) - set(channels)]
    assert min(kept_worth) > max(gone_worth)


def test_a_number_of_branches() -> None:
    model, x = Stream().eval(), torch.randn(8, 5)
    batches = [(x, torch.randint(3, (8,)))] * 2
    structure = trace(model, x)
    assert len(shorten(model, nn.functional.cross_entropy, batches, structure, 2, example=(x,))) == 2
    with pytest.raises(ValueError, match="has 4 residual branches that can be left out; got 5"):
        shorten(model, nn.functional.cross_entropy, batches, structure, 5, example=(x,))
