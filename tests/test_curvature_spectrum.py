"""Eigenvalues and spectral densities against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F

from curvepress import curvature
from curvepress.objective import Batch


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 3)).double()


def batch(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64), torch.randint(3, (size,), generator=generator)


BATCHES = [batch(5, 0), batch(3, 1)]
NAMES = ["4.weight", "0.weight", "0.bias"]  # not in the order of the model, nor sorted
BOTH = torch.cat([x for x, _ in BATCHES]), torch.cat([y for _, y in BATCHES])


def outputs(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model's outputs on all examples as a function of the named parameters in one vector."""
    own = {n: p.detach() for n, p in model.named_parameters()}

    def run(flat: Tensor) -> Tensor:
        parts = flat.split([own[n].numel() for n in NAMES])
        changed = {n: x.view(own[n].shape) for n, x in zip(NAMES, parts, strict=True)}
        return functional_call(model, {**own, **changed}, (BOTH[0],))

    return run, torch.cat([own[n].flatten() for n in NAMES])


def dense_hessian(model: nn.Module) -> np.ndarray:
    run, at = outputs(model)
    return hessian(lambda v: F.cross_entropy(run(v), BOTH[1]), at).numpy()


def dense_gauss_newton(model: nn.Module) -> np.ndarray:
    run, at = outputs(model)
    j = jacobian(run, at).flatten(0, 1)
    z = run(at)
    curved = hessian(lambda v: F.cross_entropy(v, BOTH[1]), z).reshape(z.numel(), -1)
    return (j.T @ curved @ j).numpy()


DENSE: dict[str, Callable[[nn.Module], np.ndarray]] = {
    "hessian": dense_hessian,
    "gauss_newton": dense_gauss_newton,
    "gap": lambda m: dense_hessian(m) - dense_gauss_newton(m),
}


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("micro", [2, 8])
def test_the_operator_is_the_dense_matrix(kind: str, micro: int) -> None:
    model = network().eval()
    found = curvature.matrix(model, F.cross_entropy, BATCHES, NAMES, kind=kind, micro=micro)
    np.testing.assert_allclose(found @ np.eye(found.shape[0]), DENSE[kind](model), rtol=1e-9, atol=1e-12)


def test_one_recorded_batch_serves_every_product() -> None:
    model = network().eval()
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    found = curvature.matrix(model, F.cross_entropy, [BOTH], NAMES, micro=8)
    dense = found @ np.eye(found.shape[0])
    assert len(runs) == 1
    np.testing.assert_allclose(dense, dense_hessian(model), rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    found = curvature.matrix(model, F.cross_entropy, BATCHES, NAMES)
    _ = found @ np.ones(found.shape[0])
    assert model.training and not model[4].weight.requires_grad and model[0].weight.requires_grad
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("kind", DENSE)
def test_the_top_eigenvalue_is_that_of_the_dense_matrix(kind: str) -> None:
    model = network().eval()
    values = np.linalg.eigvalsh(DENSE[kind](model))
    largest = values[np.abs(values).argmax()]
    found = curvature.top_eigenvalue(curvature.matrix(model, F.cross_entropy, BATCHES, NAMES, kind=kind), tolerance=1e-10)
    np.testing.assert_allclose(found.value, largest, rtol=1e-8)
    assert found.residual < 1e-6


def test_the_top_eigenvalue_may_be_negative_and_an_eigenvalue_lies_within_the_residual() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    values = np.concatenate([[-5.0, 4.0], rng.uniform(-1, 1, 58)])
    found = curvature.top_eigenvalue(aslinearoperator(basis * values @ basis.T), tolerance=1e-2)
    assert abs(found.value + 5) <= found.residual < 0.5


@pytest.mark.parametrize(("diagonal", "value"), [([0.0, 0.0, 0.0], 0.0), ([-3.0], -3.0), ([2.0, 1.0], 2.0)])
def test_the_top_eigenvalue_of_the_smallest_matrices(diagonal: list[float], value: float) -> None:
    assert curvature.top_eigenvalue(aslinearoperator(np.diag(diagonal))).value == pytest.approx(value)


def test_what_has_not_converged_is_refused() -> None:
    close = np.diag(np.linspace(1, 1.001, 400))
    with pytest.raises(ValueError, match="found in 1 restarts; allow more"):
        curvature.top_eigenvalue(aslinearoperator(close), tolerance=1e-14, steps=1)


@pytest.mark.parametrize("call", [curvature.top_eigenvalue, curvature.spectral_density])
def test_what_is_not_finite_is_refused(call: Callable[[object], object]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        call(aslinearoperator(np.diag([1.0, np.inf, 2.0])))


def test_each_start_is_a_gauss_quadrature_of_its_spectral_measure() -> None:
    dense = dense_hessian(network().eval())
    start = np.random.default_rng(3).choice((-1.0, 1.0), len(dense))
    found = curvature.spectral_density(aslinearoperator(dense), starts=1, steps=5, seed=3)
    for power in range(10):  # exact up to degree 2 * 5 - 1
        moment = start @ np.linalg.matrix_power(dense, power) @ start / len(dense)
        np.testing.assert_allclose(found.weights[0] @ found.nodes[0] ** power, moment, rtol=1e-8, atol=1e-12)


def test_all_steps_give_the_spectrum_itself() -> None:
    values = np.array([-1.0, 0.0, 0.5, 2.0, 2.0, 3.0])
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    found = curvature.spectral_density(aslinearoperator(basis * values @ basis.T), starts=400, steps=6)
    for nodes in found.nodes:  # a repeated eigenvalue is one point, and then there is no sixth step
        np.testing.assert_allclose(nodes, [-1, 0, 0.5, 2, 3], atol=1e-8)
    shares = np.mean(found.weights, axis=0)
    np.testing.assert_allclose(shares, np.array([1, 1, 1, 2, 1]) / 6, atol=4 * np.std(found.weights, axis=0).max() / 20)


def test_means_of_functions_of_the_eigenvalues_cover_the_truth() -> None:
    dense = dense_hessian(network().eval())
    truth = np.abs(np.linalg.eigvalsh(dense)).mean()
    scores = []
    for seed in range(60):
        mean, stderr = curvature.spectral_density(aslinearoperator(dense), starts=8, steps=24, seed=seed).mean(np.abs)
        scores.append((mean - truth) / stderr)
    within = np.mean(np.abs(scores) < 2.36)  # 95 % of Student's t with 7 degrees of freedom
    assert abs(np.mean(scores)) < 0.6 and 0.85 <= within <= 1.0


def test_the_widened_density_integrates_to_one_and_sees_the_gap() -> None:
    values = np.concatenate([np.zeros(90), np.full(10, 4.0)])
    found = curvature.spectral_density(aslinearoperator(np.diag(values)), starts=10, steps=8)
    points = np.linspace(-3, 7, 2001)
    density = found.at(points, 0.2)
    step = points[1] - points[0]
    assert density.sum() * step == pytest.approx(1, abs=1e-6)
    assert density[np.abs(points - 4) < 1].sum() * step == pytest.approx(0.1, abs=1e-6)  # a diagonal matrix: no error of the signs
    assert density[np.abs(points - 2) < 0.5].max() < 1e-3


def test_the_seed_alone_decides() -> None:
    found = curvature.matrix(network().eval(), F.cross_entropy, BATCHES, NAMES)
    one, same, other = (curvature.spectral_density(found, starts=2, steps=4, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.nodes, same.nodes)
    assert not np.array_equal(one.nodes, other.nodes)
    assert curvature.top_eigenvalue(found, seed=1) == curvature.top_eigenvalue(found, seed=1)


@pytest.mark.parametrize(
    ("names", "more", "complaint"),
    [
        (["0.weight"], {"kind": "fisher"}, "'fisher' is unknown; choose one of hessian, gauss_newton, gap"),
        (["0.weight", "0.weight"], {}, "named twice"),
        (["9.weight"], {}, "which this model does not have"),
        ([], {}, "nothing was asked"),
    ],
)
def test_what_cannot_be_is_refused(names: list[str], more: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        curvature.matrix(network(), F.cross_entropy, BATCHES, names, **more)


def test_no_batches_and_idle_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no batches"):
        curvature.matrix(network(), F.cross_entropy, [], NAMES)
    model = network()
    model.register_parameter("idle", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match="do not depend on idle"):
        curvature.top_eigenvalue(curvature.matrix(model, F.cross_entropy, BATCHES, ["idle"]))
