"""Verification: what cannot be made so is refused, and the user is told which form came out."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from zoo import make

from curvepress.plan import Plan
from curvepress.surgery import cutting as surgery
from curvepress.surgery.cutting import applied, apply
from curvepress.tracing.watching import trace


def plan_of(name: str, group: str, keep: tuple[int, ...]) -> tuple[nn.Module, tuple[torch.Tensor, ...], Plan]:
    case = make(name)
    return case.model, case.example, Plan(trace(case.model, *case.example), {group: keep})


@pytest.mark.parametrize(
    ("name", "group", "form"),
    [("vgg", "features.0", "module"), ("constantview", "features.0", "module"), ("constantview", "features.4", "graph"),
     ("resnet_padded", "blocks.0.conv1.0", "module"), ("resnet_padded", "stem.0", "module"), ("resnet_padded", "blocks.1.conv2.0", "graph"),
     ("attention", "qkv#2", "graph")],
)  # fmt: skip
def test_constants_in_user_code_need_the_graph_and_nothing_else_does(name: str, group: str, form: str) -> None:
    model, example, plan = plan_of(name, group, (0, 1))
    made = applied(model, plan, *example)
    assert made.form == form
    assert isinstance(made.model, torch.fx.GraphModule) == (form == "graph")
    assert bool(made.reason) == (form == "graph")


def test_the_form_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, example, plan = plan_of("resnet_padded", "blocks.1.conv2.0", (0, 1))
    with caplog.at_level(logging.INFO, "curvepress"):
        apply(model, plan, *example)
    assert "graph module, as the model's own code holds constants" in caplog.text


def test_without_an_example_it_verifies_on_inputs_of_the_traced_shapes() -> None:
    model, example, plan = plan_of("resnet_padded", "blocks.1.conv2.0", (0, 1))
    torch.testing.assert_close(apply(model, plan)(*example), apply(model, plan, *example)(*example))


def test_a_plan_for_another_model_is_refused() -> None:
    _, _, plan = plan_of("vgg", "features.0", (0, 1))
    with pytest.raises(ValueError, match=r"for another model: it has features.0.weight of shape \(6, 3, 3, 3\), this model no such tensor"):
        apply(make("mlp").model, plan)


class Silent(nn.Module):
    """Slices channels by a constant: a narrower tensor runs and gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(x)[:, 2:6] * self.b(x))


def test_a_result_that_runs_but_is_wrong_is_caught() -> None:
    model, x = Silent(), torch.randn(3, 4)
    structure = trace(model, x)
    spare = next(g for g in structure.free if g.size == 4 and not any(m.tensor == "b.weight" for m in g.members))
    made = applied(model, Plan(structure, {spare.name: (2, 3)}), x)
    assert made.form == "graph" and "differs from what it should compute" in made.reason


def test_a_wrong_operator_rule_is_caught_when_the_plan_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table may be wrong about an operator; the comparison with the masked original is what the user relies on."""
    from curvepress.tracing.operators import RULES, elementwise

    monkeypatch.setitem(RULES, "cumsum", elementwise.pointwise)
    case = make("odd")
    structure = trace(case.model, *case.example)
    assert not structure["a"].frozen
    plan = Plan(structure, {"a": (1, 2)})
    monkeypatch.setattr(surgery, "masked", lambda model, plan, example, trace, gone: model(*example).detach())
    with pytest.raises(ValueError, match=r"cannot be applied: cut in a.weight \(.*\), the model differs .*rewritten as a graph it differs"):
        apply(case.model, plan, *case.example)


def test_a_model_that_cannot_be_exported_says_so_and_names_the_tensor_whose_width_its_code_holds(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.head(self.a(self.first(x)).view(-1, 8))
            return x if x.sum() > -1e9 else -x

    model, x = Branches(), torch.randn(3, 4)
    refusal = r"cut in a.weight \(leave their groups whole\), .*holds constants, and torch.export cannot follow it"
    with pytest.raises(ValueError, match=refusal):
        apply(model, Plan(trace(model, x), {"first": (1, 2), "a": (0, 1)}), x)
    assert capfd.readouterr().err == ""  # torch.export would print the graph


def test_frozen_parameters_stay_frozen_and_dropout_follows_the_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.drop, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.drop(self.bn(self.a(x)).view(-1, 8)))

    model, x = Net().eval(), torch.randn(64, 4)
    model.a.weight.requires_grad_(False)
    small = apply(model, Plan(trace(model, x), {"a": (0, 1, 2)}), x)
    assert isinstance(small, torch.fx.GraphModule)
    assert not small.get_parameter("a.weight").requires_grad and small.get_parameter("head.weight").requires_grad
    assert torch.equal(small(x), small(x))
    small.train()
    before = small.get_buffer("bn.running_mean").clone()
    assert not torch.equal(small(x), small(x))
    assert not torch.equal(before, small.get_buffer("bn.running_mean"))
