"""The estimator against dense Hessians, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F

from curvepress.curvature import average, gradient, hessian_diagonal
from curvepress.objective import Batch


class Quadratic(nn.Module):
    """The loss is its output, ``sum(a * w^2) / 2``: the Hessian is ``diag(a)``."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.w, self.a = nn.Parameter(torch.randn(a.shape, dtype=a.dtype)), a

    def forward(self, x: Tensor) -> Tensor:
        return (self.a * self.w.square()).sum() / 2 * x.mean()


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).double()


def batch(seed: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64), torch.randint(3, (size,), generator=generator)


def dense_diagonal(model: nn.Module, data: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss_of(name: str, value: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**parameters, name: value}, (data[0],)), data[1])

    return {
        n: hessian(partial(loss_of, n), parameters[n]).reshape(parameters[n].numel(), -1).diag().reshape(parameters[n].shape) for n in names
    }


NAMES = ("0.weight", "2.weight", "5.weight")


def test_law_10_one_probe_is_exact_on_a_diagonal_quadratic() -> None:
    a = torch.rand(7, dtype=torch.float64)
    sample = hessian_diagonal(
        Quadratic(a), lambda out, _: out, (torch.ones(2), None), ["w"], probes=1, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(sample["w"], a)


def test_law_10_the_error_bars_cover_the_dense_hessian_at_the_stated_rate() -> None:
    """Over channels and repetitions about 95 % of the exact traces lie within 2.02 standard errors (Student's t, 40 samples)."""
    model, data, inside = small_network(), batch(0), []
    exact = dense_diagonal(model, data, NAMES)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        draws = [hessian_diagonal(model, F.cross_entropy, data, NAMES, probes=1, generator=generator) for _ in range(40)]
        for name in NAMES:
            estimate = average(np.stack([d[name].flatten(1).sum(1).numpy() for d in draws]), np.ones(40))
            truth = exact[name].flatten(1).sum(1).numpy()
            inside += (np.abs(estimate.mean - truth) <= 2.02 * estimate.stderr).tolist()
    assert 0.90 <= np.mean(inside) <= 0.99


def test_probes_are_averaged_and_unbiased() -> None:
    model, data = small_network(), batch(1)
    got = hessian_diagonal(model, F.cross_entropy, data, NAMES, probes=3000, generator=torch.Generator().manual_seed(0))
    exact = dense_diagonal(model, data, NAMES)
    for name in NAMES:
        torch.testing.assert_close(got[name].sum(), exact[name].sum(), rtol=0.15, atol=0.02)


def test_gradient_is_that_of_autograd() -> None:
    model, data = small_network(), batch(2)
    F.cross_entropy(model(data[0]), data[1]).backward()
    got = gradient(model, F.cross_entropy, data, NAMES)
    for name, parameter in model.named_parameters():
        if name in NAMES:
            torch.testing.assert_close(got[name], parameter.grad)


def test_weights_the_loss_does_not_curve_in_have_no_curvature() -> None:
    model = nn.Linear(2, 1).double()
    sample = hessian_diagonal(
        model,
        lambda out, _: out.mean(),
        (torch.randn(3, 2).double(), None),
        ["weight"],
        probes=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(sample["weight"], torch.zeros_like(model.weight))


@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [8, 8, 8, 3]])
def test_average_weighs_batches_by_their_size(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    examples = [rng.normal(size=(n, 2)) for n in sizes]
    estimate = average(np.stack([e.mean(axis=0) for e in examples]), np.array(sizes))
    np.testing.assert_allclose(estimate.mean, np.concatenate(examples).mean(axis=0))
    assert estimate.samples == 4


def test_average_of_equal_batches_has_the_usual_standard_error() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 3))
    np.testing.assert_allclose(average(rows, np.full(9, 4)).stderr, rows.std(axis=0, ddof=1) / 3)
