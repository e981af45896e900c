"""Scores against their formulas, computed densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from zoo import make

from curvepress.curvature.examples import Sums
from curvepress.objective import Batch
from curvepress.scores import LOSS_UNIT, METHODS, predicted_rise, score
from curvepress.structure import Structure
from curvepress.tracing.watching import trace


def setting(name: str, count: int = 3) -> tuple[nn.Module, Structure, list[Batch]]:
    case = make(name)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64), torch.randint(5, (6,), generator=generator))
        for _ in range(count)
    ]
    return case.model, trace(case.model, *case.example), batches


def relative_trace(model: nn.Module, structure: Structure, batches: list[Batch], group: str) -> np.ndarray:
    """``sum over producers of tr(H_c) / (2 p_c) * |w_c|^2`` from dense Hessians of the mean loss."""
    parameters, total = {n: p.detach() for n, p in model.named_parameters()}, np.zeros(structure[group].size)
    for m in structure[group].producers():
        w = parameters[m.tensor]
        for c, rows in enumerate(m.rows):
            part = w.index_select(m.dim, torch.as_tensor(rows))

            def loss_of(value: torch.Tensor, m=m, rows=rows, w=w) -> torch.Tensor:
                moved = w.index_copy(m.dim, torch.as_tensor(rows), value)
                return sum(F.cross_entropy(functional_call(model, {**parameters, m.tensor: moved}, (x,)), y) for x, y in batches) / len(
                    batches
                )

            block = hessian(loss_of, part).reshape(part.numel(), -1)
            total[c] += float(block.trace() / (2 * part.numel()) * part.square().sum())
    return total


@pytest.mark.parametrize(("name", "group"), [("resnet", "stem.0"), ("mobilenet", "expand.0"), ("inception", "a")])
def test_the_relative_trace_covers_the_dense_one_within_its_error_bars(name: str, group: str) -> None:
    model, structure, batches = setting(name, 2)
    exact, how = relative_trace(model, structure, batches, group), {"method": "hessian_trace", "estimator": "hessian"}
    draws = [score(model, F.cross_entropy, batches, structure, samples=2, probes=5, seed=seed, **how).values[group] for seed in range(40)]
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1) / np.sqrt(len(draws))
    dead = error == 0
    assert np.allclose(mean[dead], exact[dead]) and not dead.all()
    deviation = (mean - exact)[~dead] / error[~dead]
    assert np.abs(deviation).max() < 4.5
    assert np.sqrt(np.mean(np.square(deviation))) < 2


def test_under_unit_curvature_the_relative_trace_is_half_the_squared_norm_of_what_makes_the_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, structure, batches = setting("resnet")
    weights = dict(model.named_parameters())

    def sums(view: object, *_: object, **__: object) -> object:
        return Sums({n: torch.ones(p.shape, dtype=torch.float64) for n, p in view.parameters.items()})

    monkeypatch.setattr("curvepress.curvature.gauss_newton.squares", sums)
    values = score(model, F.cross_entropy, batches, structure, samples=2, method="hessian_trace").values["stem.0"]
    made = [weights[n].detach().square().flatten(1).sum(1).numpy() for n in ("stem.0.weight", "blocks.0.conv2.0.weight")]
    np.testing.assert_allclose(values, sum(made) / 2)


def test_magnitude_is_the_relative_group_norm() -> None:
    model, structure, batches = setting("vgg")
    values = score(model, F.cross_entropy, batches, structure, method="magnitude").values["features.0"]
    f = dict(model.named_parameters())
    squares = sum(
        f[n].square().flatten(1).sum(1) if f[n].ndim > 1 else f[n].square()
        for n in ("features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias")
    )
    squares = squares + f["features.4.weight"].square().sum((0, 2, 3))
    norms = squares.sqrt().detach().numpy()
    np.testing.assert_allclose(values, norms / norms.mean())


def test_taylor_is_the_mean_of_absolute_first_order_changes() -> None:
    model, structure, batches = setting("vgg")
    scores = score(model, F.cross_entropy, batches, structure, method="taylor", samples=3)
    rows = []
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        weight = model.features[0].weight
        rows.append((weight.grad * weight).flatten(1).sum(1).abs().detach().numpy())
    np.testing.assert_allclose(scores.values["features.0"], np.mean(rows, axis=0))
    np.testing.assert_allclose(scores.stderr["features.0"], np.std(rows, axis=0, ddof=1) / np.sqrt(3))
    assert scores.unit == LOSS_UNIT and scores.samples == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_scores_and_the_model_stays_as_it_is(method: str) -> None:
    model, structure, batches = setting("mobilenet")
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    first, second = (score(model, F.cross_entropy, batches, structure, method=method, samples=2, seed=3) for _ in range(2))
    assert first == second
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", ["hessian_trace", "random"])
def test_another_seed_gives_other_scores(method: str) -> None:
    model, structure, batches = setting("vgg")
    assert score(model, F.cross_entropy, batches, structure, method=method, seed=0) != score(
        model, F.cross_entropy, batches, structure, method=method, seed=1
    )


def test_samples_done_before_are_not_computed_again_and_change_nothing() -> None:
    model, structure, batches = setting("vgg", 4)
    whole = score(model, F.cross_entropy, batches, structure, samples=4, seed=5)
    done: dict[int, dict[str, np.ndarray]] = {}
    with pytest.raises(ValueError, match="is nan"):
        score(
            model, F.cross_entropy, [*batches[:2], (batches[2][0] * float("nan"), batches[2][1])], structure, samples=4, seed=5, done=done
        )
    assert list(done) == [0, 1]
    spoiled = (batches[1][0] * float("nan"), batches[1][1])
    assert score(model, F.cross_entropy, [batches[0], spoiled, *batches[2:]], structure, samples=4, seed=5, done=done) == whole


def test_predictions_add_up() -> None:
    model, structure, batches = setting("vgg")
    scores = score(model, F.cross_entropy, batches, structure, method="taylor")
    gone = {"features.0": np.array([0, 2]), "features.4": np.array([1])}
    rise, error = predicted_rise(scores, gone)
    assert rise == pytest.approx(scores.values["features.0"][[0, 2]].sum() + scores.values["features.4"][1])
    assert error == pytest.approx(np.sqrt(np.square(scores.stderr["features.0"][[0, 2]]).sum() + scores.stderr["features.4"][1] ** 2))


def test_what_cannot_be_scored_is_refused() -> None:
    model, structure, batches = setting("vgg")
    with pytest.raises(ValueError, match="unknown; choose one of mask_curvature"):
        score(model, F.cross_entropy, batches, structure, method="hessian")
    with pytest.raises(ValueError, match="at least 2 calibration batches.*got 1"):
        score(model, F.cross_entropy, batches[:1], structure)
    with pytest.raises(ValueError, match="must be a scalar"):
        score(model, lambda o, t: F.cross_entropy(o, t, reduction="none"), batches, structure)
    with pytest.raises(ValueError, match="labels fit the outputs"):
        score(model, F.cross_entropy, [(x, y + 5) for x, y in batches], structure)
    with pytest.raises(ValueError, match="is nan"):
        score(model, F.cross_entropy, [(x * float("nan"), y) for x, y in batches], structure)
    linear = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="nothing in this model can be cut: .*model output"):
        score(linear, F.cross_entropy, batches, trace(linear, torch.randn(2, 3)))


@pytest.mark.parametrize(("name", "group"), [("resnet", "stem.0"), ("mobilenet", "expand.0"), ("inception", "a")])
def test_the_mask_curvature_is_that_of_the_loss_when_the_readers_of_a_channel_are_scaled_together(name: str, group: str) -> None:
    model, structure, batches = setting(name, 2)
    own = {n: p.detach() for n, p in model.named_parameters()}
    readers = [m for m in structure[group].members if m.role == "in"]
    assert readers
    exact = np.zeros(structure[group].size)
    for x, y in batches:
        z = model(x).detach()
        outer = hessian(lambda v, y=y: F.cross_entropy(v, y), z).reshape(z.numel(), -1)

        def scaled(mask: torch.Tensor, x=x) -> torch.Tensor:
            moved = dict(own)
            for m in readers:
                factor = torch.ones(own[m.tensor].shape[m.dim], dtype=torch.float64)
                for c, rows in enumerate(m.rows):
                    factor = factor.index_put((torch.as_tensor(rows),), mask[c].expand(len(rows)))
                moved[m.tensor] = moved[m.tensor] * factor.reshape([-1 if d == m.dim else 1 for d in range(own[m.tensor].ndim)])
            return functional_call(model, moved, (x,)).flatten()

        slopes = torch.autograd.functional.jacobian(scaled, torch.ones(structure[group].size, dtype=torch.float64))
        exact += (slopes.T @ outer @ slopes).diagonal().numpy() / 2 / len(batches)
    found = score(model, F.cross_entropy, batches, structure, samples=2, method="mask_curvature", estimator="exact", temperature=1.0)
    np.testing.assert_allclose(found.values[group], exact, rtol=1e-9, atol=1e-15)
