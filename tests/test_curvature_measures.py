"""What may be asked: every partition, several at once, directions across tensors, given displacements, activations; and refusals."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from curvature_zoo import CASES, Flat, Flow, images, made
from torch import nn
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import Direction, Part, Trace, factors

NAMES = ["table.weight", "mha.in_proj_weight", "mha.out_proj.weight", "out.weight"]


def network() -> tuple[nn.Module, Any]:
    case = CASES["attention"]
    return made(case), case.batch


def estimated(measures: dict[str, curvature.Measure], estimator: str = "exact", **options: Any) -> curvature.Curvature:
    model, batch = network()
    return curvature.estimate(model, F.cross_entropy, [batch], measures, estimator=estimator, **options)


def test_every_partition_adds_up_the_same_diagonal() -> None:
    model, batch = network()
    own = dict(model.named_parameters())
    flat = Flat(model, batch)
    diagonal = {n: v.reshape(own[n].shape) for n, v in flat.split(np.diag(flat.gauss_newton())).items()}
    name = "mha.in_proj_weight"
    w, d = own[name], diagonal[name]
    odd = Part(name, np.where(np.arange(48).reshape(12, 4) % 3 == 0, -1, np.arange(4)))
    want = {
        "rows": (curvature.output_channels(name, w), d.sum(1)),
        "columns": (curvature.input_channels(name, w), d.sum(0)),
        "heads": (curvature.blocks(name, w, 6), d.reshape(6, 2, 4).sum((1, 2))),
        "column_blocks": (curvature.blocks(name, w, 2, dim=1), d.reshape(12, 2, 2).sum((0, 2))),
        "elements": (curvature.elements(name, w), d.flatten()),
        "layer": (curvature.layer(name), d.sum(keepdims=True).flatten()),
        "network": (curvature.layer(*own), np.array([sum(v.sum() for v in diagonal.values())])),
        "joint": (
            Trace((curvature.along(name, w.shape, 1), curvature.along("mha.out_proj.weight", (4, 4), 0)), 4),
            d.sum(0) + diagonal["mha.out_proj.weight"].sum(1),
        ),
        "some": (
            Trace((curvature.along(name, w.shape, 0, [0, -1, 1, 1] * 3),), 3),
            np.array([d[::4].sum(), d[2::4].sum() + d[3::4].sum(), 0]),
        ),
        "odd": (Trace((odd,), 4), np.where(odd.labels < 0, 0, d).sum(0)),
    }
    together = estimated({n: m for n, (m, _) in want.items()})
    for key, (measure, values) in want.items():
        np.testing.assert_allclose(together.mean[key], values, rtol=1e-9, atol=1e-13, err_msg=key)
        np.testing.assert_allclose(estimated({key: measure}).mean[key], values, rtol=1e-9, atol=1e-13, err_msg=key)


def directions(shapes: dict[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """Three labels over four tensors, some elements left out and one tensor twice."""
    return (
        Part("table.weight", np.array([0, 1, 2, -1])),
        Part("mha.in_proj_weight", np.arange(12).reshape(12, 1) % 4 - 1),
        Part("mha.out_proj.weight", np.array([[0, -1, 2, 1]] * 4)),
        Part("out.weight", np.array(1)),
        Part("out.weight", np.array([[2], [-1], [2]])),
    )


@pytest.mark.parametrize("estimator", ["exact", "hessian", "gauss_newton"])
@pytest.mark.parametrize("how", ["own", "given", "carried"])
def test_a_direction_couples_its_tensors(estimator: str, how: str) -> None:
    model, batch = network()
    own = dict(model.named_parameters())
    shapes = {n: tuple(own[n].shape) for n in NAMES}
    torch.manual_seed(1)
    moves = {n: p.detach() if how == "own" else torch.randn_like(p) for n, p in own.items() if n in NAMES}
    parts = directions(shapes)
    flat = Flat(model, batch, names=NAMES)
    d = np.zeros((3, len(flat.point)))
    offsets = dict(zip(NAMES, np.cumsum([0, *flat.sizes[:-1]]), strict=True))
    for part in parts:
        labels = np.broadcast_to(part.labels, shapes[part.tensor]).flatten()
        for c in range(3):
            place = slice(offsets[part.tensor], offsets[part.tensor] + labels.size)
            d[c, place] += np.where(labels == c, moves[part.tensor].numpy().flatten(), 0)
    dense = flat.hessian() if estimator == "hessian" else flat.gauss_newton()
    coupling = d @ dense @ d.T
    measure = Direction(parts, 3, moves if how == "carried" else {})
    asked = {"d": measure, "alone": Direction((parts[0],), 3)}
    probes = 1 if estimator == "exact" else 64
    done: dict[int, curvature.Sample] = {}
    found = curvature.estimate(
        model,
        F.cross_entropy,
        [batch],
        asked,
        estimator=estimator,
        probes=probes,
        displacement=moves if how == "given" else None,
        done=done,
    )
    if estimator == "exact":
        np.testing.assert_allclose(found.mean["d"], np.diag(coupling), rtol=1e-9)
    else:  # e_c e_b of three labels: its mean over 64 probes has a standard deviation of 1/8
        rest = np.sqrt(np.square(coupling).sum(1) - np.square(np.diag(coupling)))
        assert (np.abs(found.mean["d"] - np.diag(coupling)) <= 4 * rest / 8 + 1e-12).all()
        assert np.abs(found.mean["d"].sum() - np.trace(coupling)) <= 4 * np.sqrt(2) * rest.sum() / 8


@pytest.mark.parametrize("padding", [None, 2])
def test_a_table_moves_in_the_rows_that_are_looked_up(padding: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come twice, out of order, as padding or not at all, one example at a time; no gradient is made of more rows than come."""
    monkeypatch.setattr(factors, "CHUNK", 1)
    torch.manual_seed(0)
    model = Flow(lambda m, x: m.out(m.table(x).sum(1).tanh()), table=nn.Embedding(9, 4, padding_idx=padding), out=nn.Linear(4, 3)).double()
    batch = torch.tensor([[7, 2, 7], [2, 5, 0]]), torch.tensor([0, 2])
    model.table.weight.data.normal_()
    name, shape, block = "table.weight", (9, 4), factors.Looked.block
    flat = Flat(model, batch, names=[name])
    dense, d = flat.gauss_newton(), flat.point.numpy()
    labels = {"rows": np.arange(9)[:, None] % 4 - 1, "columns": np.arange(4)[None], "all": np.zeros((), dtype=int)}
    labels |= {"elements": np.arange(36).reshape(9, 4) % 5}
    asked = {n: Direction((Part(name, own),), int(own.max()) + 1) for n, own in labels.items()}
    made: list[int] = []
    monkeypatch.setattr(factors.Looked, "block", lambda self, *where: made.append(self.shape[0]) or block(self, *where))
    squares = {"squares": curvature.elements(name, flat.point.view(shape))}
    found = curvature.estimate(model, F.cross_entropy, [batch], asked | squares, estimator="exact")
    for n, own in labels.items():
        each = [np.where(np.broadcast_to(own, shape).flatten() == c, d, 0) for c in range(asked[n].size)]
        np.testing.assert_allclose(found.mean[n], [e @ dense @ e for e in each], rtol=1e-9, atol=1e-15, err_msg=n)
    np.testing.assert_allclose(found.mean["squares"], np.diag(dense), rtol=1e-9, atol=1e-15)
    assert max(made) == 4 and not any("one example at a time" in n for n in found.notes)


def test_probing_a_single_direction_has_no_error() -> None:
    model, batch = network()
    flat = Flat(model, batch, names=NAMES)
    for estimator, dense in (("hessian", flat.hessian()), ("gauss_newton", flat.gauss_newton())):
        found = estimated({"d": Direction(tuple(Part(n, np.zeros((), dtype=int)) for n in NAMES), 1)}, estimator)
        np.testing.assert_allclose(found.mean["d"], [flat.point.numpy() @ dense @ flat.point.numpy()], rtol=1e-9)


ACTIVATED = ["conv2d", "second_dimension", "transformer", "dataclass"]
WATCHED = {"conv2d": ("1", 1), "second_dimension": ("inner", 2), "transformer": ("block.linear1", 2), "dataclass": ("inner", 1)}


@pytest.mark.parametrize("name", ACTIVATED)
@pytest.mark.parametrize("beside", [False, True])
def test_activations_are_means_over_examples_of_their_traces(name: str, beside: bool) -> None:
    case, (module, dim) = CASES[name], WATCHED[name]
    model = made(case)
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _m, _i, o: seen.append(o.detach()))
    model(case.batch[0])
    hook.remove()
    shift = Flow(lambda m, x: m.inner(x), inner=copy.deepcopy(model), shift=torch.zeros_like(seen[0]))
    shift.inner.get_submodule(module).register_forward_hook(lambda _m, _i, o: o + shift.shift)
    flat = Flat(shift, case.batch, case.loss, ["shift"])
    asked: dict[str, curvature.Measure] = {"a": curvature.Activation(module), "c": curvature.Activation(module, dim)}
    asked |= {"w": curvature.layer(next(n for n, _ in model.named_parameters()))} if beside else {}
    shape, others = tuple(seen[0].shape), tuple(i for i in range(seen[0].ndim) if i != dim)
    for micro in (2, 8):
        found = curvature.estimate(model, case.loss, [case.batch], asked, estimator="exact", micro=micro)
        want = np.diag(flat.gauss_newton()).reshape(shape).sum(others)
        np.testing.assert_allclose(found.mean["c"], want, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.mean["a"], [want.sum()], rtol=1e-9)
    dense = flat.hessian()
    want, noise = np.diag(dense).reshape(shape).sum(others), np.sqrt(2 * (np.square(dense).sum() - np.square(np.diag(dense)).sum()) / 40)
    found = curvature.estimate(model, case.loss, [case.batch], asked, estimator="hessian", probes=40, micro=2)
    assert abs(found.mean["a"][0] - want.sum()) <= 4 * noise + 1e-12
    assert (np.abs(found.mean["c"] - want) <= 4 * noise + 1e-12).all()


def test_inputs_of_any_size_have_activations() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    batches = [images(1, 4, 4), images(1, 6, 5, seed=1)]
    asked = {"a": curvature.Activation("0"), "c": curvature.Activation("0", 1), "w": curvature.layer("0.weight")}
    found = curvature.estimate(model, F.cross_entropy, batches, asked, estimator="exact")
    each = [curvature.estimate(model, F.cross_entropy, [b], asked, estimator="exact").mean for b in batches]
    for name in asked:
        np.testing.assert_allclose(found.mean[name], (each[0][name] + each[1][name]) / 2)


def asking(measure: curvature.Measure, **options: Any) -> None:
    estimated({"m": measure}, **options)


LAYER, INNER = curvature.layer("out.weight"), curvature.layer("mha.in_proj_weight")
REFUSED: dict[str, tuple[curvature.Measure, dict[str, Any], str]] = {
    "estimator": (LAYER, {"estimator": "ggn"}, "estimator 'ggn' is unknown; choose auto or one of hessian, gauss_newton, exact, pairs"),
    "precision": (LAYER, {"precision": "fp8"}, "precision 'fp8' is unknown; choose one of full, bfloat16, float16"),
    "parameter": (curvature.layer("nowhere"), {}, "measure 'm' asks about parameter 'nowhere', which this model does not have"),
    "module": (curvature.Activation("nowhere"), {}, "measure 'm' asks about module 'nowhere', which this model does not have"),
    "labels": (
        Trace((Part("out.weight", np.zeros((5, 1), dtype=int)),), 1),
        {},
        r"labels of 'm' have shape \(5, 1\).* \(3, 4\) of 'out.weight'",
    ),
    "large": (Trace((Part("out.weight", np.zeros((2, 3, 4), dtype=int)),), 1), {}, "does not broadcast"),
    "size": (Trace((Part("out.weight", np.array([[0], [1], [2]])),), 2), {}, "run from 0 to 2; -1 to 1 are allowed"),
    "negative": (Trace((Part("out.weight", np.array([[0], [-2], [1]])),), 2), {}, "run from -2 to 1; -1 to 1 are allowed"),
    "temperature": (
        LAYER,
        {"estimator": "hessian", "temperature": 2.0},
        "'hessian' has no temperature, got 2.0; choose pairs, sketch or exact",
    ),
    "fisher": (LAYER, {"estimator": "empirical_fisher", "temperature": 2.0}, "'empirical_fisher' has no temperature"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused(name: str) -> None:
    measure, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        asking(measure, **options)


def test_nothing_asked_and_nothing_given_are_refused() -> None:
    model, batch = network()
    with pytest.raises(ValueError, match="nothing was asked: give at least one measure"):
        curvature.estimate(model, F.cross_entropy, [batch], {})
    with pytest.raises(ValueError, match="there are no batches; give at least one"):
        curvature.estimate(model, F.cross_entropy, [], {"m": LAYER})
    with pytest.raises(ValueError, match="must hold a tensor whose first dimension counts examples, got Tensor"):
        curvature.estimate(model, F.cross_entropy, [(torch.tensor(1), batch[1])], {"m": LAYER})


def test_measures_check_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"dimension 1 of 'w' has 4 indices but \(3,\) labels; give one label for each"):
        curvature.along("w", (3, 4), 1, [0, 1, 2])
    with pytest.raises(ValueError, match="dimension 0 of 'w' has 3 indices, which 2 blocks cannot share equally"):
        curvature.blocks("w", torch.zeros(3, 4), 2)


def idle() -> nn.Module:
    return Flow(lambda m, x: m.out(x) + 0 * m.seen(x).detach(), out=nn.Linear(4, 3), idle=nn.Linear(4, 3), seen=nn.Linear(4, 3)).double()


@pytest.mark.parametrize("estimator", ["exact", "pairs", "empirical_fisher"])
def test_what_has_no_influence_is_refused(estimator: str) -> None:
    with pytest.raises(ValueError, match="'idle.weight' has no influence on the outputs that the loss reads; leave it out"):
        curvature.estimate(idle(), F.cross_entropy, [images(4)], {"m": curvature.layer("idle.weight")}, estimator=estimator)
    for module in ("idle", "seen"):
        with pytest.raises(ValueError, match="what 'm' asks about has no influence on the outputs"):
            curvature.estimate(idle(), F.cross_entropy, [images(4)], {"m": curvature.Activation(module)}, estimator=estimator)


def test_an_activation_of_a_module_that_runs_twice_is_refused() -> None:
    case = CASES["tied"]
    with pytest.raises(ValueError, match="module '0' runs more than once in a pass, so it has no single activation; name one inside it"):
        curvature.estimate(made(case), case.loss, [case.batch], {"m": curvature.Activation("0")}, estimator="exact")


def test_a_model_that_mixes_examples_is_refused_and_probed_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten(), nn.Linear(8, 3)).double()
    batch = images(2, 3)
    for estimator in ("exact", "empirical_fisher"):
        with pytest.raises(
            ValueError, match="mixes the examples of a batch .* choose the estimator 'hessian' with micro at least the batch size"
        ):
            curvature.estimate(model, F.cross_entropy, [batch], {"m": curvature.layer("0.weight")}, estimator=estimator)
    dense = Flat(model.eval(), batch, names=["0.weight"]).hessian()
    found = curvature.estimate(model, F.cross_entropy, [batch], {"m": curvature.layer("0.weight")}, estimator="hessian", probes=200)
    spread = np.sqrt(2 * (np.square(dense).sum() - np.square(np.diag(dense)).sum()) / 200)
    assert abs(found.mean["m"][0] - np.trace(dense)) <= 4 * spread


def test_attention_has_second_derivatives_and_says_how() -> None:
    model, batch = network()
    found = curvature.estimate(model, F.cross_entropy, [batch], {"m": INNER}, estimator="hessian")
    assert found.notes == ("attention runs in its plain form, as ScaledDotProductFlashAttentionForCpu has no second derivative",)
    assert curvature.estimate(model, F.cross_entropy, [batch], {"m": INNER}, estimator="exact").notes == (
        "the loss is softmax cross-entropy",
    )


@pytest.mark.parametrize("estimator", ["hessian", "gap", "controlled"])
def test_an_operation_without_a_second_derivative_is_refused_with_a_way_out(estimator: str) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 3)).double(), images(4)
    asked = {n: curvature.elements(n, p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="no second derivative .*hardsigmoid.* first-order estimator such as 'pairs' or 'exact'"):
        curvature.estimate(model, F.cross_entropy, [batch], asked, estimator=estimator)
    flat = Flat(model, batch)
    for way in ("exact", "pairs"):
        found = curvature.estimate(model, F.cross_entropy, [batch], asked, estimator=way, rate=1e9)
        for name, values in flat.split(np.diag(flat.gauss_newton())).items():
            np.testing.assert_allclose(found.mean[name], values, rtol=1e-9, atol=1e-13)


def test_the_kind_of_answer_is_said() -> None:
    model, batch = network()
    text = {e: str(curvature.estimate(model, F.cross_entropy, [batch], {"m": INNER}, estimator=e)) for e in ("exact", "hessian", "gap")}
    assert text["exact"].startswith(
        "Gauss-Newton by exact: 5 examples in 1 batches; stopped: all batches are used; differs from the Hessian's"
    )
    assert text["hessian"] == "Hessian by hessian: 5 examples in 1 batches; stopped: all batches are used"
    assert text["gap"].startswith("Hessian minus Gauss-Newton by gap")
    plain = made(CASES["linear"])
    assert str(curvature.estimate(plain, F.cross_entropy, [images(4)], {"m": curvature.layer("0.weight")}, estimator="exact")).endswith(
        "; equal to the Hessian's blocks"
    )
