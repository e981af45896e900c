"""Faster ways to the same figures: derivatives of every order, windows instead of grouped convolutions, sums over rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature.factors import Convolved, convolved
from curvepress.curvature.graph import Use, nodes, uses
from curvepress.curvature.measures import by_rows
from curvepress.curvature.twice import Convolution, Inputs, Normalised, Weights


class Mixed(nn.Module):
    """Convolutions of many geometries and normalisation with and without weights, not asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 0))
        self.norm, self.bare = nn.BatchNorm2d(4), nn.BatchNorm2d(6, affine=False)
        self.second = nn.Conv2d(4, 6, 3, dilation=(1, 2), groups=2, bias=False, padding="same")
        self.third = nn.Conv2d(6, 4, 1, groups=2)
        self.head = nn.Linear(4, 3)
        for norm in (self.norm, self.bare):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.head(torch.sigmoid(self.third(self.bare(self.second(x)))).mean((2, 3)))


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[str]]:
    torch.manual_seed(0)
    model = Mixed().double().eval()
    weights = [n for n, p in model.named_parameters() if p.ndim > 1]
    return model, [(torch.randn(3, 2, 6, 7, dtype=torch.float64), torch.tensor([0, 2, 1]))], weights


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "gap"])
def test_products_are_those_of_double_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, weights = problem()
    v = np.random.default_rng(0).standard_normal(sum(p.numel() for n, p in model.named_parameters() if n in weights))
    used: list[str] = []
    for function in (Convolution, Normalised):
        own = function.forward
        monkeypatch.setattr(function, "forward", staticmethod(lambda *a, o=own, f=function: used.append(f.__name__) or o(*a)))
    found = curvature.matrix(model, F.cross_entropy, batches, weights, kind=kind) @ v
    assert (set(used) == {"Convolution", "Normalised"}) == (kind == "hessian")
    parameters = [dict(model.named_parameters())[n] for n in weights]
    slopes = torch.autograd.grad(F.cross_entropy(model(batches[0][0]), batches[0][1]), parameters, create_graph=True)
    parts = [p.reshape(w.shape) for p, w in zip(torch.as_tensor(v).split([w.numel() for w in parameters]), parameters, strict=True)]
    if kind == "hessian":
        want = torch.autograd.grad(slopes, parameters, parts)
        np.testing.assert_allclose(found, torch.cat([w.flatten() for w in want]), rtol=1e-9, atol=1e-14)
    else:
        assert np.abs(found).max() > 0


@pytest.mark.parametrize("function", [Convolution, Inputs, Weights])
def test_derivatives_of_every_order_are_right(function: type[torch.autograd.Function]) -> None:
    torch.manual_seed(0)
    geometry = ([2, 1], [1, 0], [1, 2], False, [0, 0], 2)
    x, w = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.randn(4, 1, 2, 2, dtype=torch.float64)
    g = torch.randn_like(torch.ops.aten.convolution(x, w, None, *geometry))
    given = {Convolution: (x, w), Inputs: (g, w, x), Weights: (g, x, w)}[function]
    free = [t.clone().requires_grad_() for t in given[:2]]
    assert torch.autograd.gradcheck(lambda *a: function.apply(*a, *given[2:], geometry), free)
    assert torch.autograd.gradgradcheck(lambda *a: function.apply(*a, *given[2:], geometry), free)


GEOMETRIES = [(1, 1, 1, 3), (2, 1, 1, 3), (1, 0, 2, 3), (1, 0, 1, 1), (2, 0, 1, 1)]


@pytest.mark.parametrize(("stride", "padding", "dilation", "kernel"), GEOMETRIES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_windows_give_the_gradients_of_single_examples(
    stride: int, padding: int, dilation: int, kernel: int, memory: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (5, 3, 5, 6), generator=generator).float()  # whole numbers are exact in half precision too
    weight = torch.zeros(4, 3, kernel, kernel)
    node = SimpleNamespace(
        _saved_stride=[stride] * 2, _saved_padding=[padding] * 2, _saved_dilation=[dilation] * 2, _saved_groups=1,
        _saved_transposed=False, _saved_output_padding=[0, 0],
    )  # fmt: skip
    g = torch.randint(-1, 2, F.conv2d(x, weight, None, stride, padding, dilation).shape, generator=generator).float()
    use = Use("w", node, 1, None, "itself")
    whole, half = (
        Convolved(5, tuple(weight.shape), g.to(t).contiguous(memory_format=memory)[:, None], x.to(t).contiguous(memory_format=memory), use)
        for t in (torch.float32, torch.bfloat16)
    )
    assert half.narrow == (g[0, 0].numel() <= 24) and not whole.narrow
    object.__setattr__(half, "narrow", True)
    assert torch.equal(half.block(1, 4).float(), whole.block(1, 4)) and whole.block(0, 5).abs().sum() > 0
    assert torch.equal(half.squares(), whole.squares())
    torch.testing.assert_close(half.row_squares(), whole.squares().sum((1, 2, 3), keepdim=True), rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels", [2, 40])
def test_several_vectors_at_once_are_each_alone(channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Conv2d(channels, 20, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(4, channels, 5, 6, generator=generator, dtype=torch.float64)
    y = layer(x)
    (use,) = uses(nodes([y]), {id(layer.weight): "weight"})
    several = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    each, whole = [convolved(use, [g]) for g in several], convolved(use, several)
    assert whole.few == (channels == 40)  # by the products of positions, where they are few for the channels
    truth = sum(torch.autograd.grad(y[n], [layer.weight], g[n], retain_graph=True)[0].square() for g in several for n in range(4))
    for found in (whole.squares(), sum(e.squares() for e in each)):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
    for found in (whole.row_squares(), sum(e.row_squares() for e in each)):
        torch.testing.assert_close(found, truth.sum((1, 2, 3), keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", curvature.ESTIMATORS)
def test_sums_over_rows_are_sums_of_elements(estimator: str) -> None:
    model, batches, names = problem()
    own = dict(model.named_parameters())
    rows = {n: curvature.output_channels(n, own[n]) for n in names} | {"all": curvature.layer(*names)}
    fine = {n: curvature.elements(n, own[n]) for n in names}
    assert by_rows(rows, {n: p.shape for n, p in own.items()}) == set(names)
    assert not by_rows(rows | fine, {n: p.shape for n, p in own.items()})
    assert not by_rows({"a": curvature.layer("third.bias")}, {"third.bias": (4,)})
    asked = (rows, rows | {"x": fine[names[1]]}, fine)
    few, many, elements = (curvature.estimate(model, F.cross_entropy, batches, m, estimator=estimator).mean for m in asked)
    for name in rows:
        np.testing.assert_allclose(few[name], many[name], rtol=1e-9, atol=1e-15)
    for name in names:
        np.testing.assert_allclose(few[name], elements[name].reshape(len(own[name]), -1).sum(1), rtol=1e-9, atol=1e-15)
