"""Quantized modules: laws over the zoo, small cases worked out by hand, and what bad input is told."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curvepress.quantization.quantized import (
    Bits,
    bits_from_json,
    bits_of,
    calibrate,
    floating,
    layout,
    observe,
    packed,
    quantize,
    sites,
    switch,
)
from curvepress.quantization.quantized.graphs import float_graph
from curvepress.quantization.quantized.learning import round_and_learn
from curvepress.quantization.quantized.lowering import lower
from curvepress.quantization.quantized.modules import ActivationQuantizer, WeightQuantizer, quantizers
from curvepress.quantization.quantizer import Scheme, fake_quantize, fit_grid, grid
from curvepress.training.fitting import fit
from tests import zoo


def case(name: str) -> tuple[nn.Module, Tensor]:
    """A network of the zoo and its example, in float32."""
    found = zoo.make(name)
    return found.model.float(), found.example[0].float()


def quantized(model: nn.Module, x: Tensor, bits: Bits | None = None) -> nn.Module:
    return calibrate(quantize(model, bits or Bits(), x), [(x, None)]).eval()


class Residual(nn.Module):
    """Pieces joined by a concatenation, moved and added: what shares a grid and what does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.c, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([F.relu(self.norm(self.a(x))), self.b(x)], 1)
        moved = F.pad(joined[:, :, 1:, :], (0, 0, 0, 1))
        return self.head((F.relu(self.c(joined)) + moved).mean((2, 3)))


@pytest.fixture
def residual() -> tuple[nn.Module, Tensor]:
    return Residual().eval(), torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_switched_off_it_computes_what_the_model_does_and_lowered_what_it_does_switched_on(name: str):
    model, x = case(name)
    module = quantized(model, x, Bits(weight=4, product=4))
    with torch.no_grad():
        wanted, rounded, lowered = model(x), module(x), lower(module)(x)
        assert torch.equal(rounded, lowered)
        assert not torch.equal(rounded, wanted)
        with floating(module):
            torch.testing.assert_close(module(x), wanted, rtol=1e-3, atol=1e-4)
        assert torch.equal(module(x), rounded)


@pytest.mark.parametrize("name", ["resnet_padded", "densenet", "shufflenet", "attention", "unet"])
def test_every_product_reads_levels_of_its_sites(name: str):
    model, x = case(name)
    module = quantized(model, x, Bits(weight=3, product=4, sum=6))
    found = {q.name: q for q in quantizers(module)}
    assert {w.name for w in layout(module).weights} <= set(found)
    for product in layout(module).products:
        for site in product.inputs:
            assert site.removesuffix(".read") in found, f"{product.name} reads {site}, which has no grid"
    seen: dict[str, Tensor] = {}
    for q in found.values():
        q.register_forward_hook(lambda q, _, y: seen.__setitem__(q.name, y))
    with torch.no_grad():
        module(x)
    for name_of, y in seen.items():
        scheme, scale = found[name_of].scheme, found[name_of].grid.scale
        steps = y / (scale if scheme.axis is None else scale.reshape([-1 if d == scheme.axis else 1 for d in range(y.dim())]))
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert len(steps.round().unique()) <= 2**scheme.bits


def test_the_layout_names_what_there_is(residual: tuple[nn.Module, Tensor]):
    module = quantize(*_with_bits(residual))
    found = {s.name: s for s in sites(module)}
    assert list(found) == ["x", "relu", "relu.read", "relu_1", "add", "mean"]
    assert [found[n].role for n in found] == ["product", "sum", "product", "sum", "sum", "product"]
    assert found["relu"].shape == (4, 6, 6) and found["relu"].size == 2 * 4 * 36  # both parts of the concatenation share it
    assert found["relu.read"].macs == 8 * 8 * 9 * 36 and found["relu"].macs == 0
    assert [(w.name, w.shape, w.axis) for w in layout(module).weights] == [
        ("a.weight", (4, 3, 3, 3), 0), ("b.weight", (4, 3, 3, 3), 0), ("c.weight", (8, 8, 3, 3), 0), ("head.weight", (5, 8), 0),
    ]  # fmt: skip
    assert [p.inputs for p in layout(module).products] == [("x",), ("x",), ("relu.read",), ("mean",)]


def _with_bits(residual: tuple[nn.Module, Tensor], **bits: object) -> tuple[nn.Module, Bits, Tensor]:
    return residual[0], Bits(**bits), residual[1]


def test_what_only_products_read_is_rounded_again_where_it_has_fewer_bits(residual: tuple[nn.Module, Tensor]):
    same, fewer = (quantize(*_with_bits(residual, product=p, sum=8)) for p in (8, 4))
    assert "relu.read" not in {q.name for q in quantizers(same)}
    assert {q.name: q.scheme.bits for q in quantizers(fewer) if isinstance(q, ActivationQuantizer)} == {
        "x": 4, "relu": 8, "relu.read": 4, "relu_1": 8, "add": 8, "mean": 4,
    }  # fmt: skip
    calls = [n for n in fewer.graph.nodes if n.op == "call_function"]
    readers = [n for n in calls if any(str(a.target).endswith("relu/read") for a in n.all_input_nodes)]
    assert [n.name for n in readers] == ["conv2d_2"]


def test_what_has_no_bits_stays_in_float(residual: tuple[nn.Module, Tensor]):
    module = quantized(residual[0], residual[1], Bits(weights={"a.weight": None}, sites={"mean": None}))
    names = {q.name for q in quantizers(module)}
    assert "a.weight" not in names and "mean" not in names and {"b.weight", "relu"} <= names
    nothing = quantize(residual[0], Bits(weight=None, product=None, sum=None), residual[1]).eval()
    with torch.no_grad():
        torch.testing.assert_close(nothing(residual[1]), residual[0](residual[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "attention", "resnext", "mlp"])
def test_multiply_accumulates_are_those_torch_counts(name: str):
    model, x = case(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel goes uncounted
        model(x)
    assert 2 * len(x) * sum(p.macs for p in layout(quantize(model, Bits(), x)).products) == counter.get_total_flops()


def test_batchnorm_is_folded_and_the_given_model_untouched(residual: tuple[nn.Module, Tensor]):
    before = {k: v.clone() for k, v in residual[0].state_dict().items()}
    graph, _ = float_graph(*residual)
    assert not [n for n in graph.graph.nodes if "batch_norm" in n.name]
    assert "norm.weight" not in dict(graph.named_parameters()) and "a.weight" in dict(graph.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in residual[0].state_dict().items())
    factor = residual[0].norm.weight / (residual[0].norm.running_var + 1e-5).sqrt()
    torch.testing.assert_close(graph.a.weight, residual[0].a.weight * factor[:, None, None, None])


def test_writing_in_place_is_undone_where_it_can_be_and_refused_elsewhere():
    class InPlace(nn.Module):
        def __init__(self, part: bool) -> None:
            super().__init__()
            self.a, self.part = nn.Linear(4, 4), part

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.part:
                y[:, :2].mul_(2.0)
            return self.a(y.relu_())

    x = torch.randn(3, 4)
    module = quantized(InPlace(False).eval(), x)
    assert [q.name for q in quantizers(module)] == ["a.weight", "x", "relu"]
    with pytest.raises(ValueError, match="build a new tensor instead"):
        quantize(InPlace(True).eval(), Bits(), x)


def test_bits_survive_json_and_refuse_nonsense():
    bits = Bits({"a": 4, "b": None}, {"x": 3}, weight=8, product=4, group=32)
    assert bits_from_json(bits.to_json()) == bits
    for wrong in (1, 9, 4.0, True):
        with pytest.raises(ValueError, match="from 2 to 8, or None"):
            Bits(weights={"a": wrong})
    for text in ("[]", "{}", "3", '{"version":1,"wieght":4}', "not json"):
        with pytest.raises(ValueError, match="not the bits"):
            bits_from_json(text)


def test_unknown_names_and_modules_are_refused(residual: tuple[nn.Module, Tensor]):
    with pytest.raises(ValueError, match=r"no weight 'd\.weight'; it has a\.weight"):
        quantize(*_with_bits(residual, weights={"d.weight": 4}))
    with pytest.raises(ValueError, match="no site 'relu_9'"):
        quantize(*_with_bits(residual, sites={"relu_9": 4}))
    with pytest.raises(ValueError, match="quantize"):
        layout(residual[0])
    with pytest.raises(ValueError, match="call calibrate"):
        quantize(*_with_bits(residual)).eval()(residual[1])


def test_calibration_sees_whole_batches_and_gives_every_site_its_own_grid(residual: tuple[nn.Module, Tensor]):
    module, x = quantize(*_with_bits(residual)), residual[1]
    seen = observe(module, [(x, None), (10 * x, None)], examples=len(x))
    assert seen["x"].low == pytest.approx(float(x.min())) and seen["x"].high == pytest.approx(float(x.max()))
    calibrate(module, seen, method="minmax")
    found = {q.name: q.grid for q in quantizers(module)}
    assert float(found["x"].scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-2)
    assert int(found["relu_1"].zero_point) == 0 and int(found["x"].zero_point) > 0
    assert module.training == residual[0].training
    again = calibrate(quantize(*_with_bits(residual, product=4)), {**seen, "relu.read": seen["relu"]}, method="minmax")
    assert {q.name: q.scheme.bits for q in quantizers(again)}["x"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [], "no batches"),
        (lambda x: [(x.fill_(float("nan")), None)], "x"),
        (lambda x: [(x.repeat(20, 1, 1, 1), torch.zeros(80, dtype=torch.int64))], "sorted by class; shuffle"),
        (lambda x: [(torch.zeros_like(x), None)], "x"),
    ],
)
def test_bad_calibration_data_is_refused(residual: tuple[nn.Module, Tensor], change, message: str):
    module = quantize(*_with_bits(residual))
    with pytest.raises(ValueError, match=message):
        calibrate(module, change(residual[1].clone()))
    with pytest.raises(ValueError, match="was not observed"):
        calibrate(module, {})


@pytest.mark.parametrize("zero", [0, 0.3, 1, 2.6])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_activations_are_those_of_the_definition(bits: int, zero: float, generator: torch.Generator):
    """By finite differences of the function that straight-through gradients are those of: what rounding adds is held as it is."""
    x = torch.randn(2, 3, 4, 5, generator=generator).mul_(3).contiguous(memory_format=torch.channels_last).requires_grad_()
    scheme, scale = Scheme(bits, symmetric=False), torch.tensor(3.0 / 2**bits, requires_grad=True)
    offset = (-zero * scale.detach()).requires_grad_(bool(zero))
    y = round_and_learn(x, scheme, scale, offset, 0.5)
    assert torch.equal(y, fake_quantize(x.detach(), grid(scheme, scale.detach(), round(zero))))
    g = torch.randn(y.shape, generator=generator)
    y.backward(g)
    exact = x.detach().double() / scale.item() + round(zero)
    level, inside = exact.round().clamp(0, scheme.qmax), (exact.round() >= 0) & (exact.round() <= scheme.qmax)

    def weighted(scale: float, offset: float) -> Tensor:
        steps = torch.where(inside, x0 / scale + (level - exact), level - (-offset / scale + round(zero) + o0 / s0))
        return (steps * scale * g).sum()

    x0, s0, o0, h = x.detach().double(), scale.item(), offset.item(), 1e-6
    by_scale = (weighted(s0 + h, o0) - weighted(s0 - h, o0)) / (2 * h)
    assert float(scale.grad) == pytest.approx(0.5 * float(by_scale), rel=1e-3, abs=1e-3)
    by_offset = (weighted(s0, o0 + h) - weighted(s0, o0 - h)) / (2 * h)
    assert offset.grad is None if not zero else float(offset.grad) == pytest.approx(0.5 * float(by_offset), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(x.grad, torch.where(inside, g, 0.0))
    with pytest.raises(ValueError, match="no size of a step"):
        round_and_learn(x, scheme, torch.tensor(-1.0), offset.detach(), 1.0)


def test_a_lower_end_that_was_calibrated_wrong_is_learned(generator: torch.Generator):
    x = torch.randn(4096, generator=generator) - 0.7
    quantizer = ActivationQuantizer("x", Scheme(4, symmetric=False))
    quantizer.grid = grid(quantizer.scheme, 0.2, 1)  # from -0.2 to 2.8
    descent = torch.optim.Adam(quantizer.parameters(), 0.02)
    for _ in range(1000):
        descent.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        descent.step()
    best = fit_grid(x, quantizer.scheme)
    error = [float((fake_quantize(x, g) - x).square().mean()) for g in (quantizer.grid, best)]
    assert error[0] < 1.05 * error[1] and int(quantizer.grid.zero_point) == int(best.zero_point)


def test_it_trains_with_fit_and_goes_on_from_a_checkpoint(residual: tuple[nn.Module, Tensor], tmp_path):
    model, x = residual
    labels = torch.arange(4) % 5
    module = quantized(model, x, Bits(weight=4, product=4))
    settings = {"epochs": 3, "lr": 0.05, "seed": 1, "teacher": model, "distill_weight": 0.1, "clip_norm": 1.0}
    whole = fit(module, F.cross_entropy, lambda seed: [(x, labels)] * 4, **settings)
    assert whole.history[-1].loss < whole.history[0].loss
    scales = [(q.name, float(q.scale.detach().flatten()[0])) for q in quantizers(whole.model)]
    assert scales != [(q.name, float(q.scale.detach().flatten()[0])) for q in quantizers(module)]
    assert bits_of(whole.model) == bits_of(module)

    class Stop(Exception):
        pass

    def stop(epoch) -> None:
        if epoch.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(module, F.cross_entropy, lambda seed: [(x, labels)] * 4, checkpoints=tmp_path, progress=stop, **settings)
    again = fit(module, F.cross_entropy, lambda seed: [(x, labels)] * 4, checkpoints=tmp_path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True))


def test_scales_stay_put_where_they_are_not_to_learn(residual: tuple[nn.Module, Tensor]):
    model, x = residual
    module = calibrate(quantize(model, Bits(), x, learn=False), [(x, None)])
    trained = fit(module, F.cross_entropy, lambda seed: [(x, torch.arange(4))], epochs=1, lr=0.1).model
    assert not torch.equal(trained.a.weight, module.a.weight)
    for a, b in zip(quantizers(module), quantizers(trained), strict=True):
        assert torch.equal(a.scale, b.scale)


def test_scales_of_nearly_dead_channels_survive_training(residual: tuple[nn.Module, Tensor]):
    model, x = residual
    with torch.no_grad():
        model.c.weight[0] *= 1e-9
    module = quantized(model, x, Bits(weight=4))
    quantizer = next(q for q in quantizers(module) if q.name == "c.weight")
    assert isinstance(quantizer, WeightQuantizer)
    with torch.no_grad():
        quantizer.scale.sub_(1.0)
    assert bool((quantizer.grid.scale > 0).all())
    module.train()(x).sum().backward()
    assert quantizer.scale.grad is not None and bool(quantizer.scale.grad.isfinite().all())
    lower(module)  # the biases fit into 32 bits


def test_training_leaves_modes_and_dropout_as_they_are():
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3)).train()
    x = torch.randn(8, 6)
    module = calibrate(quantize(model, Bits(), x), [(x, None)])
    assert module.training and not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x)) and model.training


def test_switching_is_undone(residual: tuple[nn.Module, Tensor]):
    module = quantized(*residual)
    switch(module, False)
    with floating(module):
        pass
    assert not any(q.on for q in quantizers(module))
    switch(module, True)
    assert all(q.on for q in quantizers(module))


@pytest.mark.parametrize("name", ["resnet_padded", "densenet", "attention"])
def test_packed_files_give_the_module_back_bit_for_bit(name: str, tmp_path):
    model, x = case(name)
    module = quantized(model, x, Bits(weight=3, product=5))
    packed.save(module, tmp_path / "a.safetensors", {"reason": "test"})
    fresh = zoo.ZOO[name]().eval()
    again = packed.load(fresh, x, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(again(x), module(x))
    with pytest.raises(ValueError, match="another model"):
        packed.load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-7])
    with pytest.raises(ValueError, match="damaged"):
        packed.load(fresh, x, tmp_path / "a.safetensors")


def test_attention_is_spelt_out_with_masks_and_grouped_heads():
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
            plain = F.scaled_dot_product_attention(q, q, q, scale=0.3)
            causal = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
            return plain + causal + F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    inputs = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 1, 5, 5)
    module = quantize(Attention(), Bits(), inputs)
    assert sum(p.operator == "matmul" for p in layout(module).products) == 6


@pytest.mark.parametrize(
    ("weight", "x", "message"),
    [
        (float("inf"), 1.0, r"0\.weight holds NaN or infinities \(1 of 12 values\); train the model again"),
        (1.0, float("nan"), r"input 0 of the example holds NaN or infinities \(1 of 6 values\); clean the data"),
        (3e38, 3e38, "what the model computes for the example holds NaN or infinities"),
    ],
)
def test_what_is_not_finite_is_named(weight: float, x: float, message: str):
    model, example = nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3)
    with torch.no_grad():
        model[0].weight[0, 0] = weight
        example[0, 0] = x
    with pytest.raises(ValueError, match=message):
        quantize(model, Bits(), example)


def test_a_random_model_is_refused():
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.raises(ValueError, match="random in eval mode"):
        quantize(Random(), Bits(), torch.randn(2, 3))


def test_replacing_a_default_changes_the_bits_of_what_is_not_named():
    bits = replace(Bits({"a": 3}), weight=5)
    assert (bits.of_weight("a"), bits.of_weight("b")) == (3, 5)


def test_tokens_have_grids_of_their_own_and_need_no_calibration():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).eval(), torch.randn(4, 5, 8)
    module = quantize(model, Bits(dynamic=True, sum=None), x).eval()
    scaled = x.clone()
    scaled[0, 0] *= 1000  # an outlier costs the other tokens nothing
    with torch.no_grad():
        assert torch.equal(module(x)[1:], module(scaled)[1:]) and torch.equal(module(x)[0, 1:], module(scaled)[0, 1:])
        torch.testing.assert_close(module(x), model(x), atol=0.05, rtol=0)
        torch.testing.assert_close(lower(module)(x), module(x))
    module.train()(x).sum().backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if n.endswith("weight"))


def test_groups_of_inputs_have_scales_of_their_own_where_linear_layers_read_them():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(24, 6)).eval()
    module = quantized(model, torch.randn(4, 4, 5), Bits(weight=4, group=8))
    assert {q.name: tuple(q.scale.shape) for q in quantizers(module) if isinstance(q, WeightQuantizer)} == {
        "0.weight": (8,), "2.weight": (6, 3),
    }  # fmt: skip
