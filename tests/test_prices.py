"""Prices after repair, elementwise, with slopes, measured and joint, against dense float64 truth."""

from __future__ import annotations

import sys
from itertools import islice

import numpy as np
import pytest
import torch
from test_scores import setting
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn import functional as F
from zoo import make

from curvepress import curvature
from curvepress.objective import Batch
from curvepress.plan import Plan
from curvepress.scores import joint_rise, part_of, score
from curvepress.scores.elimination import Reader, damped, elimination_order, elimination_prices
from curvepress.scores.grams import Gram, add_grams
from curvepress.structure import Member
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace


def residual(x: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor, gone: torch.Tensor) -> float:
    """The weighted mean squared error of the outputs of ``weight`` refitted without the inputs ``gone``, by least squares."""
    keep = torch.ones(x.shape[1], dtype=torch.bool)
    keep[gone] = False
    wanted = x @ weight.T
    left = wanted - x[:, keep] @ torch.linalg.lstsq(x[:, keep], wanted, driver="gelsd").solution if keep.any() else wanted
    return float((left.square() * importance).sum() / len(x))


def planted(seed: int, shared: bool = False) -> tuple[list[torch.Tensor], list[Reader]]:
    """Two readers of five channels: one reads two inputs of each and two of no channel, one reads each once."""
    chance = torch.Generator().manual_seed(seed)
    found, readers = [], []
    for outputs, per, extra in ((3, 2, 2), (4, 1, 0)):
        inputs = 5 * per + extra
        x = torch.randn(60, inputs, generator=chance, dtype=torch.float64)
        x = x @ torch.randn(inputs, inputs, generator=chance, dtype=torch.float64)
        blocks = torch.randperm(inputs, generator=chance)[: 5 * per].reshape(5, per)
        weight = torch.randn(outputs, inputs, generator=chance, dtype=torch.float64)
        readers.append(Reader(weight, x.T @ x / len(x), torch.rand(outputs, generator=chance, dtype=torch.float64), blocks))
        found.append(x)
    return found, readers


@pytest.mark.parametrize("seed", range(4))
def test_elimination_is_greedy_least_squares_from_scratch(seed: int) -> None:
    inputs, readers = planted(seed)

    def left(gone: list[int]) -> float:
        return sum(residual(x, r.weight, r.importance, r.blocks[gone].flatten()) for x, r in zip(inputs, readers, strict=True))

    gone: list[int] = []
    added = np.zeros(5)
    while len(gone) < 5:
        costs = {c: left([*gone, c]) for c in range(5) if c not in gone}
        best = min(costs, key=lambda c: costs[c])
        added[best] = costs[best] - (left(gone) if gone else 0.0)
        gone.append(best)
    order = elimination_order(readers)
    assert order.tolist() == gone
    np.testing.assert_allclose(elimination_prices(readers, order).numpy(), added, rtol=1e-8)


def test_several_channels_at_once_go_in_the_order_of_their_prices() -> None:
    _, readers = planted(1)
    first = elimination_order(readers, 5)
    assert sorted(first.tolist()) == list(range(5)) and first[0] == elimination_order(readers)[0]


def unfolded(model: nn.Module, name: str, batches: list[Batch]) -> torch.Tensor:
    """What the module's weight is multiplied with, ``[examples, positions, inputs]``."""
    rows: list[torch.Tensor] = []
    module = model.get_submodule(name)

    def keep(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0]
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
        rows.append(x.detach().reshape(len(x), -1, x.shape[-1]))

    handle = module.register_forward_pre_hook(keep)
    for x, _ in batches:
        model(x)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("name", "layer", "constant"), [("vgg", "features.4", True), ("vgg", "classifier.0", True), ("resnet", "stem.0", True)]
)
def test_gram_matrices_are_those_of_the_inputs(name: str, layer: str, constant: bool) -> None:
    model, _, batches = setting(name)
    grams: dict[str, Gram] = {}
    for batch in batches:
        add_grams(model, batch, [f"{layer}.weight"], grams)
    x = unfolded(model, layer, batches)
    flat, gram = x.flatten(0, 1), grams[f"{layer}.weight"]
    assert (gram.count, gram.examples, gram.constant) == (len(flat), len(x), constant)
    centred = flat - flat.mean(0)
    np.testing.assert_allclose(gram.second_moment(), (centred.T @ centred / len(x)).numpy(), atol=1e-10)


def test_the_spread_about_a_large_mean_survives_single_precision() -> None:
    """Fewer examples than inputs, so that the moment has zeros among its eigenvalues, which rounding must not make negative."""
    x, found = 100 + torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), dict[str, Gram]()
    add_grams(nn.Sequential(nn.Linear(40, 3)), (x, None), ["0.weight"], found)
    centred = x.double() - x.double().mean(0)
    np.testing.assert_allclose(found["0.weight"].second_moment(), (centred.T @ centred / 8).numpy(), atol=1e-9)


def test_moments_of_inputs_far_from_zero_can_be_factored_with_fewer_examples_than_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Linear(400, 3)), 50 + torch.randn(12, 400, generator=generator)
    seen: dict[str, Gram] = {}
    add_grams(model, (x, torch.zeros(12)), ["0.weight"], seen)
    moment = seen["0.weight"].second_moment()
    torch.testing.assert_close(moment, torch.cov(x.double().T, correction=0), rtol=1e-6, atol=1e-9)
    torch.linalg.cholesky(damped(moment, 1e-4))


def test_some_positions_stand_for_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)).double()
    x = torch.randn(400, 2, 6, 6, dtype=torch.float64)
    exact: dict[str, Gram] = {}
    few: dict[str, Gram] = {}
    add_grams(model, (x, None), ["0.weight"], exact)
    for seed in range(30):
        add_grams(model, (x, None), ["0.weight"], few, positions=9, seed=seed)
    assert few["0.weight"].count == 30 * exact["0.weight"].count and not exact["0.weight"].constant
    moments = [g["0.weight"].second_moment() for g in (few, exact)]
    assert (moments[0] - moments[1]).abs().max() < 0.1 * moments[1].abs().max()


def before_and_after(model: nn.Module, batches: list[Batch], member: Member) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of a reader without each channel alone, weighted by the curvature of its outputs: as it is, and refitted."""
    layer = member.tensor.removesuffix(".weight")
    module = model.get_submodule(layer)
    x, weight = unfolded(model, layer, batches).flatten(0, 1), module.weight.detach().flatten(1)
    dim = 1 if isinstance(module, nn.Conv2d) else -1
    found = curvature.estimate(model, F.cross_entropy, batches, {"z": curvature.Activation(layer, dim)}, estimator="exact")
    importance, per = torch.as_tensor(found.mean["z"]), module.weight[0, 0].numel()
    blocks = (torch.as_tensor(member.rows)[:, :, None] * per + torch.arange(per)).flatten(1)
    before = [float(((x[:, b] @ weight[:, b].T).square() * importance).sum() / len(x)) for b in blocks]
    return np.array(before), np.array([residual(x - x.mean(0), weight, importance, b) for b in blocks])


def big(name: str, count: int = 4) -> tuple[nn.Module, list[Batch]]:
    case = make(name)
    chance = torch.Generator().manual_seed(3)
    return case.model, [
        (torch.randn(40, 3, 8, 8, generator=chance, dtype=torch.float64), torch.randint(5, (40,), generator=chance)) for _ in range(count)
    ]


@pytest.mark.parametrize(("name", "group"), [("vgg", "features.0"), ("vgg", "features.4"), ("resnet", "stem.0")])
def test_the_first_to_go_costs_the_share_of_its_price_that_least_squares_leaves(
    name: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["curvepress.scores.reconstruction"], "RIDGE", 1e-11)  # the package has a function of that name
    model, batches = big(name)
    structure = trace(model, batches[0][0][:2])
    found, removed = (
        score(model, F.cross_entropy, batches, structure, method=m, estimator="exact") for m in ("reconstruction", "mask_curvature")
    )
    before = after = np.zeros(structure[group].size)
    for m in (m for m in structure[group].members if m.role == "in"):
        labels = part_of(m, model.get_parameter(m.tensor))
        own = curvature.estimate(
            model, F.cross_entropy, batches, {"d": curvature.Direction((labels,), structure[group].size)}, estimator="exact"
        ).mean["d"]
        lost, left = before_and_after(model, batches, m)
        scale = own.sum() / lost.sum()
        before, after = before + scale * lost, after + scale * left
    alive = before > 0
    single = np.where(alive, removed.values[group] * after / np.where(alive, before, 1), 0)
    assert found.values[group].argmin() == single.argmin()
    assert found.values[group].min() == pytest.approx(single.min(), rel=1e-6)
    assert (found.values[group] >= 0.99 * single).all()  # less help is left to those that go later
    assert (found.stderr[group][alive] > 0).all() and found.samples == 4


def test_a_channel_that_is_a_combination_of_others_is_free() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).double()
    with torch.no_grad():
        for t in (model[0].weight, model[0].bias):
            t[3] = 2 * t[0] - t[4]
    batches = [(torch.randn(64, 6, dtype=torch.float64), torch.randint(4, (64,))) for _ in range(4)]
    structure = trace(model, batches[0][0][:2])
    prices = score(model, F.cross_entropy, batches, structure, method="reconstruction").values["0"]
    before = score(model, F.cross_entropy, batches, structure, method="mask_curvature").values["0"]
    assert (prices < 1e-3 * before.min()).sum() == 1 and prices.argmin() in (0, 3, 4)


def test_groups_that_cannot_be_refitted_have_their_price_before_repair() -> None:
    case = make("mobilenet")
    model, batches = big("mobilenet")
    structure = trace(model, *case.example)
    refitted = score(model, F.cross_entropy, batches, structure, method="reconstruction", estimator="exact")
    assert "before repair" not in refitted.detail
    shared = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2), nn.ReLU(), nn.Conv2d(6, 5, 9)).double()
    flat = nn.Sequential(*shared, nn.Flatten())
    structure = trace(flat, batches[0][0][:2])
    found = score(flat, F.cross_entropy, batches, structure, method="reconstruction", estimator="exact", samples=3)
    plain = score(flat, F.cross_entropy, batches, structure, method="mask_curvature", estimator="exact", samples=3)
    assert "before repair: 0" in found.detail
    np.testing.assert_allclose(found.values["0"], plain.values["0"])
    assert not np.allclose(found.values["2"], plain.values["2"])


def displaced(model: nn.Module, tensors: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    own = {n: p.detach() for n, p in model.named_parameters()}
    return own, torch.cat([own[n].flatten() for n in tensors])


def dense(model: nn.Module, batches: list[Batch], tensors: list[str]) -> torch.Tensor:
    """The Gauss-Newton matrix of these tensors, mean over batches."""
    own, flat = displaced(model, tensors)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for x, y in batches:
        z = model(x).detach()
        outer = hessian(lambda v, y=y: F.cross_entropy(v, y), z).reshape(z.numel(), -1)

        def run(values: torch.Tensor, x=x) -> torch.Tensor:
            parts = dict(zip(tensors, values.split([own[n].numel() for n in tensors]), strict=True))
            return functional_call(model, {**own, **{n: v.view_as(own[n]) for n, v in parts.items()}}, (x,)).flatten()

        slopes = torch.autograd.functional.jacobian(run, flat)
        total += slopes.T @ outer @ slopes / len(batches)
    return total


def test_the_joint_rise_is_the_quadratic_form_of_the_whole_displacement() -> None:
    model, structure, batches = setting("vgg", 2)
    plan = Plan(structure, {"features.0": (0, 2, 5), "classifier.0": tuple(range(7))})
    tensors = ["features.4.weight", "classifier.3.weight"]
    own, _ = displaced(model, tensors)
    moved = {n: torch.zeros_like(own[n]) for n in tensors}
    moved["features.4.weight"][:, [1, 3, 4]] = -own["features.4.weight"][:, [1, 3, 4]]
    moved["classifier.3.weight"][:, 7:] = -own["classifier.3.weight"][:, 7:]
    d = torch.cat([moved[n].flatten() for n in tensors])
    exact = float(d @ dense(model, batches, tensors) @ d) / 2
    rise, error = joint_rise(model, F.cross_entropy, batches, plan, estimator="exact")
    assert rise == pytest.approx(exact, rel=1e-9) and error > 0
    again, _ = joint_rise(model, F.cross_entropy, batches, plan, moves=moved, estimator="exact")
    assert again == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match="removes nothing"):
        joint_rise(model, F.cross_entropy, batches, Plan(structure))
    with pytest.raises(ValueError, match="at least 2 batches"):
        joint_rise(model, F.cross_entropy, batches[:1], plan)


def test_the_diagonal_is_that_of_the_dense_matrix() -> None:
    model, structure, batches = setting("vgg", 2)
    found = score(model, F.cross_entropy, batches, structure, method="diagonal", estimator="exact", samples=2)
    weight = model.features[4].weight.detach()
    terms = dense(model, batches, ["features.4.weight"]).diagonal().view_as(weight) * weight.square() / 2
    np.testing.assert_allclose(found.values["features.0"], terms.sum((0, 2, 3)).numpy(), rtol=1e-9)


def test_the_second_order_price_follows_the_loss_away_from_a_minimum() -> None:
    model, structure, batches = setting("vgg", 3)
    how = {"estimator": "exact", "samples": 3}
    found, curved = (score(model, F.cross_entropy, batches, structure, method=m, **how) for m in ("second_order", "mask_curvature"))
    own = {n: p.detach() for n, p in model.named_parameters()}
    weight = own["features.4.weight"].clone().requires_grad_()
    total = sum(F.cross_entropy(functional_call(model, {**own, "features.4.weight": weight}, (x,)), y) for x, y in batches) / 3
    (slope,) = torch.autograd.grad(total, weight)
    expected = -(slope * weight).sum((0, 2, 3)).detach().numpy() + curved.values["features.0"]
    np.testing.assert_allclose(found.values["features.0"], expected, rtol=1e-9)
    assert (found.stderr["features.0"] >= curved.stderr["features.0"]).all() and found.method == "second_order"


@pytest.mark.parametrize(("name", "group"), [("resnet_padded", "stem.0"), ("vgg", "features.4"), ("mobilenet", "expand.0")])
def test_the_measured_price_is_the_loss_of_the_masked_model(name: str, group: str) -> None:
    model, structure, batches = setting(name, 2)
    group = group if group in {g.name for g in structure.free} else structure.free[0].name
    found = score(model, F.cross_entropy, batches, structure, method="measured", samples=2).values[group]
    for channel in (0, structure[group].size - 1):
        keep = tuple(c for c in range(structure[group].size) if c != channel)
        rises = [
            (F.cross_entropy(masked_output(model, Plan(structure, {group: keep}), (x,)), y) - F.cross_entropy(model(x), y)).item()
            for x, y in batches
        ]
        assert found[channel] == pytest.approx(np.mean(rises), abs=1e-12)


def test_batches_are_read_once_and_no_more_than_wanted() -> None:
    model, structure, batches = setting("vgg", 6)
    source = iter(batches)
    found = score(model, F.cross_entropy, source, structure, method="reconstruction", samples=3, estimator="exact")
    assert found.samples == 3 and len(list(source)) == 3
    again = score(model, F.cross_entropy, list(islice(batches, 3)), structure, method="reconstruction", samples=3, estimator="exact")
    assert found == again
