"""Gradient scores of transformers against finite differences of gates, one example and one channel at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import text_recipe
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress.costs import cost
from curvepress.objective import Batch, batch_loss
from curvepress.plan import Plan
from curvepress.planner.channels import with_latency
from curvepress.scores import LOSS_UNIT, RELATIVE_UNIT, Scores, score
from curvepress.scores.gates import gate_slopes
from curvepress.structure import Group, Member, Structure
from curvepress.tracing.watching import trace

STEP = 1e-6
BATCHES = text_recipe.batches("calibration")[:3]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return text_recipe.model().double()


@pytest.fixture(scope="module")
def structure(model: nn.Module) -> Structure:
    return trace(model, text_recipe.example())


def difference(model: nn.Module, members: list[Member], channel: int, batch: Batch) -> float:
    """The slope of the loss as the channel's elements of ``members`` are scaled together, by central differences."""
    own, found = dict(model.named_parameters()), []
    for factor in (1 + STEP, 1 - STEP):
        kept = {m.tensor: own[m.tensor].detach().clone() for m in members}
        with torch.no_grad():
            for m in members:
                rows = torch.as_tensor(m.rows[channel])
                own[m.tensor].index_copy_(m.dim, rows, kept[m.tensor].index_select(m.dim, rows) * factor)
            found.append(batch_loss(model, F.cross_entropy, batch).item())
            for name, value in kept.items():
                own[name].copy_(value)
    return (found[0] - found[1]) / (2 * STEP)


def readers(group: Group) -> list[Member]:
    """What reads the channels; of queries and keys, which no weight reads, what makes the queries."""
    found = [m for m in group.members if m.role == "in"]
    return found or [m for m in group.members if m.tensor.startswith("query.")]


def single(batch: Batch, n: int) -> Batch:
    return {k: v[n : n + 1] for k, v in batch[0].items()}, batch[1][n : n + 1]


def test_slopes_are_those_of_a_gate_on_each_channel_for_each_example(model: nn.Module, structure: Structure) -> None:
    batch = BATCHES[0]
    slopes = gate_slopes(model, structure, F.cross_entropy, batch)
    assert {g.kind for g in structure.free} == {"embedding", "head", "query-key", "value", "hidden"}
    for group in structure.free:
        wanted = [[difference(model, readers(group), c, single(batch, n)) for c in range(group.size)] for n in range(4)]
        np.testing.assert_allclose(slopes[group.name][:4], wanted, atol=1e-8)


def test_hooks_are_gone_afterwards(model: nn.Module, structure: Structure) -> None:
    gate_slopes(model, structure, F.cross_entropy, BATCHES[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def scores_of(model: nn.Module, structure: Structure, method: str) -> Scores:
    return score(model, F.cross_entropy, BATCHES, structure, method=method, samples=len(BATCHES))


def test_gate_gradients_are_means_of_absolute_slopes_of_examples(model: nn.Module, structure: Structure) -> None:
    found = scores_of(model, structure, "gate_gradient")
    slopes = [gate_slopes(model, structure, F.cross_entropy, b) for b in BATCHES]
    for group in structure.free:
        each = torch.cat([s[group.name] for s in slopes])
        np.testing.assert_allclose(found.values[group.name], each.abs().mean(0))
        assert (found.values[group.name] > each.mean(0).abs().numpy() * (1 + 1e-9)).all()  # slopes of examples do not cancel
    assert found.unit == LOSS_UNIT


def test_michels_scores_have_a_norm_of_one_in_every_layer(model: nn.Module, structure: Structure) -> None:
    found, raw = (scores_of(model, structure, m) for m in ("michel", "gate_gradient"))
    for name, values in found.values.items():
        assert np.linalg.norm(values) == pytest.approx(1)
        np.testing.assert_allclose(values * np.linalg.norm(raw.values[name]), raw.values[name])
        np.testing.assert_allclose(found.stderr[name] * np.linalg.norm(raw.values[name]), raw.stderr[name])
    assert found.unit == RELATIVE_UNIT


def test_nvits_score_is_the_squared_slope_of_a_gate_on_all_that_makes_the_channel(model: nn.Module, structure: Structure) -> None:
    found = scores_of(model, structure, "nvit")
    for group in structure.free:
        slopes = [[difference(model, group.producers(), c, b) for b in BATCHES] for c in range(group.size)]
        np.testing.assert_allclose(found.values[group.name], np.square(slopes).mean(1), rtol=1e-4, atol=1e-12)


def test_nvits_latency_term_takes_off_what_a_channel_saves(structure: Structure) -> None:
    zeros = {g.name: np.zeros(g.size) for g in structure.free}
    seconds: Callable[[Plan], float] = lambda plan: 1e-6 * cost(plan).macs  # noqa: E731
    found = with_latency(structure, Scores(zeros, zeros, "nvit", RELATIVE_UNIT, 1, 0), seconds, eta=0.5)
    hidden = next(g for g in structure.free if g.kind == "hidden")
    inputs = text_recipe.example()["input_ids"].shape[1]
    np.testing.assert_allclose(found.values[hidden.name], -0.5e-6 * 2 * text_recipe.WIDTH * inputs)
    assert found.unit == RELATIVE_UNIT and "latency" in found.method


def test_what_cannot_be_gated_is_refused_by_its_name() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=2)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.one(x)).mean((2, 3)))

    net = Squeezed()
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="two.weight of a Conv2d cannot be gated"):
        gate_slopes(net, trace(net, x), F.cross_entropy, (x, torch.tensor([0, 1])))
    merged = nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, 1), nn.Linear(4, 2))
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="a Linear reads 10 rows for 2 examples"):
        gate_slopes(merged, trace(merged, x), lambda y, t: y.mean(), (x, torch.tensor([0, 1])))
