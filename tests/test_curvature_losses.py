"""The output curvature of every known form of loss, against the dense Hessian of the loss, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from curvature_zoo import Answer, Flat, Flow, images
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature.outputs import output_curvature
from curvepress.objective import Batch, Loss


def network(*last: nn.Module, width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, width), *last).double()


X = images(4)[0]
CLASSES = torch.tensor([0, 1, 2, 1, 0])
SOFT = torch.softmax(images(3, seed=1)[0], -1)
POSITIONS = images(6, 4, seed=2)[0]
WORDS = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 0, 0, 0], [1, 1, -100, -100, -100, -100], [0, 2, 0, -100, 1, 1], [2] * 6])
FIELD = (X, torch.tensor([[[0, 1], [2, -100]], [[1, 1], [0, 0]], [[2, 2], [1, 0]], [[-100] * 2] * 2, [[0, 2], [1, 1]]]))


def segmented() -> nn.Module:
    return network(nn.Unflatten(1, (3, 2, 2)), width=12)


def words_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def ranked(z: Tensor, y: Tensor) -> Tensor:
    """Convex, coupled within an example, of no known form."""
    return (
        torch.logsumexp(torch.stack([z[:, 0] - z[:, 1], 2 * z[:, 1] - z[:, 2], z[:, 2]]), 0).mean() + 0.1 * (z.sum(1) - y).square().mean()
    )


def two(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out.logits, y) + F.mse_loss(out.hidden[0], SOFT)


def two_headed() -> nn.Module:
    torch.manual_seed(0)
    return Flow(lambda m, x: Answer(m.a(x), (m.b(F.relu(x)), x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3)).double()


LOSSES: dict[str, tuple[Callable[[], nn.Module], Batch, Loss, str]] = {
    "mean": (network, (X, CLASSES), F.cross_entropy, "softmax cross-entropy"),
    "sum": (network, (X, CLASSES), nn.CrossEntropyLoss(reduction="sum"), "softmax cross-entropy"),
    "smoothing": (network, (X, CLASSES), nn.CrossEntropyLoss(label_smoothing=0.2), "softmax cross-entropy"),
    "ignore": (network, (X, torch.tensor([0, 1, -100, 1, -100])), F.cross_entropy, "softmax cross-entropy"),
    "weights": (
        network,
        (X, CLASSES),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)),
        "softmax cross-entropy",
    ),
    "weights_smoothing": (
        network,
        (X, CLASSES),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64), label_smoothing=0.1),
        "softmax cross-entropy",
    ),
    "soft": (network, (X, SOFT), F.cross_entropy, "softmax cross-entropy"),
    "distillation": (network, (X, SOFT), lambda z, y: F.kl_div(F.log_softmax(z, -1), y, reduction="batchmean"), "softmax cross-entropy"),
    "segmentation": (segmented, FIELD, F.cross_entropy, "softmax cross-entropy"),
    "words": (network, (POSITIONS, WORDS), words_loss, "softmax cross-entropy"),
    "squared": (network, (X, SOFT), F.mse_loss, "separate outputs"),
    "squared_vector": (lambda: network(nn.Flatten(0), width=1), (X, SOFT[:, 0]), F.mse_loss, "separate outputs"),
    "binary": (network, (X, SOFT.round()), F.binary_cross_entropy_with_logits, "separate outputs"),
    "binary_weighted": (
        network,
        (X, SOFT),
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)),
        "separate outputs",
    ),
    "huber": (network, (X, 3 * SOFT), nn.HuberLoss(delta=1.0), "separate outputs"),
    "poisson": (network, (X, SOFT.round()), nn.PoissonNLLLoss(), "separate outputs"),
    "dense": (network, (X, CLASSES.double()), ranked, "dense"),
    "two": (two_headed, (X, CLASSES), two, "softmax cross-entropy and separate outputs"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_form_is_recognised_and_gives_the_dense_matrix(name: str) -> None:
    make, batch, loss, form = LOSSES[name]
    model = make()
    flat = Flat(model, batch, loss)
    want = flat.split(np.diag(flat.gauss_newton()))
    asked = {n: curvature.elements(n, p) for n, p in model.named_parameters()}
    for micro in (2, 8):
        found = curvature.estimate(model, loss, [batch], asked, estimator="exact", micro=micro)
        assert found.notes == (f"the loss is {form}",)
        for tensor, values in want.items():
            np.testing.assert_allclose(found.mean[tensor], values, rtol=1e-8, atol=1e-12, err_msg=tensor)


def dense(model: nn.Module, batch: Batch, loss: Loss, temperature: float = 1.0) -> np.ndarray:
    """The output curvature as the terms have it: ``[outputs of all examples] squared``."""
    with torch.no_grad():
        out = model(batch[0])
    found = output_curvature(loss, out, batch[1], temperature)
    n, k = (i.flatten() for i in torch.meshgrid(*(torch.arange(s) for s in found.mass.shape), indexing="ij"))
    terms = torch.cat([r.reshape(len(r), -1) for r in found.rows(n, k).values()], 1)
    sizes = terms.square().sum(1)
    torch.testing.assert_close(sizes, found.mass.flatten(), rtol=1e-8, atol=1e-12)
    blocks = torch.zeros(len(found.mass), terms.shape[1], terms.shape[1], dtype=torch.float64)
    blocks.index_add_(0, n, terms[:, :, None] * terms[:, None])
    return blocks.numpy()


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "two"])
def test_the_terms_of_an_example_add_up_to_its_block(name: str) -> None:
    make, batch, loss, _ = LOSSES[name]
    model = make()
    whole = Flat(model, batch, loss).outer().numpy().reshape(5, -1, 5, dense(model, batch, loss).shape[-1])
    found = dense(model, batch, loss)
    for n in range(5):
        for m in range(5):
            np.testing.assert_allclose(found[n] if n == m else 0 * found[n], whole[n, :, m], rtol=1e-8, atol=1e-10)


def test_many_classes_have_one_term_a_class() -> None:
    model, batch = network(width=70), (X, CLASSES)
    whole = Flat(model, batch).outer().numpy().reshape(5, 70, 5, 70)
    found = dense(model, batch, F.cross_entropy)
    for n in range(5):
        np.testing.assert_allclose(found[n], whole[n, :, n], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_temperature_softens_the_probabilities_and_nothing_else(temperature: float) -> None:
    model = network()
    z = model(X).detach()
    p = torch.softmax(z / temperature, -1)
    want = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / 5
    np.testing.assert_allclose(dense(model, (X, CLASSES), F.cross_entropy, temperature), want, rtol=1e-8, atol=1e-12)
    q, y = torch.sigmoid(z / temperature), SOFT.round()
    want = torch.diag_embed(q * (1 - q)) / 15
    np.testing.assert_allclose(dense(model, (X, y), F.binary_cross_entropy_with_logits, temperature), want, rtol=1e-8, atol=1e-12)


def crossed(out: Any, y: Tensor) -> Tensor:
    return 1e-6 * ((out.logits * out.hidden[0]).mean() + out.logits.square().mean())


REFUSED: dict[str, tuple[Callable[[], nn.Module], Batch, Loss, str]] = {
    "linear": (lambda: network(nn.LogSoftmax(-1)), (X, CLASSES), F.nll_loss, "no curvature .*logits, not log-probabilities.*'hessian'"),
    "examples": (
        network,
        (X, CLASSES),
        lambda z, y: (z @ z.T).square().mean(),
        "couples the outputs of shape \\(5, 3\\).* 'hessian', which takes any",
    ),
    "large": (
        lambda: network(width=300),
        (X, CLASSES),
        lambda z, y: z.square().sum(1).square().mean(),
        "couples .* at most 256 outputs an example",
    ),
    "concave": (network, (X, CLASSES), lambda z, y: -z.square().mean(), "not convex in the model's outputs.* use 'hessian'"),
    "saddle": (network, (X, CLASSES), lambda z, y: (z[:, 0] * z[:, 1]).mean(), "not convex"),
    "crossed": (two_headed, (X, CLASSES), crossed, "multiplies two of the model's outputs with each other.* 'hessian'"),
    "vector": (network, (X, CLASSES), lambda z, y: z.square(), "the loss must be a scalar tensor"),
    "labels": (network, (X, CLASSES + 1), F.cross_entropy, "the loss failed .* do the labels fit the outputs"),
    "detached": (network, (X, CLASSES), lambda z, y: z.detach().square().mean(), "does not depend on the model's outputs"),
    "infinite": (network, (X, CLASSES), lambda z, y: z.square().mean() / 0, "the loss of a batch is inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_does_not_fit_is_refused_with_a_way_out(name: str) -> None:
    make, batch, loss, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        curvature.estimate(model, loss, [batch], {"all": curvature.layer(next(n for n, _ in model.named_parameters()))}, estimator="exact")


@pytest.mark.parametrize("name", ["linear", "examples", "large", "concave", "saddle"])
def test_the_way_out_works(name: str) -> None:
    make, batch, loss, _ = REFUSED[name]
    model = make()
    flat = Flat(model, batch, loss, ["0.bias"])
    found = curvature.estimate(model, loss, [batch], {"b": curvature.layer("0.bias")}, estimator="hessian", probes=200, micro=5)
    want = flat.hessian()
    spread = np.sqrt(2 * (np.square(want).sum() - np.square(np.diag(want)).sum()) / 200)
    assert abs(found.mean["b"][0] - np.trace(want)) <= 4 * spread + 1e-12


@pytest.mark.parametrize("name", ["squared", "dense"])
def test_a_loss_without_probabilities_has_no_temperature(name: str) -> None:
    make, batch, loss, _ = LOSSES[name]
    model = make()
    with pytest.raises(ValueError, match="has no temperature, got 2.0; leave it at 1"):
        curvature.estimate(model, loss, [batch], {"all": curvature.layer("0.weight")}, estimator="exact", temperature=2.0)
    with pytest.raises(ValueError, match="the temperature must be positive, got 0"):
        curvature.estimate(model, loss, [batch], {"all": curvature.layer("0.weight")}, estimator="exact", temperature=0)


def test_labels_cannot_be_drawn_without_a_distribution() -> None:
    make, batch, loss, _ = LOSSES["dense"]
    with pytest.raises(ValueError, match="labels cannot be drawn for a loss of the form 'dense'"):
        curvature.estimate(make(), loss, [batch], {"all": curvature.layer("0.weight")}, estimator="monte_carlo_fisher")


def test_pieces_of_a_loss_that_couples_examples_are_refused() -> None:
    make, batch, loss, _ = REFUSED["examples"]
    with pytest.raises(ValueError, match="couples the examples of a batch, so pieces of 2 do not add up; set micro to the batch size"):
        curvature.estimate(make(), loss, [batch], {"all": curvature.layer("0.weight")}, estimator="hessian", micro=2)
