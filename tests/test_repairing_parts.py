"""Repair of models whose plans have implants, left-out branches and pruned channels, alone and together."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from test_repairing import TINY, Residual, batches, disturbed, error, half
from torch import Tensor, nn

import curvepress as cp
from curvepress.implants import Implant, full_rank, replaceable
from curvepress.plan import Plan, after, edits, origins
from curvepress.repairing.refitting import fit_implants
from curvepress.repairing.sequential import Repaired, repair
from curvepress.tracing.watching import model_tensors

POINT = Implant("pointwise", channels=(1, 4, 6))
INNER, OUTER, STEM = "inner.0.0.weight", "outer.1.0.weight", "stem.0.weight"
Batches = list[tuple[Tensor, None]]


def centred(channels: tuple[int, ...]) -> nn.Module:
    """A network whose filters of these channels are 1x1 in truth, wherever they are 3x3."""
    torch.manual_seed(3)
    model = disturbed(Residual().double())
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim == 4):
            middle = weight[list(channels), :, 1, 1].clone()
            weight[list(channels)] = 0
            weight[list(channels), :, 1, 1] = middle
    return model


def wrong(model: nn.Module, *names: str) -> nn.Module:
    """A copy with these weights off by a little."""
    copy, chance = deepcopy(model), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in names:
            weight = copy.get_parameter(name)
            weight.add_(0.1 * torch.randn(weight.shape, generator=chance, dtype=weight.dtype))
    return copy


@pytest.mark.parametrize("implants", [{INNER: POINT}, {STEM: POINT, "outer.0.0.weight": POINT, OUTER: POINT}])
def test_exact_implants_that_move_channels_leave_nothing_to_repair(implants: dict[str, Implant]) -> None:
    model, given = centred(POINT.channels), batches(3, 8, 8)
    plan = Plan(cp.trace(model, given[0][0]), {}, implants=implants)
    small = cp.apply(model, plan, given[0][0])
    assert error(small, model, given) < 1e-20
    assert repair(small, model, given, plan).layers == ()


@pytest.mark.parametrize("part", ["full", "point", "up"])
def test_what_is_wrong_in_an_implant_is_mended_exactly(part: str) -> None:
    model, given = centred(POINT.channels), batches(3, 8, 8)
    plan = Plan(cp.trace(model, given[0][0]), implants={INNER: Implant("low_rank", 8) if part == "up" else POINT})
    changed = wrong(cp.apply(model, plan, given[0][0]), f"inner.0.0.{part}.weight")
    repaired = repair(changed, model, given, plan, ridges=TINY)
    assert error(repaired.model, model, given) < 1e-6 * error(changed, model, given)
    assert repaired.layers[0].name == f"inner.0.0.{part}.weight"


def everything() -> tuple[nn.Module, Plan, Batches]:
    """Channels cut, both kinds of implants, and a branch left out."""
    torch.manual_seed(0)
    model, given = disturbed(Residual(3).double()), batches(3, 8, 8, count=8)
    cut = half(model, given[0][0], 0.75)
    branch = next(b for b in cut.structure.branches if "inner.2.0.weight" in b.tensors)
    return model, Plan(cut.structure, cut.keep, (branch.name,), {INNER: POINT, OUTER: Implant("low_rank", 4)}), given


def mended() -> tuple[nn.Module, nn.Module, Plan, Repaired]:
    model, plan, given = everything()
    small = fit_implants(cp.apply(model, plan, given[0][0]), model, given, plan)
    return model, small, plan, repair(small, model, given, plan)


def test_everything_at_once_comes_nearer_and_keeps_its_shape() -> None:
    model, small, plan, repaired = mended()
    fresh = batches(3, 8, 8, seed=60)
    assert error(repaired.model, model, fresh) < 0.8 * error(small, model, fresh)
    assert all(layer.after <= layer.before for layer in repaired.layers)
    assert {"inner.0.0.full.weight", "inner.0.0.point.weight", "outer.1.0.up.weight"} <= {layer.name for layer in repaired.layers}
    assert set(repaired.left) == {"outer.1.0.down.weight"} and "inner channels" in repaired.left["outer.1.0.down.weight"]
    assert {n: tuple(t.shape) for n, t in model_tensors(repaired.model).items()} == {
        n: t.shape for n, t in after(plan).tensors.items() if t.kind != "activation"
    }


def test_a_branch_left_out_is_made_up_for_by_the_layers_behind_it() -> None:
    model, plan, given = everything()
    alone = Plan(plan.structure, {}, (plan.structure.branches[0].name,))
    small, fresh = cp.apply(model, alone, given[0][0]), batches(3, 8, 8, seed=60)
    repaired = repair(small, model, given, alone)
    assert error(repaired.model, model, fresh) < 0.5 * error(small, model, fresh)
    gone = set(alone.structure.branches[0].tensors)
    assert not gone & {layer.name for layer in repaired.layers} and not repaired.left


def test_origins_say_which_channel_of_the_original_each_output_is() -> None:
    model, plan, given = everything()
    small, own = cp.apply(model, plan, given[0][0]), model_tensors(model)
    made, exact = model_tensors(small), 0
    for (name, dim), (source, rows) in origins(plan).items():
        assert made[name].shape[dim] == len(rows)
        if made[name].ndim == 1:
            assert torch.equal(made[name], own[source][torch.as_tensor(rows)])
            exact += 1
    assert exact >= 20
    assert origins(Plan(plan.structure)) == {}


@pytest.mark.parametrize("name", ["BERT", "ViT"])
def test_projections_of_attention_take_implants_and_are_repaired(name: str) -> None:
    pytest.importorskip("transformers")
    from hf_zoo import make_hf

    case = make_hf(name)
    structure = cp.trace(case.model, *case.example)
    keep = {g.name: tuple(range((g.size + 1) // 2)) for g in structure.free if g.kind in ("head", "value", "query-key", "hidden")}
    stays = edits(Plan(structure, keep))
    shapes = {n: [len(stays.get((n, d), range(k))) for d, k in enumerate(t.shape)] for n, t in structure.tensors.items()}
    able = [n for n in structure.tensors if "attention" in n and replaceable(structure, n)]
    plan = Plan(structure, keep, implants={n: Implant("low_rank", full_rank(shapes[n]) // 2) for n in able})
    assert len(able) >= 4
    small = cp.apply(case.model, plan, *case.example)
    assert cp.cost(plan).params == sum(p.numel() for p in small.parameters())
    assert {g.name: g.size for g in cp.trace(small, *case.example).free} == {g.name: g.size for g in after(plan).free}
    given: list[Any] = [(x, None) for x in case.inputs(8) for _ in range(2)]
    repaired = repair(small, case.model, given, plan)
    assert {n.removesuffix("weight") + "up.weight" for n in able} <= {layer.name for layer in repaired.layers}
    assert all(layer.after <= layer.before for layer in repaired.layers)
