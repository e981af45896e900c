"""Rounding by output error against outputs computed directly and against every possible choice of levels."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from curvepress.quantization.quantizer import Scheme, dequantize, fake_quantize, fit_grid, quantize
from curvepress.quantization.rounding import fit_and_round, gram_convolution, gram_linear, output_error, round_weight

CONVOLUTIONS = [
    {"weight": (6, 4, 3, 3), "x": (5, 4, 8, 7), "padding": 1},
    {"weight": (6, 4, 3, 2), "x": (5, 4, 9, 7), "padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)},
    {"weight": (8, 2, 3, 3), "x": (3, 8, 6, 6), "padding": [1, 1], "stride": [2, 2], "groups": 4},
    {"weight": (8, 1, 3, 3), "x": (3, 8, 6, 6), "groups": 8},
    {"weight": (4, 6, 1, 1), "x": (3, 6, 5, 5), "stride": 2},
    {"weight": (4, 6, 3), "x": (3, 6, 11), "padding": (1,), "stride": [2]},
    {"weight": (4, 3, 5), "x": (3, 6, 11), "padding": 2, "dilation": 2, "groups": 2},
]


def correlated(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values whose last dimension is correlated, with one entry always near zero."""
    mix = torch.randn(shape[-1], shape[-1], generator=generator) + 1
    mix[:, 0] *= 1e-3
    return torch.randn(shape, generator=generator) @ mix


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: f"{case['weight']}")
def test_gram_matrices_of_convolutions_give_the_output_error(case: dict, generator: torch.Generator):
    sizes = {k: v for k, v in case.items() if k not in ("weight", "x")}
    x, change = (torch.randn(case[k], generator=generator) for k in ("x", "weight"))
    convolution = nn.functional.conv2d if change.dim() == 4 else nn.functional.conv1d
    expected = convolution(x.double(), change.double(), **sizes).square().sum()
    whole = gram_convolution(x, change, **sizes)
    batches = sum(gram_convolution(part, change, **sizes) for part in x.split(2))
    assert output_error(change, whole) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(whole, batches, rtol=1e-4, atol=1e-4)


def test_large_batches_are_cut_without_a_trace(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    x, weight = torch.randn(7, 3, 6, 6, generator=generator), torch.zeros(2, 3, 3, 3)
    whole = gram_convolution(x, weight)
    monkeypatch.setattr("curvepress.quantization.rounding.COLUMNS", 2 * x[0].numel() * 9)
    assert torch.allclose(gram_convolution(x, weight), whole, rtol=1e-5, atol=1e-5)


def test_gram_matrices_of_linear_layers_give_the_output_error(generator: torch.Generator):
    x, change = torch.randn(4, 5, 7, generator=generator), torch.randn(3, 7, generator=generator)
    assert output_error(change, gram_linear(x)) == pytest.approx(float((x.double() @ change.double().T).square().sum()), rel=1e-5)


def damped_error(change: Tensor, gram: Tensor, damping: float = 0.01) -> float:
    level = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return output_error(change, gram + damping * level * torch.eye(gram.shape[-1], dtype=torch.float64))


SCHEMES = [Scheme(2, axis=0), Scheme(3, False, axis=0), Scheme(4), Scheme(4, axis=0, group=5), Scheme(8, axis=0)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_better_methods_have_smaller_output_errors(scheme: Scheme, generator: torch.Generator):
    weight, gram = torch.randn(12, 80, generator=generator), gram_linear(correlated((300, 80), generator))
    grid = fit_grid(weight, scheme)
    levels = {m: round_weight(weight, grid, gram, method=m) for m in ("nearest", "compensated", "adaptive")}
    errors = {m: damped_error(dequantize(q, grid) - weight, gram) for m, q in levels.items()}
    assert torch.equal(levels["nearest"], quantize(weight, grid))
    assert errors["adaptive"] <= errors["compensated"] < 0.8 * errors["nearest"]
    for q in levels.values():
        assert q.dtype == scheme.dtype and q.shape == weight.shape
        assert int(q.min()) >= scheme.qmin and int(q.max()) <= scheme.qmax


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(2, False, axis=0)], ids=str)
@pytest.mark.parametrize("method", ["nearest", "compensated", "adaptive"])
def test_scales_that_are_fitted_too_are_never_worse(scheme: Scheme, method: str, generator: torch.Generator):
    weight, gram = torch.randn(12, 40, generator=generator), gram_linear(correlated((300, 40), generator))
    grid = fit_grid(weight, scheme)
    before = damped_error(dequantize(round_weight(weight, grid, gram, method=method), grid) - weight, gram)
    after = damped_error(dequantize(*fit_and_round(weight, grid, gram, method=method)) - weight, gram)
    assert after == before if scheme.group is not None else after < before


@pytest.mark.parametrize("scheme", [Scheme(3, axis=0), Scheme(3, False, axis=0), Scheme(3)], ids=str)
def test_fitted_scales_are_the_best_for_their_levels(scheme: Scheme, generator: torch.Generator):
    weight, gram = (
        torch.randn(6, 2, 3, 3, generator=generator),
        torch.stack([gram_linear(correlated((99, 18), generator))[0] for _ in range(3)]),
    )
    levels, grid = fit_and_round(weight, fit_grid(weight, scheme), gram)
    best = damped_error(dequantize(levels, grid) - weight, gram)
    for factor in (0.99, 1.01):
        for channel in range(max(grid.scale.numel(), 1)):
            scale = grid.scale.clone()
            scale.view(-1)[channel] *= factor
            assert damped_error(dequantize(levels, replace(grid, scale=scale)) - weight, gram) > best


def test_errors_go_down_for_grouped_convolutions(generator: torch.Generator):
    x, weight = torch.randn(6, 8, 9, 9, generator=generator).relu() + 0.3, torch.randn(12, 2, 3, 3, generator=generator)
    gram, grid = gram_convolution(x, weight, padding=1, groups=4), fit_grid(weight, Scheme(3, axis=0))
    output = nn.functional.conv2d(x, weight, padding=1, groups=4)
    errors = [
        float(
            (nn.functional.conv2d(x, dequantize(round_weight(weight, grid, gram, method=m), grid), padding=1, groups=4) - output)
            .square()
            .sum()
        )
        for m in ("nearest", "compensated", "adaptive")
    ]
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.75 * errors[0]


def test_no_single_level_can_be_changed_for_the_better(generator: torch.Generator):
    weight, gram = torch.randn(3, 12, generator=generator), gram_linear(correlated((50, 12), generator))
    grid = fit_grid(weight, Scheme(3, axis=0))
    levels = round_weight(weight, grid, gram)
    best = damped_error(dequantize(levels, grid) - weight, gram)
    for row, column, level in itertools.product(range(3), range(12), range(-4, 4)):
        other = levels.clone()
        other[row, column] = level
        assert damped_error(dequantize(other, grid) - weight, gram) >= best * (1 - 1e-9)


def test_adaptive_rounding_is_close_to_the_best_of_all_choices(generator: torch.Generator):
    ratios = []
    for _ in range(12):
        weight, gram = torch.randn(1, 7, generator=generator), gram_linear(correlated((40, 7), generator))
        grid = fit_grid(weight, Scheme(2, axis=0))
        choices = torch.tensor(list(itertools.product(range(-2, 2), repeat=7)), dtype=torch.int8)
        changes = (choices * grid.scale - weight).double()
        damped = gram[0] + 0.01 * gram[0].diagonal().mean() * torch.eye(7, dtype=torch.float64)
        least = float((changes @ damped * changes).sum(1).min())
        found, nearest = (
            damped_error(dequantize(round_weight(weight, grid, gram, method=m), grid) - weight, gram) for m in ("adaptive", "nearest")
        )
        assert found >= least * (1 - 1e-9)
        ratios.append((found / least, nearest / least))
    found, nearest = (sorted(r[k] for r in ratios)[len(ratios) // 2] for k in (0, 1))
    assert found < 1.01 and nearest > 1.2


def test_uncorrelated_inputs_are_rounded_to_the_nearest(generator: torch.Generator):
    weight = torch.randn(5, 30, generator=generator)
    grid = fit_grid(weight, Scheme(4, axis=0))
    gram = torch.diag(torch.rand(30, generator=generator, dtype=torch.float64) + 0.1)[None]
    for method in ("compensated", "adaptive"):
        assert torch.equal(round_weight(weight, grid, gram, method=method), quantize(weight, grid))
        assert torch.equal(round_weight(weight, grid, torch.zeros(1, 30, 30, dtype=torch.float64), method=method), quantize(weight, grid))


def test_error_compensation_is_that_of_the_paper(generator: torch.Generator):
    """One input after the other: of all ways to move the rest the one with the least error is taken."""
    weight, x = torch.randn(2, 6, generator=generator), correlated((30, 6), generator)
    grid, gram = fit_grid(weight, Scheme(3, axis=0)), gram_linear(x)
    damped = gram[0] + 0.01 * gram[0].diagonal().mean() * torch.eye(6, dtype=torch.float64)
    values, fixed = weight.double().clone(), []
    for i in damped.diagonal().argsort(descending=True).tolist():
        fixed.append(i)
        free = [j for j in range(6) if j not in fixed]
        values[:, i] = fake_quantize(values[:, i, None].expand(2, 6), grid)[:, 0]
        change = (values - weight)[:, fixed]
        if free:
            values[:, free] = weight[:, free].double() - change @ damped[fixed][:, free] @ torch.linalg.inv(damped[free][:, free])
    assert torch.allclose(dequantize(round_weight(weight, grid, gram, method="compensated"), grid).double(), values)


@pytest.mark.parametrize("inputs", [1, 63, 64, 65, 130])
def test_blocks_leave_no_seam(inputs: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    weight, gram = torch.randn(4, inputs, generator=generator), gram_linear(correlated((200, inputs), generator))
    grid = fit_grid(weight, Scheme(4, axis=0))
    in_blocks = round_weight(weight, grid, gram, method="compensated")
    monkeypatch.setattr("curvepress.quantization.rounding.BLOCK", 10**6)
    assert torch.equal(in_blocks, round_weight(weight, grid, gram, method="compensated"))


def test_what_does_not_fit_together_is_refused():
    weight = torch.randn(4, 6)
    grid, gram = fit_grid(weight, Scheme(4, axis=0)), torch.eye(6, dtype=torch.float64)[None]
    for wrong, options, what in [
        (gram[0], {}, "goes with Gram matrices"),
        (gram[:, :5, :5], {}, "goes with Gram matrices"),
        (gram.expand(3, 6, 6), {}, "goes with Gram matrices"),
        (gram * math.nan, {}, "are finite"),
        (gram, {"damping": 0.0}, "damping is positive"),
        (gram, {"method": "best"}, "methods are nearest, compensated and adaptive, got 'best'"),
    ]:
        with pytest.raises(ValueError, match=what):
            round_weight(weight, grid, wrong, **options)
    with pytest.raises(ValueError, match="channels are along dimension 0"):
        round_weight(weight, fit_grid(weight, Scheme(4, axis=1)), gram)
    with pytest.raises(ValueError, match="one or two dimensions"):
        gram_convolution(torch.zeros(1, 2, 3, 3, 3), torch.zeros(2, 2, 1, 1, 1))
