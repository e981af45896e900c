"""Models that want keyword inputs, several inputs, masks or data of their own choosing: they work, or one sentence says why not."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvepress.costs import cost
from curvepress.objective import batch_size, call, output, outputs
from curvepress.plan import Plan, from_json, to_json
from curvepress.surgery.cutting import applied, apply, synthetic
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace


class Two(nn.Module):
    """Two inputs, a mask by keyword, and an answer by name."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.words, self.dense, self.out, self.view = nn.Embedding(11, 8), nn.Linear(3, 8), nn.Linear(8, 2), view

    def forward(self, ids: Tensor, extra: Tensor, *, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        x = self.words(ids) + self.dense(extra)[:, None]
        if mask is not None:
            x = x * mask[..., None]
        if self.view:
            x = x.view(*x.shape[:2], 8)
        return OrderedDict(logits=self.out(x.sum(1)) * scale, hidden_states=(x,), past_key_values=[x])


@pytest.fixture
def named() -> dict[str, Any]:
    mask = torch.tensor([[True, True, True, False]] * 3)
    return {"ids": torch.arange(12).view(3, 4) % 11, "extra": torch.randn(3, 3), "mask": mask, "scale": 2.0}


@pytest.mark.parametrize("view", [False, True], ids=["module", "graph"])
def test_keyword_inputs(named: dict[str, Any], view: bool) -> None:
    model = Two(view)
    plan = Plan(trace(model, named), {"words": (0, 3, 5)})
    made = applied(model, plan, named)
    assert made.form == ("graph" if view else "module")
    (got,), (wanted,) = outputs(call(made.model, named)), outputs(masked_output(model, plan, (named,)))
    torch.testing.assert_close(got, wanted)
    longer = {**named, "ids": named["ids"].repeat(1, 2), "mask": named["mask"].repeat(1, 2)}
    assert call(made.model, longer)["logits"].shape == (3, 2)
    backwards = dict(reversed(named.items()))
    torch.testing.assert_close(call(apply(model, plan, backwards), backwards)["logits"], got)


@pytest.mark.parametrize("view", [False, True], ids=["module", "graph"])
def test_positional_and_keyword_inputs_together(named: dict[str, Any], view: bool) -> None:
    model, mixed = Two(view), (named["ids"], named["extra"], {"mask": named["mask"]})
    small = apply(model, Plan(trace(model, *mixed), {"words": (0, 3, 5)}), *mixed)
    assert call(small, mixed)["logits"].shape == (3, 2)


def test_what_a_model_shows_of_its_inside_may_change_width(named: dict[str, Any]) -> None:
    structure = trace(Two(), named)
    assert [(g.name, g.kind, g.size) for g in structure.free] == [("words", "embedding", 8)]
    assert trace(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))["0"].frozen == "model output"


def test_batches_of_keyword_inputs(named: dict[str, Any]) -> None:
    batch = (named, torch.zeros(3))
    assert batch_size(batch) == 3
    assert output(Two(), batch)["logits"].shape == (3, 2)


def test_inputs_are_remembered_by_name(named: dict[str, Any]) -> None:
    model = Two()
    plan = from_json(to_json(Plan(trace(model, named), {"words": (1, 2)})))
    (made,) = synthetic(plan.structure.inputs)
    assert list(made) == ["ids", "extra", "mask"] and bool(made["mask"].all()) and int(made["ids"].max()) < 11
    assert cost(plan).params == sum(p.numel() for p in apply(model, plan).parameters())


def test_a_model_that_does_not_take_an_input_says_so(named: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not run on the example \(ids=\(3, 4\) torch.int64, .*unexpected keyword argument 'masks'"):
        trace(Two(), {**named, "masks": named["mask"]})


class Routed(nn.Module):
    """Data choose which expert is run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(3, 8), nn.ModuleList(nn.Linear(8, 6) for _ in range(2))
        self.wide, self.out = nn.Linear(6, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.out(self.wide(self.experts[int(x.sum() > 1e6)](x)))


def test_what_data_might_have_led_to_is_left_alone() -> None:
    structure = trace(Routed(), torch.randn(4, 3))
    assert [(g.name, g.size) for g in structure.free] == [("wide", 10)]
    assert structure["first"].frozen == "may be coupled with experts.1.weight, which the example did not reach as data decide its use"
    assert [g.size for g in trace(nn.Sequential(Routed().first, Routed().experts[0]), torch.randn(4, 3)).free] == [8]


def test_data_dependent_control_flow_over_tensors_that_are_all_used() -> None:
    class Signed(Routed):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x if x.sum() > 0 else -x
            return self.out(self.wide(self.experts[0](x) + self.experts[1](x)))

    model, x = Signed(), torch.randn(4, 3)
    structure = trace(model, x)
    assert sorted(g.size for g in structure.free) == [6, 8, 10]
    plan = Plan(structure, {"first": (0, 1, 2)})
    torch.testing.assert_close(apply(model, plan, x)(x), masked_output(model, plan, (x,)))


def test_a_plan_for_another_version_of_a_model_names_the_tensor() -> None:
    first, second = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2))
    plan = Plan(trace(first, torch.randn(2, 3)), {"0": (0, 1)})
    with pytest.raises(ValueError, match=r"for another model: it has 0.weight of shape \(8, 3\), this model \(9, 3\)"):
        apply(second, plan)


def test_a_model_of_the_same_tensors_that_couples_them_otherwise_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self, skip: bool) -> None:
            super().__init__()
            self.a, self.b, self.c, self.skip = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2), skip

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(self.b(x) + x if self.skip else self.b(x))

    x = torch.randn(2, 3)
    plan = Plan(trace(Net(skip=False), x), {"a": (0, 1)})
    with pytest.raises(ValueError, match="coupled otherwise in dimension 0 of 'b.weight'"):
        apply(Net(skip=True), plan, x)


def test_on_the_meta_device_what_data_would_decide_is_taken_as_zero() -> None:
    with torch.device("meta"):
        structure = trace(Routed(), torch.empty(4, 3))
    assert [(g.name, g.size) for g in structure.free] == [("wide", 10)]


class Stray(nn.Module):
    """Reads parameters that are in none of its modules."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.first, self.out, self.held = nn.Linear(3, 8), nn.Linear(8, 2), held

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for extra in self.held.values():
            x = extra(x) if isinstance(extra, nn.Module) else x * extra
        return self.out(x)


OUTSIDE = nn.Parameter(torch.ones(8))


@pytest.mark.parametrize(
    ("held", "where"), [({"layer": nn.Linear(8, 8)}, "shape .* in the attribute 'held'"), ({}, "outside of the model")]
)
def test_a_parameter_that_no_module_holds_is_refused_by_name(held: dict[str, Any], where: str) -> None:
    model = Stray(**held)
    if not held:
        model.first.register_forward_hook(lambda module, inputs, result: result * OUTSIDE)
    with pytest.raises(ValueError, match=f"{where} and in none of its modules, so it would be neither trained nor saved"):
        trace(model, torch.randn(4, 3))


def test_a_constant_that_no_module_holds_freezes_what_it_meets_and_inputs_may_want_gradients() -> None:
    structure = trace(Stray(scale=torch.rand(8)), torch.randn(4, 3, requires_grad=True))
    assert "meets a dimension of fixed size" in structure["first"].frozen


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lambda x: x, torch.ones(2), "only a torch.nn.Module can be traced, this is of type function"),
        (nn.Linear(3, 2), {"x": torch.ones(2, 3)}, r"keyword argument 'x'; a mapping that ends .* write \(mapping, \{\}\)"),
    ],
)
def test_what_cannot_be_run_says_what_to_do(model: Any, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(model, example)


def test_a_model_without_an_output_is_refused() -> None:
    class Silent(Stray):
        def forward(self, x: Tensor) -> None:
            super().forward(x)

    with pytest.raises(ValueError, match="gives back no tensor for the example but an object of type NoneType"):
        trace(Silent(), torch.randn(4, 3))


def test_a_mapping_as_an_argument() -> None:
    class Batch(nn.Sequential):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    assert [g.size for g in trace(Batch(nn.Linear(3, 8), nn.Linear(8, 2)), {"x": torch.randn(4, 3)}, {}).free] == [8]


def test_examples_chosen_by_a_mask_leave_channels_free() -> None:
    class Chosen(Stray):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.out(x[x.norm(dim=-1) > 0.5].sum(0)[None] + x)

    model, x = Chosen(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    structure = trace(model, x)
    assert [g.size for g in structure.free] == [8]
    plan = Plan(structure, {"first": tuple(range(7))})
    torch.testing.assert_close(apply(model, plan, x)(x), masked_output(model, plan, (x,)))
