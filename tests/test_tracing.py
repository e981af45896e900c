"""What is found in networks whose structure is known, and what is frozen and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import make

from curvepress.plan import Plan
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import UNUSED, trace


def found(name: str) -> Structure:
    case = make(name)
    return trace(case.model, *case.example)


def sizes(structure: Structure) -> list[tuple[str, int]]:
    return sorted((g.kind, g.size) for g in structure.free)


def rows(structure: Structure, group: str, tensor: str, dim: int) -> list[list[int]]:
    return next(m.rows.tolist() for m in structure[group].members if (m.tensor, m.dim) == (tensor, dim))


def test_a_residual_stream_is_one_group() -> None:
    structure = found("resnet")
    stream = {m.tensor for m in structure["blocks.1.conv2.0"].members if m.role == "out"}
    assert stream == {"blocks.1.conv2.0.weight", "blocks.1.short.0.weight", "blocks.2.conv2.0.weight"}
    assert sizes(structure) == [("channel", 8), ("channel", 8), ("channel", 16), ("channel", 16), ("channel", 16)]


def test_a_padded_shortcut_carries_the_stream_on_in_the_middle() -> None:
    structure = found("resnet_padded")
    assert rows(structure, "stem.0", "blocks.1.conv2.0.weight", 0) == [[n] for n in range(4, 12)]
    new = structure["blocks.1.conv2.0"]
    assert rows(structure, new.name, "head.weight", 1) == [[n] for n in (*range(4), *range(12, 16))]


def test_a_flatten_gives_blocks_and_a_concatenation_gives_offsets() -> None:
    structure = found("inception")
    assert rows(structure, "a", "head.weight", 1) == [list(range(64 * n, 64 * n + 64)) for n in range(4)]
    assert rows(structure, "b", "head.weight", 1)[0] == list(range(256, 320))
    assert rows(structure, "b", "mix.weight", 0) == [[n] for n in range(4, 10)]


def test_grouped_convolutions_go_by_whole_groups_or_by_the_same_channels_of_every_group() -> None:
    structure = found("resnext")
    assert sizes(structure) == [("channel_group", 4), ("channel_in_group", 2), ("channel_in_group", 3), ("channel_in_group", 6)]
    (groups,) = (g.name for g in structure.free if g.kind == "channel_group")
    assert rows(structure, groups, "b.0.weight", 0) == [list(range(6 * n, 6 * n + 6)) for n in range(4)]


def test_a_fused_projection_that_is_taken_apart_has_widths_of_its_own_for_queries_and_values() -> None:
    structure = found("attention")
    assert sizes(structure) == [("embedding", 16), ("head", 4), ("hidden", 24), ("query-key", 4), ("value", 4)]


def test_tied_parameters_are_one_tensor() -> None:
    assert "c.weight" not in found("tied").tensors
    assert {m.dim for m in found("tied")["a"].members if m.tensor == "b.weight"} == {0, 1}


def test_law_11_an_operator_without_a_rule_freezes_what_it_touches_and_says_so() -> None:
    structure = found("odd")
    assert structure["a"].frozen == "no rule for aten.cumsum.default"
    assert structure["spare (along)"].frozen == UNUSED
    assert [g.name for g in structure.free] == ["b"]


class Less(nn.Module):
    """Operators that are not written as others: a hard swish, a gate by halves, mirrored borders, pixels that become channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3), nn.Conv2d(8, 4, 3)
        self.head = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.glu(self.b(F.pad(F.hardswish(self.a(x)), (1, 1, 1, 1), mode="reflect")), dim=1)
        x = F.pixel_unshuffle(self.c(F.pad(F.logsigmoid(x), (1, 1, 1, 1), mode="replicate")), 2)
        return self.head(x.mean((2, 3)))


def test_operators_that_are_not_written_as_others() -> None:
    model, x = Less().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    structure = trace(model, x)
    assert sizes(structure) == [("channel", 4), ("channel", 6), ("channel", 8)]
    assert rows(structure, "b", "b.weight", 0) == [[n, n + 8] for n in range(8)]
    assert rows(structure, "c", "head.weight", 1) == [list(range(4 * n, 4 * n + 4)) for n in range(4)]
    plan = Plan(structure, {"a": (0, 2, 5), "b": (1, 6), "c": (0, 3)})
    torch.testing.assert_close(apply(model, plan, x)(x), masked_output(model, plan, (x,)), rtol=1e-9, atol=1e-10)


class Ends(nn.Module):
    """Meets constants, reduces over channels, indexes them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 6) for _ in range(4))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        constant = self.a(x) + torch.arange(6.0)
        scaled = self.b(x) * self.b(x).amax(-1, keepdim=True)
        chosen = self.c(x)[:, [0, 1, 2, 3, 4, 5]]
        return self.head(constant) + self.head(scaled) + self.head(chosen) + self.head(self.d(x).softmax(-1))


def test_law_11_every_way_to_be_frozen_has_its_reason() -> None:
    structure = trace(Ends(), torch.randn(3, 4))
    assert not structure.free
    reasons = {g.frozen for g in structure.groups}
    assert "model output" in reasons
    assert any("fixed size in aten.add" in r for r in reasons)


@pytest.mark.parametrize(
    ("layer", "reason"), [("b", "aten.amax.default reduces"), ("c", "indexed by data"), ("d", "softmax.default runs over")]
)
def test_law_11_reasons_of_single_layers(layer: str, reason: str) -> None:
    class One(Ends):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = getattr(self, layer)(x)
            return self.head(
                {"b": lambda: y * y.amax(-1, keepdim=True), "c": lambda: y[:, torch.arange(6)], "d": lambda: y.softmax(-1)}[layer]()
            )

    assert reason in trace(One(), torch.randn(3, 4))[layer].frozen


def test_tracing_leaves_no_trace() -> None:
    case = make("mobilenet")
    case.model.train()
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    trace(case.model, *case.example)
    assert case.model.training and all(m.training for m in case.model.modules())
    assert all(torch.equal(before[n], t) for n, t in case.model.state_dict().items())


def test_a_model_that_does_not_run_says_so_with_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"does not run on the example \(\(2, 5\) torch.float32\)"):
        trace(nn.Linear(4, 3), torch.randn(2, 5))


def test_tracing_on_the_meta_device_needs_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008), nn.ReLU(), nn.Linear(11008, 4096), nn.Linear(4096, 10))
        structure = trace(model, torch.empty(1, 4096))
    assert [g.size for g in structure.free] == [11008, 4096]
