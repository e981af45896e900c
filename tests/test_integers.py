"""Quantized modules as files of integers: what the runtimes compute of them, and on which kernels."""

import sys

import onnx
import pytest
import torch
from onnxscript import opset21
from torch import Tensor, nn

from curvepress.export.comparison import refuse_disagreement
from curvepress.export.integers import TABLE, to_integer_onnx
from curvepress.export.kernels import count_kernels
from curvepress.export.openvino import check_in_openvino
from curvepress.export.program import to_program
from curvepress.quantization.quantized import Bits, calibrate, floating, packed, quantize
from curvepress.quantization.quantized.lowering import ROUND
from curvepress.quantization.quantized.modules import WeightQuantizer, quantizers
from curvepress.quantization.requantization import requantize
from tests import zoo

EXPORTED = r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated.*:FutureWarning"
pytestmark = pytest.mark.filterwarnings(EXPORTED)


def quantized(name: str, bits: Bits | None = None) -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    """A calibrated network of the zoo, and the data for it."""
    case = zoo.make(name)
    model, x = case.model.float(), torch.randn(32, 3, 8, 8)
    return calibrate(quantize(model, bits or Bits(), x), [(x, None)]).eval(), [(x, None)]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("resnet_padded", "7 of 7 convolutions integer, 1 of 1 linear layers integer"),
        ("mobilenet", "6 of 6 convolutions integer, 1 of 1 linear layers integer"),
        ("densenet", "4 of 4 convolutions integer, 1 of 1 linear layers integer"),
        ("attention", None),
    ],
)
def test_files_run_on_integers_and_agree(name: str, kernels: str | None, tmp_path):
    module, data = quantized(name)
    found = to_integer_onnx(module, data, tmp_path / "a.onnx")
    assert found.same >= 99 and found.examples == 32 and found.bytes == (tmp_path / "a.onnx").stat().st_size
    assert not found.kernels.float and (kernels is None or str(found.kernels) == kernels)
    stored = {i.name: i.data_type for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert all(kind == onnx.TensorProto.INT8 for n, kind in stored.items() if n.endswith("weight_levels"))
    assert all(kind == onnx.TensorProto.INT32 for n, kind in stored.items() if n.endswith("bias_levels"))
    assert not any(n.endswith("weight") and ".conv" in n for n in stored)


def test_low_bits_are_exact_and_saturate_where_the_simulation_does(tmp_path):
    module, data = quantized("resnet_padded", Bits(weight=3, product=3, sum=4))
    assert to_integer_onnx(module, [(10 * data[0][0], None)], tmp_path / "a.onnx").error < 1e-4


def test_weights_with_zero_points_are_stored_without_and_run_on_the_same_kernels(tmp_path):
    module, data = quantized("resnet_padded", Bits(weights={"stem.0.weight": 8}, weight=3, asymmetric=True))
    zeros = {q.name: bool(q.grid.zero_point.any()) for q in quantizers(module) if isinstance(q, WeightQuantizer)}
    assert [name for name, some in zeros.items() if not some] == ["stem.0.weight"]  # less its zero point a level of 8 bits needs nine
    found = to_integer_onnx(module, data, tmp_path / "a.onnx")
    assert found.error < 1e-4 and not found.kernels.float and found.kernels.integer == found.kernels.total
    assert to_program(module, data, tmp_path / "a.pt2").error == 0
    packed.save(module, tmp_path / "a.safetensors")
    again = packed.load(zoo.make("resnet_padded").model.float(), data[0][0], tmp_path / "a.safetensors")
    assert torch.equal(again(data[0][0]), module(data[0][0]))


def test_zero_points_halve_the_error_of_lopsided_weights():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(8, 3, 3, 3) + 0.02)
    apart = []
    for asymmetric in (False, True):
        module = calibrate(quantize(model, Bits(weight=3, product=None, sum=None, asymmetric=asymmetric), x), [(x, None)]).eval()
        apart.append((module(x) - model(x)).square().mean().item())
    assert apart[1] < apart[0] / 2


@pytest.mark.parametrize("rounding", ["nearest", "adaptive"])
def test_weights_of_one_scale_run_on_integers_and_are_packed(tmp_path, rounding: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(4, 3, 8, 8)
    module = calibrate(quantize(model, Bits(weight=4, per_tensor=True), x), [(x, None)]).eval()
    if rounding != "nearest":
        requantize(module, [(x, None)], method=rounding)
        calibrate(module, [(x, None)])
    grids = [q.grid for q in quantizers(module) if isinstance(q, WeightQuantizer)]
    assert [tuple(g.scale.shape) for g in grids] == [(), ()]
    found = to_integer_onnx(module, [(x, None)], tmp_path / "a.onnx")
    assert found.error < 1e-5 and str(found.kernels) == "1 of 1 convolutions integer, 1 of 1 linear layers integer"
    file = onnx.load(tmp_path / "a.onnx").graph
    scales = {t.name: tuple(t.dims) for t in file.initializer if t.name.endswith("weight_scale")}
    assert len(scales) == 2 and set(scales.values()) == {()}
    packed.save(module, tmp_path / "a.safetensors")
    assert torch.equal(packed.load(model, x, tmp_path / "a.safetensors")(x), module(x))
    with pytest.raises(ValueError, match="leave out per_tensor or group"):
        Bits(per_tensor=True, group=32)


class OneSided(nn.Module):
    """Zeros to the right and below, as TensorFlow pads strided convolutions; the same image is read without them too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.padded, self.plain = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.padded(nn.functional.pad(x, (0, 1, 2, 3))).mean((2, 3)) + self.plain(x).mean((2, 3))


def test_zeros_around_an_image_are_padding_of_the_convolution_that_reads_it(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    module = calibrate(quantize(OneSided(), Bits(), x), [(x, None)]).eval()
    found = to_integer_onnx(module, [(x, None)], tmp_path / "a.onnx")
    assert found.error < 1e-5 and str(found.kernels) == "3 of 3 convolutions integer"
    nodes = onnx.load(tmp_path / "a.onnx").graph.node
    assert "Pad" not in {n.op_type for n in nodes}
    assert [2 + 1, 0 + 1, 3 + 1, 1 + 1] in [list(a.ints) for n in nodes for a in n.attribute if a.name == "pads"]


def test_what_is_left_in_float_is_named_with_its_reason(tmp_path):
    module, data = quantized("resnet_padded", Bits(weights={"stem.0.weight": None}))
    found = to_integer_onnx(module, data, tmp_path / "a.onnx").kernels
    assert found.integer["convolutions"] == found.total["convolutions"] - 1
    assert list(found.float.values()) == ["its weight stem.0.weight was left in float"]


def test_programs_are_the_simulation_exactly_and_need_no_curvepress(tmp_path):
    module, data = quantized("resnet_padded", Bits(weight=4, product=5))
    assert to_program(module, data, tmp_path / "a.pt2").error == 0
    nodes = torch.export.load(tmp_path / "a.pt2").graph.nodes
    assert {str(n.target).partition(".")[0] for n in nodes if n.op == "call_function"} == {"aten"}
    with pytest.raises(ValueError, match=r"end in \.pt2"):
        to_program(module, data, tmp_path / "a.pt")


def test_a_file_that_disagrees_gets_no_name(tmp_path, monkeypatch):
    module, data = quantized("mlp")
    monkeypatch.setitem(TABLE, ROUND, lambda x, *_: opset21.Neg(x))
    with pytest.raises(ValueError, match="where quantization itself changes them by"):
        to_integer_onnx(module, data, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_differ_by_more_than_quantization_are_refused_also_where_predictions_are_the_same():
    module, data = quantized("mlp")
    with torch.no_grad():
        rounded = module(data[0][0])
        with floating(module):
            change = float((rounded - module(data[0][0])).abs().mean())
    for same, part in ((100, 0.9), (98, 0.4)):
        refuse_disagreement("it", module, [(data[0][0],)], same, part * change, 99.5)
    for same, part in ((100, 1.1), (99, 0.6)):
        with pytest.raises(ValueError, match=f"for {same}.00% .*differ by {part * change:.2g} .*by {change:.2g}"):
            refuse_disagreement("it", module, [(data[0][0],)], same, part * change, 99.5)
    nothing = calibrate(
        quantize(nn.Linear(3, 2), Bits(weight=None, product=None, sum=None), torch.randn(4, 3)), [(torch.randn(4, 3), None)]
    )
    refuse_disagreement("it", nothing, [(torch.randn(4, 3),)], 100, 1e-7, 99.5)


def test_an_operator_without_a_form_in_onnx_is_named_with_a_way_out(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.layer(x))

    data = [(torch.randn(8, 4), None)]
    module = calibrate(quantize(Odd(), Bits(), data[0][0]), data)
    with pytest.raises(ValueError, match=r"bessel_j0.*; write that part of the model in other operators, or use it in PyTorch"):
        to_integer_onnx(module, data, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == [] and to_program(module, data, tmp_path / "a.pt2").error == 0


def test_damaged_files_and_missing_runtimes_say_so(tmp_path, monkeypatch):
    module, data = quantized("mlp")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"a\.onnx cannot be opened"):
        count_kernels(tmp_path / "a.onnx", module)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match="pip install"):
        check_in_openvino(tmp_path / "a.onnx", module, data)
    with pytest.raises(ValueError, match="no batches"):
        to_integer_onnx(module, [], tmp_path / "b.onnx")


def test_openvino_reads_the_same_file(tmp_path):
    pytest.importorskip("openvino", reason="OpenVINO is optional")
    module, data = quantized("resnet_padded")
    to_integer_onnx(module, data, tmp_path / "a.onnx")
    found = check_in_openvino(tmp_path / "a.onnx", module, data)
    assert found.same >= 95 and found.integer["convolutions"] == found.total["convolutions"] == 7


def test_groups_of_inputs_in_four_bits_are_stored_as_int4_and_multiplied_as_they_are(tmp_path):
    model, x = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 5)).eval(), torch.randn(16, 3, 64)
    module = calibrate(quantize(model, Bits(weight=4, product=None, sum=None, group=16), x), [(x, None)])
    found = to_integer_onnx(module, [(x, None)], tmp_path / "a.onnx", least_same=95)
    assert str(found.kernels) == "2 of 2 linear layers integer" and found.error < 0.02
    stored = {i.name: i.data_type for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert stored["0.weight_levels"] == onnx.TensorProto.INT4


def test_addmm_is_a_linear_layer_too(tmp_path):
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, 8), self.weight).relu()

    data = [(torch.randn(64, 8), None)]
    module = calibrate(quantize(Turned(), Bits(), data[0][0]), data)
    assert str(to_integer_onnx(module, data, tmp_path / "a.onnx", least_same=95).kernels) == "1 of 1 linear layers integer"
