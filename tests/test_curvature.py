"""Estimators of curvature against dense float64 matrices of small networks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import average
from curvepress.objective import Batch


def relu_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3)).double().eval()


def smooth_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).double()


def batch(seed: int = 0, size: int = 6, width: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, width, width, generator=generator, dtype=torch.float64), torch.randint(3, (size,), generator=generator)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.ndim > 1}


def dense_hessian(model: nn.Module, data: Batch, name: str) -> np.ndarray:
    own = {n: p.detach() for n, p in model.named_parameters()}

    def loss_of(value: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**own, name: value}, (data[0],)), data[1])

    return hessian(loss_of, own[name]).reshape(own[name].numel(), -1).numpy()


def dense_gauss_newton(model: nn.Module, data: Batch, name: str) -> np.ndarray:
    own = {n: p.detach() for n, p in model.named_parameters()}
    found = jacobian(lambda value: functional_call(model, {**own, name: value}, (data[0],)), own[name])
    z = functional_call(model, own, (data[0],)).detach()
    outer = hessian(lambda v: F.cross_entropy(v, data[1]), z).reshape(z.numel(), z.numel())
    j = found.reshape(z.numel(), -1)
    return (j.T @ outer @ j).numpy()


@pytest.mark.parametrize(("make", "dense"), [(relu_network, dense_hessian), (smooth_network, dense_gauss_newton)])
def test_the_exact_trace_is_that_of_the_dense_matrix(
    make: Callable[[], nn.Module], dense: Callable[[nn.Module, Batch, str], np.ndarray]
) -> None:
    model, data = make(), batch()
    asked = {n: curvature.elements(n, w) for n, w in weights(model).items()}
    found = curvature.estimate(model, F.cross_entropy, [data], asked, estimator="exact", micro=4)
    for name in asked:
        np.testing.assert_allclose(found.mean[name], np.diag(dense(model, data, name)), rtol=1e-10, atol=1e-14)
    assert bool(found.curved) == (make is smooth_network)


def test_the_error_of_a_mean_is_that_of_unequal_samples() -> None:
    rows, sizes = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]), np.array([1, 1, 2])
    found = average(rows, sizes)
    np.testing.assert_allclose(found.mean, [3.5, 5.0])
    np.testing.assert_allclose(found.stderr, np.sqrt(1.5 * np.array([2.5**2 + 0.5**2 + 3.0**2, 9 + 9 + 36]) / 16))


@pytest.mark.parametrize("wrong", [{"micro": -1}, {"probes": 0}, {"seed": -1}, {"rate": 0.0}, {"temperature": 0.0}, {"omit": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    model = relu_network()
    asked = {n: curvature.layer(n) for n in weights(model)}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        curvature.estimate(model, F.cross_entropy, [batch()], asked, **wrong)


def test_half_precision_of_a_double_model_is_refused() -> None:
    with pytest.raises(ValueError, match="float64.*full precision"):
        curvature.estimate(relu_network(), F.cross_entropy, [batch()], {"a": curvature.layer("0.weight")}, precision="bfloat16")
