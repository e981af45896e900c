"""Grids, ranges, trained scales, biases and histograms against plain loops, exhaustive search and onnxruntime."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from curvepress.quantization.quantizer import (
    Grid,
    Observer,
    Scheme,
    bias_scale,
    centred,
    dequantize,
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_dynamic,
    fake_quantize_learned,
    fit_bias,
    fit_grid,
    gradient_scale,
    grid,
    learned_grid,
    quantize,
    quantize_bias,
    spread,
    squared_error,
)
from curvepress.quantization.quantizer.observers import merged, observed

KINDS = [{"symmetric": True}, {"symmetric": True, "narrow": True}, {"symmetric": False}]
PLACES = [{}, {"axis": 0}, {"axis": 1}, {"axis": -1}, {"axis": 0, "group": 4}, {"axis": 1, "group": 3}, {"axis": 0, "group": 100}]
BITS_AND_PLACES = [(bits, place) for bits in range(2, 9) for place in PLACES if bits == 3 or place in PLACES[bits % 2 :: 4]]
SCHEMES = [Scheme(bits, **kind, **place) for bits, place in BITS_AND_PLACES for kind in KINDS]
FEW = [scheme for k, scheme in enumerate(SCHEMES) if k % 4 == 0]


def random_grid(scheme: Scheme, shape: tuple[int, ...], generator: torch.Generator) -> Grid:
    channels = 0 if scheme.axis is None else shape[scheme.axis]
    groups = 0 if scheme.group is None else -(-math.prod(shape) // channels // scheme.group)
    dims = [n for n in (channels, groups) if n]
    scale = torch.rand(dims, generator=generator) * 0.3 + 0.05
    zero = torch.zeros(dims) if scheme.symmetric else torch.randint(0, scheme.qmax + 1, dims, generator=generator)
    return grid(scheme, scale, zero)


def scale_index(index: tuple[int, ...], shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """Where in a grid's scale the element at ``index`` finds its own."""
    if scheme.axis is None:
        return ()
    axis = scheme.axis % len(shape)
    rest = [d for d in range(len(shape)) if d != axis]
    place = 0
    for d in rest:
        place = place * shape[d] + index[d]
    return (index[axis],) if scheme.group is None else (index[axis], place // scheme.group)


def nearest_level(x: float, scale: float, zero: int, scheme: Scheme) -> int:
    """The level whose value is nearest, tried one by one; of two at the same distance the one at an even number of steps."""
    return min(range(scheme.qmin, scheme.qmax + 1), key=lambda q: (abs((q - zero) * scale - x), (q - zero) % 2))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_levels_are_the_nearest_ones(scheme: Scheme, generator: torch.Generator):
    x = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) * 2
    g = random_grid(scheme, x.shape, generator)
    levels = quantize(x, g)
    values = dequantize(levels, g)
    assert levels.dtype == (torch.int8 if scheme.symmetric else torch.uint8)
    for index in np.ndindex(*x.shape):
        at = scale_index(index, x.shape, scheme)
        scale, zero = float(g.scale[at]), int(g.zero_point[at])
        assert int(levels[index]) == nearest_level(float(x[index]), scale, zero, scheme)
        assert float(values[index]) == np.float32(int(levels[index]) - zero) * np.float32(scale)


def test_ties_go_to_even_steps_and_zero_is_on_every_grid():
    g = grid(Scheme(4, symmetric=False), 2.0, 5)
    assert quantize(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 5.0, 1e30, -1e30]), g).tolist() == [3, 5, 5, 5, 7, 7, 15, 0]
    for scheme in SCHEMES:
        assert not fake_quantize(torch.zeros(4, 2, 3), fit_grid(torch.randn(4, 2, 3) + 7, scheme, method="minmax")).any()


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_fake_quantization_is_quantization_and_back(scheme: Scheme, generator: torch.Generator):
    x = torch.randn(6, 4, 7, generator=generator) * 2
    g = random_grid(scheme, x.shape, generator)
    there_and_back = dequantize(quantize(x, g), g)
    assert torch.equal(fake_quantize(x, g), there_and_back)
    assert torch.equal(fake_quantize(x.clone().requires_grad_(), g).detach(), there_and_back)
    assert torch.equal(fake_quantize(there_and_back, g), there_and_back)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_straight_through_gradients_are_one_on_the_grid_and_zero_beyond(scheme: Scheme, generator: torch.Generator):
    x = (torch.randn(3, 2, 5, generator=generator) * 2).requires_grad_()
    g = random_grid(scheme, x.shape, generator)
    upstream = torch.randn(x.shape, generator=generator)
    fake_quantize(x, g).backward(upstream)
    steps = (x.detach() / spread(g.scale, scheme, x.shape)).round() + spread(g.zero_point, scheme, x.shape)
    assert torch.equal(x.grad, upstream * ((steps >= scheme.qmin) & (steps <= scheme.qmax)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 1])
def test_eight_bits_are_what_onnxruntime_computes(symmetric: bool, axis: int | None, generator: torch.Generator):
    x = torch.randn(50, 40, 3, generator=generator) * 3
    g = fit_grid(x[:, :, :2], Scheme(8, symmetric, axis))
    kind = TensorProto.INT8 if symmetric else TensorProto.UINT8
    zero = helper.make_tensor("z", kind, g.scale.shape, g.zero_point.flatten().tolist())
    scale = helper.make_tensor("s", TensorProto.FLOAT, g.scale.shape, g.scale.flatten().tolist())
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    outputs = [helper.make_tensor_value_info("q", kind, x.shape), helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)], outputs, [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    levels, values = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    assert np.array_equal(levels, quantize(x, g).numpy())
    assert np.array_equal(values, fake_quantize(x, g).numpy())


@pytest.mark.parametrize("bits", range(2, 9))
def test_centred_levels_mean_the_same_without_a_zero_point(bits: int, generator: torch.Generator):
    x = torch.randn(4, 9, generator=generator) + 1
    for symmetric in (True, False) if bits < 8 else (True,):
        g = fit_grid(x, Scheme(bits, symmetric, axis=0))
        levels = centred(quantize(x, g), g)
        assert levels.dtype == torch.int8
        assert torch.equal(levels.float() * g.scale[:, None], fake_quantize(x, g))


def test_centred_levels_of_eight_bits_need_a_symmetric_grid():
    g = fit_grid(torch.arange(-3.0, 9.0), Scheme(8, symmetric=False))
    with pytest.raises(ValueError, match="symmetric grid, or 7 bits"):
        centred(quantize(torch.zeros(3), g), g)


# Ranges


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_min_max_covers_all_and_no_more(scheme: Scheme, generator: torch.Generator):
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) + torch.tensor([-3.0, -1.0, 0.0, 2.0])[:, None]
    g = fit_grid(x, scheme, method="minmax")
    scale = spread(g.scale, scheme, x.shape)
    assert ((fake_quantize(x, g) - x).abs() <= scale * 0.5001 + (0 if scheme.symmetric else scale * 0.5)).all()
    if scheme.symmetric:
        levels = quantize(x, g)
        assert (levels == scheme.qmin).any() or (levels == scheme.qmax).any()


def test_min_max_of_known_numbers():
    x = torch.tensor([[-8.0, 3.0], [-2.0, 7.0]])
    assert fit_grid(x, Scheme(4, axis=0), method="minmax").scale.tolist() == [1.0, 1.0]
    assert torch.equal(fit_grid(x, Scheme(4, axis=0, narrow=True), method="minmax").scale, torch.tensor([8.0, 7.0]) / 7)
    asymmetric = fit_grid(torch.tensor([-1.0, 0.0, 14.0]), Scheme(4, symmetric=False), method="minmax")
    assert (float(asymmetric.scale), int(asymmetric.zero_point)) == (1.0, 1)
    positive = fit_grid(torch.tensor([30.0, 15.0]), Scheme(4, symmetric=False), method="minmax")
    assert (float(positive.scale), int(positive.zero_point)) == (2.0, 0)


def test_percentiles_leave_out_the_rest():
    x = torch.arange(-100.0, 101.0)[torch.randperm(201)]
    assert float(fit_grid(x, Scheme(8, narrow=True), method="percentile", percentile=100).scale) == pytest.approx(100 / 127)
    # of 201 magnitudes (0, then each of 1 to 100 twice) the 181st is 90
    assert float(fit_grid(x, Scheme(8, narrow=True), method="percentile", percentile=90).scale) == pytest.approx(90 / 127)
    two_ends = fit_grid(x, Scheme(8, symmetric=False), method="percentile", percentile=90)
    assert float(two_ends.scale) == pytest.approx(180 / 255)
    channels = torch.stack([x, 2 * x])
    assert torch.allclose(
        fit_grid(channels, Scheme(8, axis=0, narrow=True), method="percentile", percentile=90).scale * 127, torch.tensor([90.0, 180.0])
    )


def exhaustive(x: np.ndarray, w: np.ndarray, scheme: Scheme) -> float:
    """The least weighted squared error of any scale and zero point.

    Between two scales at which a value changes its level the levels are fixed and the best scale for them is known.
    """
    errors = []
    for zero in [0] if scheme.symmetric else range(scheme.qmax + 1):
        low, high = scheme.qmin - zero, scheme.qmax - zero
        turns = (x[:, None] / (np.arange(low, high) + 0.5)).ravel()
        turns = np.unique(turns[turns > 0])
        between = np.concatenate([turns[:1] / 2, np.sqrt(turns[1:] * turns[:-1]), turns[-1:] * 2])
        steps = np.clip(np.round(x / between[:, None]), low, high)
        weight = (w * steps**2).sum(1)
        scale = np.divide((w * x * steps).sum(1), weight, out=np.zeros_like(weight), where=weight > 0)
        errors.append((w * (steps * scale[:, None] - x) ** 2).sum(1)[scale > 0].min())
    return min(errors)


def error(x: Tensor, g: Grid, w: Tensor | float = 1.0) -> float:
    return float((w * (fake_quantize(x, g) - x).square()).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "scheme", [Scheme(b, k, narrow=b == 3) for b, k in ((2, True), (3, True), (4, True), (2, False), (3, False))], ids=str
)
def test_least_squared_error_is_near_the_least_there_is(scheme: Scheme, weighted: bool):
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(6):
        x, w = rng.standard_t(4, 72), rng.random(72) ** 3 if weighted else np.ones(72)
        g = fit_grid(torch.tensor(x), scheme, weights=torch.tensor(w) if weighted else None)
        ratios.append(error(torch.tensor(x), g, torch.tensor(w)) / exhaustive(x, w, scheme))
    assert min(ratios) > 1 - 1e-6
    assert np.median(ratios) < 1.001
    assert max(ratios) < 1.15


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_least_squared_error_is_never_above_min_max(scheme: Scheme, generator: torch.Generator):
    x = torch.randn(4, 8, 9, generator=generator, dtype=torch.float64) ** 3
    w = torch.rand(x.shape, generator=generator, dtype=torch.float64) ** 4
    for weights in (None, w):
        best = error(x, fit_grid(x, scheme, weights=weights), w if weights is not None else 1.0)
        assert best <= error(x, fit_grid(x, scheme, method="minmax"), w if weights is not None else 1.0) * (1 + 1e-6)


@pytest.mark.parametrize("scheme", [Scheme(3), Scheme(3, False), Scheme(3, axis=1), Scheme(2, False, axis=0, group=4)], ids=str)
def test_channels_and_groups_are_fitted_on_their_own(scheme: Scheme, generator: torch.Generator):
    x = torch.randn(3, 5, 2, generator=generator)
    g = fit_grid(x, scheme)
    for at in np.ndindex(*g.scale.shape):
        own = torch.tensor([float(x[i]) for i in np.ndindex(*x.shape) if scale_index(i, x.shape, scheme) == at])
        alone = fit_grid(own, Scheme(scheme.bits, scheme.symmetric))
        assert float(g.scale[at]) == pytest.approx(float(alone.scale), rel=1e-5)
        assert int(g.zero_point[at]) == int(alone.zero_point)


def test_weights_are_repetitions(generator: torch.Generator):
    x = torch.randn(60, generator=generator, dtype=torch.float64)
    times = torch.randint(0, 4, (60,), generator=generator)
    for scheme in (Scheme(3), Scheme(3, symmetric=False)):
        weighted = fit_grid(x, scheme, weights=times)
        # the values that weigh nothing stay, so that both searches start from the same ends
        repeated = torch.cat([x.repeat_interleave(times * 1000), x])
        assert float(weighted.scale) == pytest.approx(float(fit_grid(repeated, scheme).scale), rel=1e-3)


def test_weights_matter_by_their_ratios_only(generator: torch.Generator):
    x, w = torch.randn(3, 40, generator=generator), torch.rand(3, 40, generator=generator)
    for scheme in (Scheme(3, axis=0), Scheme(3, symmetric=False, axis=0)):
        once, less = (fit_grid(x, scheme, weights=w.double() * 2.0**-k) for k in (0, 200))
        assert torch.equal(once.scale, less.scale) and torch.equal(once.zero_point, less.zero_point)
        assert torch.equal(fit_grid(x, scheme, weights=torch.zeros(3, 40)).scale, fit_grid(x, scheme).scale)


@pytest.mark.parametrize("scheme", [Scheme(2, axis=0), Scheme(3, axis=0, narrow=True), Scheme(3, False, axis=0)], ids=str)
def test_no_other_scale_suits_the_chosen_levels_better(scheme: Scheme, generator: torch.Generator):
    x = torch.randn(9, 100, generator=generator, dtype=torch.float64) ** 3
    w = torch.rand(9, 100, generator=generator, dtype=torch.float64) ** 3
    for weights in (torch.ones_like(x), w):
        g = fit_grid(x, scheme, weights=weights)
        steps = quantize(x, g).double() - g.zero_point[:, None]
        closed = (weights * x * steps).sum(1) / (weights * steps * steps).sum(1)
        assert torch.allclose(g.scale.double(), closed, rtol=1e-4)


def test_curvature_moves_the_grid_to_where_it_matters(generator: torch.Generator):
    x = torch.randn(4000, generator=generator)
    outer = (x.abs() > 2.5).float() + 1e-4
    plain, curved = fit_grid(x, Scheme(3)), fit_grid(x, Scheme(3), weights=outer)
    assert float(curved.scale) > 1.2 * float(plain.scale)
    assert error(x, curved, outer) < 0.5 * error(x, plain, outer)


def test_grids_scale_with_the_data(generator: torch.Generator):
    x = torch.randn(5, 30, generator=generator)
    for scheme in (Scheme(4, axis=0), Scheme(4, False, axis=0)):
        for method in ("minmax", "percentile", "mse"):
            once, twice = (fit_grid(k * x, scheme, method=method) for k in (1, 2.0**-20))
            assert torch.equal(once.scale * 2.0**-20, twice.scale)
            assert torch.equal(once.zero_point, twice.zero_point)


def test_channels_of_zeros_share_the_largest_scale():
    x = torch.tensor([[1.0, -2.0], [0.0, 0.0], [4.0, 3.0]])
    for scheme in (Scheme(8, axis=0), Scheme(8, False, axis=0), Scheme(8, axis=0, group=2)):
        g = fit_grid(x, scheme)
        dead, *others = (float(s) for s in g.scale.flatten()[[1, 0, 2]])
        assert dead == max(others)
        assert not fake_quantize(x, g)[1].any()


@pytest.mark.parametrize(
    ("data", "scheme", "options", "what"),
    [
        ([1.0, math.nan], Scheme(8), {}, "conv7 holds NaN or infinities .1 of 2"),
        ([1.0, -math.inf], Scheme(8), {}, "conv7 holds NaN or infinities"),
        ([0.0, 0.0], Scheme(8), {}, "conv7 is zero throughout"),
        ([], Scheme(8), {}, "conv7 is empty"),
        ([1e-40, 0.0], Scheme(8), {}, "conv7: scales are positive normal"),
        ([1.0, 2.0], Scheme(8), {"weights": torch.tensor([1.0, -1.0])}, "weights of conv7 are finite, not negative"),
        ([1.0, 2.0], Scheme(8), {"weights": torch.ones(3)}, "weights of conv7"),
        ([1.0, 2.0], Scheme(8), {"weights": torch.ones(2), "method": "minmax"}, "weights go with method 'mse'"),
        ([1.0, 2.0], Scheme(8), {"method": "entropy"}, "methods are minmax, percentile and mse, got 'entropy'"),
        ([1.0, 2.0], Scheme(8), {"method": "percentile", "percentile": 101.0}, "percentiles are above 50 and at most 100"),
    ],
)
def test_what_has_no_range_is_refused(data: list[float], scheme: Scheme, options: dict, what: str):
    with pytest.raises(ValueError, match=what):
        fit_grid(torch.tensor(data), scheme, name="conv7", **options)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, None])
def test_bits_out_of_range_are_refused(bits: object):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        Scheme(bits)


@pytest.mark.parametrize(
    ("scheme", "scale", "zero", "what"),
    [
        (Scheme(8), -1.0, 0, "positive"),
        (Scheme(8), 0.0, 0, "positive"),
        (Scheme(8), math.nan, 0, "positive"),
        (Scheme(8), math.inf, 0, "positive"),
        (Scheme(8), 1.0, 1, "zero points of .* are 0"),
        (Scheme(4, False), 1.0, 16, "are levels"),
        (Scheme(4, False), 1.0, -1, "are levels"),
        (Scheme(8), [1.0], 0, "has 0 dimensions"),
        (Scheme(8, axis=0), 1.0, 0, "has 1 dimensions"),
    ],
)
def test_numbers_that_are_no_grid_are_refused(scheme: Scheme, scale: object, zero: int, what: str):
    with pytest.raises(ValueError, match=what):
        grid(scheme, scale, zero)


def test_grids_for_other_shapes_and_nan_are_refused():
    with pytest.raises(ValueError, match="needs .3,."):
        quantize(torch.zeros(3, 2), grid(Scheme(4, axis=0), [1.0, 1.0]))
    with pytest.raises(ValueError, match="no level for NaN"):
        quantize(torch.tensor([math.nan]), grid(Scheme(4), 1.0))
    with pytest.raises(ValueError, match="group 0"):
        Scheme(4, axis=0, group=0)
    with pytest.raises(ValueError, match="axis None"):
        Scheme(4, group=32)


# Trained scales


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_trained_grids_compute_and_differentiate_as_the_formula_says(scheme: Scheme, generator: torch.Generator):
    x = (torch.randn(3, 2, 5, generator=generator) * 2).requires_grad_()
    g = random_grid(scheme, x.shape, generator)
    scale, zero = g.scale.clone().requires_grad_(), (g.zero_point + 0.2).requires_grad_()
    y = fake_quantize_learned(x, scheme, scale, zero, 0.25)
    assert torch.equal(y.detach(), fake_quantize(x.detach(), learned_grid(scheme, scale, zero)))
    upstream = torch.randn(x.shape, generator=generator)
    y.backward(upstream)
    expected_x, expected_scale, expected_zero = torch.zeros(x.shape), torch.zeros(scale.shape), torch.zeros(zero.shape)
    for i in np.ndindex(*x.shape):
        at = scale_index(i, x.shape, scheme)
        s, z, v = float(g.scale[at]), int(g.zero_point[at]), float(x.detach()[i])
        level = round(v / s) + z
        clamped = min(max(level, scheme.qmin), scheme.qmax)
        expected_x[i] = upstream[i] if level == clamped else 0
        expected_scale[at] += 0.25 * upstream[i] * (clamped - z - (v / s if level == clamped else 0))
        expected_zero[at] += 0.25 * upstream[i] * (0 if level == clamped else -s)
    assert torch.equal(x.grad, expected_x)
    assert torch.allclose(scale.grad, expected_scale, atol=1e-5)
    assert torch.allclose(zero.grad, expected_zero, atol=1e-5)


def test_trained_scales_find_the_least_error(generator: torch.Generator):
    x = torch.randn(3, 500, generator=generator)
    scheme = Scheme(3, axis=0)
    scale = fit_grid(x, scheme, method="minmax").scale.requires_grad_()
    for _ in range(200):
        loss = (fake_quantize_learned(x, scheme, scale, torch.zeros(3)) - x).square().mean()
        scale = (scale - 0.2 * torch.autograd.grad(loss, scale)[0]).detach().requires_grad_()
    trained, best = error(x, learned_grid(scheme, scale, torch.zeros(3))), error(x, fit_grid(x, scheme))
    assert best <= trained < 1.1 * best


def test_trained_numbers_become_grids():
    scheme = Scheme(4, symmetric=False)
    for zero, level in ((2.5, 2), (3.5, 4), (3.49, 3), (-4.0, 0), (99.0, 15)):
        x, scale = torch.linspace(-1, 1, 50), torch.tensor(0.11)
        assert int(learned_grid(scheme, scale, torch.tensor(zero)).zero_point) == level
        assert torch.equal(
            fake_quantize_learned(x, scheme, scale, torch.tensor(zero)), fake_quantize(x, learned_grid(scheme, scale, torch.tensor(zero)))
        )
    with pytest.raises(ValueError, match="positive normal"):
        learned_grid(scheme, torch.tensor(math.nan), torch.tensor(0.0))


def test_a_scale_trained_below_zero_can_come_back():
    scale = torch.tensor(-0.5, requires_grad=True)
    fake_quantize_learned(torch.tensor([1.0]), Scheme(4), scale, torch.tensor(0.0)).sum().backward()
    assert float(scale.grad) == 7.0
    assert learned_grid(Scheme(4), scale, torch.tensor(0.0)).scale > 0


def test_gradient_scale_is_that_of_the_paper():
    assert gradient_scale(400, Scheme(3)) == pytest.approx(1 / math.sqrt(400 * 3))
    assert gradient_scale(400, Scheme(3, symmetric=False)) == pytest.approx(1 / math.sqrt(400 * 7))


# Biases


def test_biases_are_rounded_on_the_scale_of_products():
    weight, activation = grid(Scheme(4, axis=0), [0.5, 0.25]), grid(Scheme(8, symmetric=False), 0.125, 7)
    scale = bias_scale(weight, activation)
    assert scale.tolist() == [0.0625, 0.03125]
    bias = torch.tensor([0.1, -0.1], requires_grad=True)
    assert quantize_bias(bias.detach(), scale).tolist() == [2, -3]
    rounded = fake_quantize_bias(bias, scale)
    assert rounded.tolist() == [0.125, -0.09375]
    rounded.backward(torch.tensor([3.0, 5.0]))
    assert bias.grad.tolist() == [3.0, 5.0]


def test_the_sum_of_integers_is_what_the_simulation_computes(generator: torch.Generator):
    w, x, bias = (torch.randn(s, generator=generator) for s in ((6, 20), (9, 20), (6,)))
    weight, activation = fit_grid(w, Scheme(4, axis=0)), fit_grid(x, Scheme(8, symmetric=False))
    scale = bias_scale(weight, activation)
    sums = (quantize(x, activation).long() - activation.zero_point) @ quantize(w, weight).long().T + quantize_bias(bias, scale)
    simulated = torch.nn.functional.linear(fake_quantize(x, activation), fake_quantize(w, weight), fake_quantize_bias(bias, scale))
    assert torch.allclose(sums.double() * scale.double(), simulated.double(), atol=1e-5)


def test_biases_that_do_not_fit_are_refused_or_given_room():
    weight, activation = grid(Scheme(8, axis=0), [1e-12, 0.1]), grid(Scheme(8, symmetric=False), 0.01)
    bias = torch.tensor([3.0, 3.0])
    with pytest.raises(ValueError, match="conv3.bias does not fit into 32 bits in 1 of 2 channels"):
        quantize_bias(bias, bias_scale(weight, activation), name="conv3.bias")
    raised = fit_bias(weight, bias, activation)
    assert raised.scale[1] == weight.scale[1]
    assert 2**29 < int(quantize_bias(bias, bias_scale(raised, activation))[0]) <= 2**30 + 64
    with pytest.raises(ValueError, match="does not fit"):
        quantize_bias(torch.tensor([math.nan]), torch.tensor(1.0))


def test_biases_need_one_scale_for_a_sum():
    per_tensor, groups = grid(Scheme(8, symmetric=False), 1.0), grid(Scheme(4, axis=0, group=2), [[1.0, 2.0]])
    with pytest.raises(ValueError, match="a sum has one scale"):
        bias_scale(groups, per_tensor)
    with pytest.raises(ValueError, match="a sum has one scale"):
        bias_scale(grid(Scheme(4), 1.0), grid(Scheme(8, axis=0), [1.0]))


# Ranges of each batch


def test_dynamic_ranges_are_those_of_onnxruntime(generator: torch.Generator):
    shape = [None, None]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("y", shape),)]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for shift in (-9.0, -1.0, 0.0, 0.3, 7.0):
        x = torch.randn(40, 30, generator=generator) + shift
        (expected,) = session.run(None, {"x": x.numpy()})
        assert np.array_equal(fake_quantize_dynamic(x, 8, per_token=False).numpy(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_each_token_has_its_own_range(bits: int, symmetric: bool, generator: torch.Generator):
    x = torch.randn(2, 5, 16, generator=generator) * torch.tensor([1e-3, 1.0, 0.0, 10.0, 1e4])[:, None]
    x.requires_grad_()
    y = fake_quantize_dynamic(x, bits, symmetric=symmetric)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    for token, rounded in zip(x.detach().flatten(0, 1), y.detach().flatten(0, 1), strict=True):
        expected = fake_quantize(token, fit_grid(token, Scheme(bits, symmetric), method="minmax")) if token.any() else token
        assert torch.allclose(rounded, expected, rtol=1e-5)


# Histograms


def test_histograms_do_not_depend_on_how_a_stream_is_cut(generator: torch.Generator):
    x = torch.randn(3000, generator=generator) * torch.logspace(-4, 3, 3000)
    whole = observed(x)
    for parts in (x.split(7), x.flip(0).split(111), x[torch.randperm(3000, generator=generator)].split(1000)):
        seen = Observer()
        for part in parts:
            seen.observe(part)
        h = seen.histogram()
        assert torch.equal(h.counts, whole.counts)
        assert (h.width, h.low, h.high) == (whole.width, float(x.min()), float(x.max()))


def test_round_values_do_not_depend_on_the_cut_either():
    for x in (torch.arange(-4000.5, 4001.0), torch.arange(-243.0, 244.0) / 2, torch.arange(0.0, 1.0, 3.0**-7)):
        assert torch.equal(merged(*map(observed, x.split(5))).counts, observed(x).counts)


def test_histograms_count_values_at_the_nearest_multiple(generator: torch.Generator):
    x = torch.cat([torch.randn(2000, generator=generator).relu(), torch.tensor([-0.3])])
    values, counts = observed(x).points()
    assert counts.sum() == len(x)
    assert values[0] == x.min() and values[-1] == x.max()
    assert counts[values == 0] >= (x == 0).sum()
    width = observed(x).width
    for value, count in zip(values[1:-1:50], counts[1:-1:50], strict=True):
        assert count == ((x.double() - value).abs() <= width / 2).sum()


def test_merged_histograms_are_those_of_all(generator: torch.Generator):
    parts = [torch.randn(100, generator=generator) * 10.0**k for k in range(-3, 4)]
    assert torch.equal(merged(*map(observed, parts)).counts, observed(torch.cat(parts)).counts)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_histogram_gives_the_grid_of_its_values(method: str, bits: int, generator: torch.Generator):
    x = torch.randn(20000, generator=generator)
    for data in (x, x.relu(), x.exp()):
        for scheme in (Scheme(bits), Scheme(bits, symmetric=False)):
            exact, streamed = fit_grid(data, scheme, method=method), fit_grid(observed(data), scheme, method=method)
            assert error(data, streamed) <= 1.01 * error(data, exact)
            if method == "minmax":
                assert torch.equal(streamed.scale, exact.scale) and torch.equal(streamed.zero_point, exact.zero_point)


def test_squared_errors_of_tensors_and_histograms(generator: torch.Generator):
    x, w = torch.randn(30, 40, generator=generator).relu(), torch.rand(30, 40, generator=generator)
    g = fit_grid(x, Scheme(4, symmetric=False))
    change = fake_quantize(x, g).double() - x.double()
    assert squared_error(x, g) == pytest.approx(float(change.square().sum()), rel=1e-5)
    assert squared_error(x, g, weights=w) == pytest.approx(float((change.square() * w).sum()), rel=1e-5)
    assert squared_error(observed(x), g) == pytest.approx(float(change.square().sum()), rel=0.01)


def test_what_was_never_seen_or_never_changed_is_refused():
    seen = Observer("relu_3")
    with pytest.raises(ValueError, match="relu_3 was never seen"):
        seen.histogram()
    seen.observe(torch.zeros(5))
    with pytest.raises(ValueError, match="relu_3 was 0 throughout"):
        seen.histogram()
    with pytest.raises(ValueError, match="relu_3 holds NaN or infinities"):
        seen.observe(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="relu_3 is empty"):
        seen.observe(torch.empty(0))
    with pytest.raises(ValueError, match="a histogram has one scale"):
        fit_grid(observed(torch.arange(5.0)), Scheme(8, axis=0))
