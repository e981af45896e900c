"""Half precision: the ranking stays, overflow is noticed and run again, small gradients survive, and the scale is taken off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import gauss_newton, spearman
from curvepress.objective import Batch, Loss

ESTIMATORS = ("exact", "pairs", "sketch", "monte_carlo_fisher", "empirical_fisher", "hessian", "gauss_newton", "controlled")


def network() -> nn.Module:
    torch.manual_seed(0)
    inner = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(*inner, nn.Linear(48, 3)).eval()
    model[0].weight.data *= torch.logspace(-1, 0.5, 12)[:, None, None, None]
    return model


def batch(size: int = 8) -> Batch:
    g = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 4, 4, generator=g), torch.randint(3, (size,), generator=g)


def channels(model: nn.Module) -> dict[str, curvature.Measure]:
    rows = {n: curvature.output_channels(n, p) for n, p in model.named_parameters() if p.ndim > 1}
    own = curvature.Direction((curvature.along("0.weight", (12, 1, 3, 3), 0),), 12)
    return rows | {"own": own, "a": curvature.Activation("2", 1)}


def times(factor: float) -> Loss:
    return lambda z, y: factor * F.cross_entropy(z, y)


def estimated(loss: Loss, precision: str, estimator: str) -> curvature.Curvature:
    model = network()
    return curvature.estimate(model, loss, [batch()], channels(model), estimator=estimator, precision=precision, probes=2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_ranks_alike(estimator: str, precision: str) -> None:
    full, half = (estimated(F.cross_entropy, p, estimator) for p in ("full", precision))
    for name in ("0.weight", "3.weight", "own", "a"):
        assert spearman(full.mean[name], half.mean[name]) >= 0.95, name
        if precision == "float16":  # in bfloat16 a unit near zero may cross it
            np.testing.assert_allclose(half.mean[name], full.mean[name], rtol=0.05, atol=0.04 * np.abs(full.mean[name]).max())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("factor", [3e4, 1e-6])
def test_float16_is_right_where_the_first_scales_overflow_and_where_gradients_are_small(estimator: str, factor: float) -> None:
    full, half = estimated(F.cross_entropy, "full", estimator), estimated(times(factor), "float16", estimator)
    scale = factor**2 if estimator == "empirical_fisher" else factor
    for name, values in full.mean.items():
        assert np.isfinite(half.mean[name]).all()
        np.testing.assert_allclose(half.mean[name] / scale, values, rtol=0.05, atol=0.04 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("factor", [3e4, 1e-6])
def test_one_fixed_scale_would_not_do(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauss_newton, "SCALES", (2.0**15 if factor > 1 else 1.0,))
    if factor > 1:
        with pytest.raises(ValueError, match="not finite in float16"):
            estimated(times(factor), "float16", "hessian")
    else:
        full, half = estimated(F.cross_entropy, "full", "hessian"), estimated(times(factor), "float16", "hessian")
        assert np.abs(half.mean["0.weight"] / factor - full.mean["0.weight"]).max() > 0.04 * np.abs(full.mean["0.weight"]).max()


def test_each_scale_is_tried_in_turn_and_taken_off() -> None:
    tried: list[float] = []

    def run(scale: float) -> gauss_newton.Sums:
        tried.append(scale)
        value = torch.tensor([1.5 * scale**2 if scale < 100 else float("nan")], dtype=torch.float64)
        return gauss_newton.Sums({"w": value}, {"d": 2 * value})

    found = gauss_newton.scaled(run, torch.float16, 2)
    assert tried == [2.0**15, 2.0**12, 2.0**9, 2.0**6] and found.squares["w"] == 1.5 and found.totals["d"] == 3.0
    for half in (None, torch.bfloat16):
        tried.clear()
        assert gauss_newton.scaled(run, half, 2).squares["w"] == 1.5 and tried == [1.0]


@pytest.mark.parametrize("estimator", ["exact", "hessian"])
def test_what_is_never_finite_is_refused(estimator: str) -> None:
    def huge(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.double(), y) * 1e30

    with pytest.raises(ValueError, match="not finite in float16 at any loss scale; look for overflow .* ask for another precision"):
        estimated(huge, "float16", estimator)
    model, (x, y) = nn.Sequential(nn.Linear(4, 3)), (torch.full((2, 4), 1e25), torch.tensor([0, 1]))
    model[0].weight.data *= 1e-25
    with pytest.raises(ValueError, match="not finite in the model's precision"):
        curvature.estimate(model, F.cross_entropy, [(x, y)], {"w": curvature.layer("0.weight")}, estimator=estimator)


@pytest.mark.parametrize("estimator", ["exact", "hessian", "empirical_fisher"])
def test_a_loss_that_is_not_finite_is_refused(estimator: str) -> None:
    model, (x, y) = network(), batch()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss of a batch is nan"):
        curvature.estimate(model, F.cross_entropy, [(x, y)], {"w": curvature.layer("0.weight")}, estimator=estimator)
