"""Every layer type against dense float64 matrices: the exact Gauss-Newton diagonal, and products with the Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from curvature_zoo import CASES, Flat, Flow, N, images, made, words
from torch import Tensor, nn
from torch.autograd.functional import vhp
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import products
from curvepress.curvature.setup import view_of


def diagonal(model: torch.nn.Module) -> dict[str, curvature.Trace]:
    return {n: curvature.elements(n, p) for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_the_exact_diagonal_is_that_of_the_dense_gauss_newton_matrix(name: str) -> None:
    case = CASES[name]
    model = made(case)
    flat = Flat(model, case.batch, case.loss)
    want = flat.split(np.diag(flat.gauss_newton()))
    for micro in (2, 8):
        found = curvature.estimate(model, case.loss, [case.batch], diagonal(model), estimator="exact", micro=micro)
        for tensor, values in want.items():
            np.testing.assert_allclose(found.mean[tensor], values, rtol=1e-9, atol=1e-13, err_msg=f"{tensor} {found.notes}")
        assert any("one example at a time" in n for n in found.notes) == case.alone
        assert bool(found.curved) == case.smooth


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrices_whatever_the_pieces(name: str) -> None:
    case = CASES[name]
    model = made(case)
    flat = Flat(model, case.batch, case.loss)
    v = torch.randn_like(flat.point)
    parts = [p.view(s) for p, s in zip(v.split(flat.sizes), flat.shapes, strict=True)]
    want = {products.hessian: vhp(flat.value, flat.point, v)[1].numpy(), products.gauss_newton: flat.gauss_newton() @ v.numpy()}
    view = view_of(model, diagonal(model), {}, "full")
    assert list(view.parameters) == sorted(flat.names)
    for kind, dense in want.items():
        for micro in (2, 8):
            total = dict.fromkeys(flat.names, 0.0)
            for record in products.pieces(view, case.loss, case.batch, micro):
                with products.differentiable(view, kind):
                    piece = record(1.0)
                    order = [flat.names.index(n) for n in piece.parameters]
                    found = kind(piece, list(piece.parameters.values()))([parts[i] for i in order])
                for tensor, values in zip(piece.parameters, found, strict=True):
                    total[tensor] = total[tensor] + values.detach().flatten().numpy()
            for tensor, values in flat.split(dense).items():
                np.testing.assert_allclose(total[tensor], values, rtol=1e-9, atol=1e-13, err_msg=tensor)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.smooth])
def test_traces_equal_those_of_the_hessian_where_the_tool_says_so(name: str) -> None:
    case = CASES[name]
    model = made(case)
    asked = {n: curvature.layer(n) for n, _ in model.named_parameters()}
    found = curvature.estimate(model, case.loss, [case.batch], asked, estimator="exact")
    assert found.curved == ()
    for tensor in asked:
        dense = Flat(model, case.batch, case.loss, [tensor]).hessian()
        np.testing.assert_allclose(found.mean[tensor], np.trace(dense), rtol=1e-10, atol=1e-14, err_msg=tensor)


def places(length: int, shared: bool) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    """Words and positions from tables; positions as ``[length]`` or ``[1, length]``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        return m.out(F.relu(m.table(x) + m.places(index[None] if shared else index)).flatten(1))

    parts = {"table": nn.Embedding(6, 2), "places": nn.Embedding(7, 2), "out": nn.Linear(2 * length, 3)}
    return Flow(forward, **parts).double(), words(length)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_positions_are_no_examples_even_if_there_are_as_many(length: int, shared: bool) -> None:
    model, batch = places(length, shared)
    flat = Flat(model, batch)
    want = flat.split(np.diag(flat.gauss_newton()))
    for micro in (2, 3, 5):
        found = curvature.estimate(model, F.cross_entropy, [batch], diagonal(model), estimator="exact", micro=micro)
        assert found.notes == ("the loss is softmax cross-entropy",)
        for tensor, values in want.items():
            np.testing.assert_allclose(found.mean[tensor], values, rtol=1e-9, atol=1e-13, err_msg=f"{tensor} {micro}")


@pytest.mark.parametrize("name", ["second_dimension", "class_token", "batch_norm"])
def test_a_first_batch_of_one_example_teaches_the_same(name: str) -> None:
    case = CASES[name]
    model = made(case)
    x, y = case.batch
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    found = curvature.estimate(model, case.loss, batches, diagonal(model), estimator="exact")
    wholes = [Flat(model, b, case.loss) for b in batches]
    want = wholes[0].split(sum(np.diag(f.gauss_newton()) * len(f.batch[1]) for f in wholes) / N)
    for tensor, values in want.items():
        np.testing.assert_allclose(found.mean[tensor], values, rtol=1e-9, atol=1e-13, err_msg=tensor)


@pytest.mark.parametrize("name", ["lstm", "gru", "transformer", "grouped", "weight_norm"])
def test_single_precision_computes_the_same(name: str) -> None:
    case = CASES[name]
    model = made(case)
    x, y = case.batch
    exact = curvature.estimate(model, case.loss, [case.batch], diagonal(model), estimator="exact")
    single = curvature.estimate(
        model.float(), case.loss, [(x.float() if x.is_floating_point() else x, y)], diagonal(model), estimator="exact", micro=2
    )
    for tensor, values in exact.mean.items():
        np.testing.assert_allclose(single.mean[tensor], values, rtol=1e-3, atol=1e-4 * values.max(), err_msg=tensor)


def test_an_activation_may_be_changed_in_place_by_the_next_module() -> None:
    def make(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.ELU(inplace=inplace), nn.Linear(5, 3)).double()

    measures = {"a": curvature.Activation("0"), "x": curvature.Activation("0", 1)}
    for estimator in ("exact", "hessian"):
        plain, changed = (
            curvature.estimate(make(i), F.cross_entropy, [images(4)], measures, estimator=estimator, probes=4) for i in (False, True)
        )
        for name in measures:
            np.testing.assert_allclose(changed.mean[name], plain.mean[name], rtol=1e-12)


def test_an_input_handed_through_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3)).double()
    x, y = images(4)
    curvature.estimate(model, F.cross_entropy, [(x, y)], {"a": curvature.Activation("0")}, estimator="hessian")
    assert not x.requires_grad


def test_statistics_of_the_inputs_and_directions_over_tensors_are_said_to_be_curved() -> None:
    model = made(CASES["linear"])
    parts = tuple(curvature.along(n, p.shape, 0) for n, p in list(model.named_parameters())[:2])
    found = curvature.estimate(model, F.cross_entropy, [images(4)], {"d": curvature.Direction(parts, 5)}, estimator="exact")
    assert found.curved == ("d moves 2 tensors at once",)
    case = CASES["instance_norm"]
    normed = made(case)
    found = curvature.estimate(normed, case.loss, [case.batch], diagonal(normed), estimator="exact")
    assert "differs from the Hessian's blocks by NativeBatchNorm by statistics of its inputs" in str(found)
