"""Implants and data: what layers see and how the loss bends along what they make, implants fitted to it, and what each rank costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import curvature
from ..curvature.outputs import output_curvature
from ..implants import RankPrice, low_rank_sizes, names, ranks, replaceable
from ..objective import Batch, Batches, Loss, batch_size, output, outputs
from ..plan import Plan, implanted
from ..quantization.rounding import gram_convolution, gram_linear
from ..structure import Structure
from ..surgery.cutting import sliced
from ..surgery.implanting import Moments, implant, trouble_with
from ..surgery.truncation import Truncation
from ..tracing.watching import model_tensors, quiet_evaluation

PRICES = ("direction", "trace")


def moments(
    model: nn.Module,
    batches: Batches,
    weights: Collection[str],
    *,
    loss: Loss | None = None,
    temperature: float = 1.0,
    examples: int = 1024,
    seed: int = 0,
) -> dict[str, Moments]:
    """Gram matrices of what the layers of these weights read, and with a ``loss`` also its curvature along what they make.

    Both are float64 means over examples of sums over positions.  The curvature is that of Gauss-Newton, one random row of the output
    curvature an example (:mod:`curvepress.curvature`), carried back to the layers at the ``temperature``.  Whole batches are taken until
    ``examples`` were seen, or all were.

    Raises:
        ValueError: if there are no batches, or a layer is of three dimensions or pads by other than zeros.
    """
    found, seen, generator = dict[str, Moments](), 0, torch.Generator().manual_seed(seed)
    with quiet_evaluation(model):
        for batch in batches:
            found = _added(found, _of_batch(model, batch, weights, loss, temperature, generator))
            seen += batch_size(batch)
            if seen >= examples:
                break
    if not seen:
        raise ValueError("there were no batches to fit implants to")
    return {n: Moments(*(None if t is None else t / seen for t in (m.gram, m.curvature))) for n, m in found.items()}


def _added(a: Mapping[str, Moments], b: Mapping[str, Moments]) -> dict[str, Moments]:
    def plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return y if x is None else x if y is None else x + y

    return {n: Moments(plus(a[n].gram, b[n].gram), plus(a[n].curvature, b[n].curvature)) if n in a else b[n] for n in b}


def _of_batch(
    model: nn.Module, batch: Batch, weights: Collection[str], loss: Loss | None, temperature: float, generator: torch.Generator
) -> dict[str, Moments]:
    """Sums over the examples of one batch."""
    reads: dict[str, list[Tensor]] = {n: [] for n in weights}
    makes: dict[str, list[Tensor]] = {n: [] for n in weights}
    with torch.set_grad_enabled(loss is not None), _watched(model, reads, makes):
        predicted = output(model, batch)
    layers = {n: model.get_submodule(n.removesuffix(".weight")) for n in weights}
    grams = {n: sum((_gram(layers[n], x) for x in xs[1:]), _gram(layers[n], xs[0])) for n, xs in reads.items() if xs}
    if unread := sorted(set(weights) - set(grams)):
        raise ValueError(f"the layers of {', '.join(unread)} were not run on the data; leave them out")
    if loss is None:
        return {n: Moments(g) for n, g in grams.items()}
    terms = output_curvature(loss, predicted, batch[1], temperature).each(lambda t: t.sketch(generator))
    leaves = outputs(predicted)
    total = sum((leaves[i] * rows.to(leaves[i])).sum() for i, rows in terms.items())
    places = [(n, y) for n, ys in makes.items() for y in ys]
    slopes = torch.autograd.grad(total, [y for _, y in places], allow_unused=True)  # type: ignore[arg-type]
    bends: dict[str, Any] = {}
    for (n, y), slope in zip(places, slopes, strict=True):
        bend = _outer(torch.zeros_like(y) if slope is None else slope, layers[n]) * batch_size(batch)  # the loss is a mean over the batch
        bends[n] = bends[n] + bend if n in bends else bend
    return {n: Moments(g, bends[n]) for n, g in grams.items()}


@contextmanager
def _watched(model: nn.Module, reads: dict[str, list[Tensor]], makes: dict[str, list[Tensor]]) -> Iterator[None]:
    """Meanwhile the inputs and outputs of layers are collected; outputs are copies, which later layers may overwrite."""

    def hook(name: str) -> Callable[..., Tensor]:
        def collect(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
            reads[name].append(given[0].detach())
            if torch.is_grad_enabled():
                made = made if made.requires_grad else made.detach().requires_grad_()
                makes[name].append(made)
            return made.clone()

        return collect

    handles = [model.get_submodule(n.removesuffix(".weight")).register_forward_hook(hook(n)) for n in reads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gram(layer: Any, x: Tensor) -> Tensor:
    """``[inputs, inputs]``, summed over examples and positions."""
    if not isinstance(layer, _ConvNd):
        return gram_linear(x)[0]
    if layer.padding_mode != "zeros" or layer.weight.ndim > 4:
        raise ValueError(f"implants are fitted to convolutions of one or two dimensions padded by zeros, got {layer}; leave it out")
    padding: Any = layer.padding
    if isinstance(padding, str):
        padding = [d * (k - 1) // 2 if padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return gram_convolution(x, layer.weight, stride=layer.stride, padding=padding, dilation=layer.dilation)[0]


def _outer(slope: Tensor, layer: nn.Module) -> Tensor:
    """``[out, out]``, summed over examples and positions."""
    dim = -1 - len(getattr(layer, "kernel_size", ()))
    rows = slope.detach().movedim(dim, -1).flatten(0, -2).double()
    return rows.T @ rows


def fit_implants(
    model: nn.Module,
    original: nn.Module,
    batches: Batches,
    plan: Plan,
    *,
    loss: Loss | None = None,
    temperature: float = 1.0,
    examples: int = 1024,
) -> nn.Module:
    """A copy of ``model`` = ``apply(original, plan)`` whose implants come nearest to what the original's layers make of these data.

    Low-rank implants get the smallest squared error of the layer's output, with a ``loss`` weighted by its curvature; pointwise ones the
    least-squares fit to the outputs of the filters they stand for.  Only the implants' own weights change: do this before training.

    Raises:
        ValueError: if the model does not hold the plan's implants, or as :func:`moments` does.
    """
    found = moments(original, batches, list(plan.implants), loss=loss, temperature=temperature, examples=examples)
    values = model_tensors(sliced(implant(original, plan, found).model, implanted(plan)))
    fitted = copy.deepcopy(model)
    own = model_tensors(fitted)
    with torch.no_grad():
        for name in (part for weight, i in plan.implants.items() for part in names(weight, i)):
            if name not in own or own[name].shape != values[name].shape:
                seen = tuple(own[name].shape) if name in own else "no such tensor"
                raise ValueError(f"{name} is {tuple(values[name].shape)} in the plan, here {seen}; give what apply(original, plan) made")
            own[name].copy_(values[name])
    return fitted


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` = ``apply(original, plan)`` whose 1x1 filters are zero, as HAP's released code starts them."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name in (names(weight, i)[1] for weight, i in plan.implants.items() if i.kind == "pointwise"):
            model_tensors(copied)[name].zero_()
    return copied


def implant_prices(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    structure: Structure,
    *,
    held_out: Batches | None = None,
    wanted: Mapping[str, Sequence[int]] | None = None,
    price: str = "direction",
    weighted: bool = True,
    temperature: float = 1.0,
    **how: Any,
) -> dict[str, dict[int, RankPrice]]:
    """What low-rank implants are predicted to cost and save: by weight and rank, all ranks of a weight from one decomposition.

    The implant is the one :func:`fit_implants` makes with this ``loss``, whatever the ``temperature``, and its price half the curvature of
    the loss along what the truncation leaves, ``d' G d / 2`` (``direction``), or its mean over all directions, ``tr(G) / n * |d|^2 / 2``
    (``trace``, as in HAP, HAWQ-V2).

    Args:
        batches: for the fit, and for the curvature too if nothing is held out.
        held_out: other examples for the curvature; to those that it was fitted to an implant does less harm than to others, and none at all
            where they are fewer than its rank.
        wanted: the ranks of each weight; by default up to twelve that save parameters, for every weight that can have an implant.
        weighted: truncations are weighted by the curvature along outputs.
        temperature: of the output curvature behind the price.
        how: ``estimator``, ``stop``, ``seed``, ... as :func:`~curvepress.curvature.estimate` takes them.

    Raises:
        ValueError: if the price is unknown, a weight cannot have an implant, or as :func:`~curvepress.curvature.estimate` does.
    """
    if price not in PRICES:
        raise ValueError(f"price {price!r} is unknown; choose one of {', '.join(PRICES)}")
    chosen = {n: ranks(structure.tensors[n].shape) for n in structure.tensors if _able(model, structure, n)} if wanted is None else wanted
    chosen = {n: r for n, r in chosen.items() if r}
    known = moments(model, batches, list(chosen), loss=loss if weighted else None)
    own = dict(model.named_parameters())
    left: dict[str, dict[int, Tensor]] = {}
    for name, wanted_ranks in chosen.items():
        truncation = Truncation(own[name].flatten(1), known[name].gram, known[name].curvature)
        left[name] = {r: truncation.residual(r).to(own[name]).view_as(own[name]) for r in wanted_ranks}
    measures: dict[str, curvature.Measure] = {}
    for name, by_rank in left.items():
        whole = curvature.layer(name)
        along = {f"{name} {r}": curvature.Direction(whole.parts, 1, {name: d}) for r, d in by_rank.items()}
        measures |= {name: whole} if price == "trace" else along
    found = curvature.estimate(model, loss, batches if held_out is None else held_out, measures, temperature=temperature, **how)
    if found.samples < 2:
        raise ValueError(f"prices need at least 2 calibration batches for their error bars, got {found.samples}; give more or smaller ones")

    def priced(name: str, rank: int, residual: Tensor) -> RankPrice:
        key, factor = (name, float(residual.double().square().mean()) / 2) if price == "trace" else (f"{name} {rank}", 0.5)
        saved = own[name].numel() - low_rank_sizes(structure.tensors[name].shape, rank)
        positions = structure.tensors[name].positions
        return RankPrice(factor * float(found.mean[key][0]), factor * float(found.stderr[key][0]), saved, saved * positions)

    return {name: {r: priced(name, r, d) for r, d in by_rank.items()} for name, by_rank in left.items()}


def _able(model: nn.Module, structure: Structure, name: str) -> bool:
    if not replaceable(structure, name) or not structure.tensors[name].positions:
        return False
    layer = model.get_submodule(name.removesuffix(".weight"))
    return not trouble_with(model, name) and not (isinstance(layer, _ConvNd) and layer.padding_mode != "zeros")
