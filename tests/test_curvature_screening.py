"""First passes that only decide what is drawn: as wrong as they may be, the estimate is not; and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from curvature_zoo import CASES, images, made
from sharded_curvature import Twice
from test_curvature_losses import LOSSES
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import gauss_newton, screening
from curvepress.curvature.outputs import output_curvature
from curvepress.curvature.recording import View
from curvepress.curvature.trees import leaves, mapped, rows


def moved(tree: Any, by: float) -> Any:
    """Outputs that are off, each example otherwise."""
    noise = torch.Generator().manual_seed(1)
    return mapped(lambda t: t + by * torch.randn(t.shape, generator=noise).to(t) if t.is_floating_point() else t, tree)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_terms_at_other_outputs_are_those_found_there(name: str, temperature: float) -> None:
    network, (x, y), loss, _ = LOSSES[name]
    here = network()(x)
    there = moved(here, 0.5)
    try:
        first, want = (output_curvature(loss, z, y, temperature) for z in (here, there))
    except ValueError as error:
        assert "no temperature" in str(error)
        return
    if not first.follows:
        return
    n = torch.tensor([3, 0, 3])
    found = first.at(n, leaves(rows(there, n)))
    torch.testing.assert_close(found.mass, want.mass[n])
    k = torch.tensor([0, 1, 1])
    for leaf, u in found.rows(torch.arange(3), k).items():
        other = want.rows(n, k)[leaf].flatten(1)
        torch.testing.assert_close(u.flatten(1)[:, :, None] * u.flatten(1)[:, None], other[:, :, None] * other[:, None])


def test_the_usual_losses_are_known_elsewhere() -> None:
    follows = {form for network, (x, y), loss, form in LOSSES.values() if output_curvature(loss, network()(x), y).follows}
    assert "softmax cross-entropy" in follows and "dense" not in follows


def smooth() -> nn.Module:
    model = made(CASES["gelu"])
    model[2].weight.data *= 4
    return model


def squared() -> nn.Module:
    """Parameters that are read one example at a time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Twice(5, 3, bias=False)).double()


@pytest.mark.parametrize("network", [smooth, squared])
def test_a_first_pass_that_is_wrong_brings_no_bias(network: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = network(), images(4, count=6)
    asked = {n: curvature.elements(n, p) for n, p in model.named_parameters()}
    want = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="exact").mean
    own = gauss_newton.pooled
    monkeypatch.setattr(gauss_newton, "pooled", lambda *a: moved(own(*a), 0.5))
    found = curvature.estimate(model, F.cross_entropy, [batch] * 150, asked, estimator="pairs", rate=1.0, seed=2, micro=3)
    whole = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator="pairs", rate=1e9, micro=3).mean
    for name, values in want.items():
        assert (np.abs(found.mean[name] - values) <= 4.5 * found.stderr[name] + 1e-9).all(), name
        np.testing.assert_allclose(whole[name], values, rtol=1e-9, atol=1e-15)


class Network(nn.Module):
    """Normalisation behind convolutions and not, and a convolution that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.two = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4, affine=False)
        self.third, self.three = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)
        for norm in (self.one, self.two, self.three, self.last):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
        self.shared = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.first(x)))
        x = F.relu(self.two(self.second(x))) + x
        made = self.third(x)
        x = self.three(made) + (made if self.shared else 0)
        return self.head(self.last(x.mean((2, 3))))


def network(shared: bool) -> Network:
    torch.manual_seed(0)
    model = Network().eval()
    model.shared = shared
    return model


X = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(8) % 3


@pytest.mark.parametrize("shared", [False, True])
def test_normalisation_is_folded_where_that_computes_the_same(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "native", lambda device: False)
    model = network(shared)
    modules, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    view = View(model, {}, {})
    found = screening.screen(view, X[:3])
    assert found.half is None
    assert set(found.stand_ins) == (set() if shared else {"first", "one", "second", "two", "third", "three"})
    with found.put(view) as quick:
        assert (type(model.three) is nn.Identity) is not shared
        torch.testing.assert_close(quick.run(X), model(X))
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == list(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(found.stand_ins["one"](X), X) if not shared else None


def test_a_first_pass_in_half_precision_decides_what_is_drawn_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "native", lambda device: True)
    model, run = network(False), View.run
    halves: list[torch.dtype | None] = []
    monkeypatch.setattr(View, "run", lambda self, inputs: halves.append(self.half) or run(self, inputs))
    asked = {"first.weight": curvature.elements("first.weight", model.first.weight)}
    exact = curvature.estimate(model, F.cross_entropy, [(X, Y)], asked, estimator="exact")
    assert set(halves) == {None}
    pairs = curvature.estimate(model, F.cross_entropy, [(X, Y)], asked, estimator="pairs", rate=1e9)
    assert set(halves) == {None, torch.bfloat16}
    np.testing.assert_allclose(pairs.mean["first.weight"], exact.mean["first.weight"], rtol=1e-5)
    assert pairs.notes == (*exact.notes, "pairs are drawn by a first pass in bfloat16, which brings no bias")
    halves.clear()
    double = curvature.estimate(model.double(), F.cross_entropy, [(X.double(), Y)], asked, estimator="pairs")
    assert set(halves) == {None} and double.notes == exact.notes


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.PoissonNLLLoss()])
def test_first_passes_that_cannot_serve_are_made_again_in_full(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because they overflow, or because this loss tells nothing about its curvature elsewhere."""
    monkeypatch.setattr(screening, "native", lambda device: True)
    model, targets = network(False), Y if loss is F.cross_entropy else torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    asked = {"w": curvature.elements("first.weight", model.first.weight)}
    own = gauss_newton.pooled

    def pooled(view: View, inputs: Any, micro: int) -> Any:
        made = own(view, inputs, micro)
        return made if view.half is None else made / 0 if loss is F.cross_entropy else moved(made, 1.0)

    wanted = curvature.estimate(model, loss, [(X, targets)], asked, estimator="exact").mean["w"]
    monkeypatch.setattr(gauss_newton, "pooled", pooled)
    found = curvature.estimate(model, loss, [(X, targets)] * 2, asked, estimator="pairs", rate=1e9)
    np.testing.assert_allclose(found.mean["w"], wanted, rtol=1e-4, atol=1e-12)


def test_what_auto_does_not_draw_is_taken_from_full_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "native", lambda device: True)
    model = network(False)
    asked = {"w": curvature.elements("first.weight", model.first.weight)}
    found = [curvature.estimate(model, F.cross_entropy, [(X, Y)], asked, estimator=e) for e in ("auto", "sketch")]
    assert found[0].estimator == "sketch" and (found[0].mean["w"] == found[1].mean["w"]).all() and found[0].notes == found[1].notes
