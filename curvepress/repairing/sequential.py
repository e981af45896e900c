"""What survives pruning takes over what was lost: every layer refitted to the original's outputs by least squares, in order.

A layer that reads fewer or changed inputs ``x`` gets the change ``D`` of its weight and the change ``c`` of its intercept that make
``sum |r - D x - c|^2 + ridge |D|^2`` least over calibration examples and positions.  ``r`` is what its outputs lack to make what they join
(their own values, behind a batch normalisation and a residual sum where these follow) what it is in the original.  Layers are
done in the order they are run, so ``x`` and ``r`` are those of the model as it is repaired so far.  This is Optimal Brain Surgeon's
compensation (Hassibi and Stork, NIPS 1992) with the squared error of a layer's output for the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..objective import Batch, Batches, batch_size
from ..plan import Plan, origins
from ..quantization.quantized.graphs import argument, tensor
from .stepping import Product, Stepped, chain, graph_of, inputs_of, live_bytes, outputs_of, products

log = logging.getLogger("curvepress")

EXAMPLES, HELD_OUT, MEMORY = 1024, 0.25, 4 << 30
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Multiples of the mean of the Gram matrix's diagonal."""
DEAD = 1e-6
"""A channel that a batch normalisation scales by less than this share of the largest scale is left alone: nothing it does counts."""
NO_TWIN = "the original has no such product, as it has no inner channels of an implant"
ROUNDING = 64
"""Outputs that differ by no more than so many units of the last place, relative to their spread, are the same."""


@dataclass(frozen=True)
class Layer:
    """A layer's squared error on held-out examples before and after its repair, as a share of the variance of what it joins.

    ``name`` is that of its weight.  ``ridge`` is None where it was left as it was, because nothing made the error smaller.
    ``intercept`` is where the change of the intercept went: ``bias``, ``batchnorm`` (a running mean), or ``""``.
    """

    name: str
    before: float
    after: float
    ridge: float | None
    intercept: str


@dataclass(frozen=True)
class Repaired:
    """The repaired copy, and its layers whose outputs differed, in order.

    ``left`` are weights that could not be repaired, with the reason.  ``examples`` is how many were used, held-out ones included, and
    ``bytes`` the most that activations took at once.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    left: dict[str, str]
    examples: int
    bytes: int


def repair(
    model: nn.Module,
    original: nn.Module,
    batches: Batches,
    plan: Plan | None = None,
    *,
    names: Collection[str] | None = None,
    examples: int = EXAMPLES,
    held_out: float = HELD_OUT,
    ridges: Sequence[float] = RIDGES,
    residual: bool = True,
    memory: int = MEMORY,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Repaired:
    """A copy of ``model``, pruned or changed in its weights otherwise, refitted layer by layer to what ``original`` computes.

    Linear layers, convolutions over one or two dimensions and products by a matrix are refitted, by the names of their weights, which
    both models share.  A layer changes only if that makes its error on held-out examples smaller; the ridge is the one that makes
    it smallest.  No labels, no loss and no gradients are needed.  Neither given model is changed.

    Args:
        plan: how ``model`` was made of ``original``; needed where outputs of layers were cut.
        names: the weights to refit; all by default.  A layer whose outputs are right is never touched.
        examples: calibration examples at most, held-out ones included.
        held_out: the share of the examples that chooses ridges and accepts layers, and is not fitted to.
        ridges: multiples of the mean of the Gram matrix's diagonal to choose from.
        residual: let the last layer before a residual sum make up for what is wrong on the other side of the sum too.
        memory: bytes that activations of both models may take at once; fewer examples are used, and this is logged, if they take more.
        progress: called with (layers done, layers in all).

    Raises:
        ValueError: if an option is out of range, ``torch.export`` cannot follow a model, the models do not fit each other or the plan, or a
            layer's values are not finite.
    """
    _check(held_out, ridges)
    copy = deepcopy(model)
    given = _taken(batches, examples)
    if sum(map(batch_size, given)) < 2:
        raise ValueError(f"repair needs 2 or more calibration examples, one of them to be held out; got {sum(map(batch_size, given))}")
    graphs = graph_of(original, given[0]), graph_of(copy, given[0])
    each = sum(live_bytes(g, given[0]) for g in graphs) / batch_size(given[0])
    given = _within(memory, each, given)
    count = sum(map(batch_size, given))
    border = min(max(round(count * (1 - held_out)), 1), count - 1)
    parts = [_taken(given, border), _after(given, border)]
    work = _Repair(graphs, parts, plan, names, tuple(ridges), residual)
    with torch.no_grad():
        layers = tuple(work.layers(progress))
    return Repaired(copy, layers, work.left, count, round(each * count))


def _check(held_out: float, ridges: Sequence[float]) -> None:
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share of the examples between 0 and 1, such as {HELD_OUT}; got {held_out}")
    if not ridges or not all(0 < r < float("inf") for r in ridges):
        raise ValueError(f"ridges must be one or more positive numbers, such as {RIDGES}; got {tuple(ridges)}")


def _taken(batches: Batches, examples: int) -> list[Batch]:
    """The first so many examples."""
    taken, seen = list[Batch](), 0
    for batch in batches:
        taken.append(_part(batch, slice(examples - seen)))
        seen += batch_size(taken[-1])
        if seen >= examples:
            break
    return taken


def _after(batches: Sequence[Batch], examples: int) -> list[Batch]:
    """All but the first so many examples."""
    rest = []
    for batch in batches:
        if batch_size(batch) > examples:
            rest.append(_part(batch, slice(max(examples, 0), None)))
        examples -= batch_size(batch)
    return rest


def _part(batch: Batch, rows: slice) -> Batch:
    size = batch_size(batch)
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x[rows] if x.ndim and len(x) == size else x, batch)


def _within(memory: int, each: float, given: list[Batch]) -> list[Batch]:
    wanted, possible = sum(map(batch_size, given)), int(memory // max(each, 1))
    if possible >= wanted:
        return given
    if possible < 2:
        raise ValueError(
            f"repair needs {each / 2**20:.0f} MiB for each example and 2 examples or more; memory allows {memory / 2**20:.0f} MiB"
        )
    log.info(
        "repair uses %d of %d examples: each takes %.1f MiB, and memory allows %.0f MiB", possible, wanted, each / 2**20, memory / 2**20
    )
    return _taken(given, possible)


class _Moments:
    """Float64 sums over examples and positions of ``x [groups, inputs, rows]`` and ``r [groups, outputs, rows]`` and their products."""

    def __init__(self) -> None:
        self.count, self.sums = 0, tuple[Tensor, ...]()

    def add(self, x: Tensor, r: Tensor) -> None:
        new = [t.double() for t in (x @ x.mT, x @ r.mT, x.sum(-1), r.sum(-1), (r * r).sum(-1))]
        self.sums = tuple(a + b for a, b in zip(self.sums, new, strict=True)) if self.sums else tuple(new)
        self.count += x.shape[-1]

    def solve(self, ridge: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """``D`` as ``[groups, inputs, outputs]`` and ``c`` as ``[groups, outputs]``."""
        gram, cross, x, r, _ = self.sums
        if intercept:
            gram, cross = gram - x[:, :, None] * x[:, None] / self.count, cross - x[:, :, None] * r[:, None] / self.count
        level = gram.diagonal(dim1=1, dim2=2).mean(1)
        level = torch.where(level > 0, level, 1.0)  # a group that sees nothing changes nothing
        damping = ridge * level[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        change = torch.linalg.solve(gram + damping, cross)
        shift = (r - torch.einsum("gio,gi->go", change, x)) / self.count if intercept else torch.zeros_like(r)
        return change, shift

    def error(self, change: Tensor, shift: Tensor) -> Tensor:
        """What is left of ``sum r^2`` for every output, ``[groups, outputs]``."""
        gram, cross, x, r, square = self.sums
        made = (change * (gram @ change - 2 * cross)).sum(1)
        moved = shift * (2 * torch.einsum("gio,gi->go", change, x) - 2 * r + self.count * shift)
        return (square + made + moved).clamp_min(0)


@dataclass(frozen=True)
class _Place:
    """A product in one of the models, the batch normalisation behind it, and the other side of the sum behind that."""

    run: Stepped
    product: Product
    norm: fx.Node | None
    other: fx.Node | None

    def joined(self, batch: int) -> Tensor:
        """The product's outputs behind the normalisation."""
        y = self.run.value(self.product.node, batch)
        if self.norm is None:
            return y
        mean, variance, weight, bias = (self.read(n) for n in ("running_mean", "running_var", "weight", "bias"))
        return nn.functional.batch_norm(y, mean, variance, weight, bias, eps=argument(self.norm, "eps"))

    def read(self, name: str) -> Tensor | None:
        """A tensor of the normalisation."""
        node = argument(self.norm, name) if self.norm is not None else None
        return tensor(self.run.graph, str(node.target)) if isinstance(node, fx.Node) else None

    def scale(self) -> Tensor:
        """What the normalisation multiplies each output with; ones without one."""
        variance, weight = self.read("running_var"), self.read("weight")
        if variance is None or self.norm is None:
            own = tensor(self.run.graph, self.product.name)
            return own.new_ones(own.shape[self.product.axis])
        scale = (variance + argument(self.norm, "eps")).rsqrt()
        return scale if weight is None else scale * weight


class _Repair:
    def __init__(
        self, graphs: tuple[fx.GraphModule, ...], parts: list[list[Batch]], plan: Plan | None,
        names: Collection[str] | None, ridges: tuple[float, ...], residual: bool,
    ) -> None:  # fmt: skip
        self.original, self.small = (Stepped(g, [*parts[0], *parts[1]]) for g in graphs)
        (self.twins, _), (found, self.left) = map(products, graphs)
        self.fitted, self.count = len(parts[0]), len(parts[0]) + len(parts[1])
        self.ridges, self.residual, self.origins = ridges, residual, origins(plan) if plan else {}
        if unknown := sorted(set(names or ()) - {*found, *self.left}):
            raise ValueError(f"names: no layer multiplies by {', '.join(unknown)}; there are {', '.join([*found, *self.left])}")
        self.products = [p for n, p in found.items() if names is None or n in names]
        self.left = {n: why for n, why in self.left.items() if names is None or n in names}

    def layers(self, progress: Callable[[int, int], None]) -> Iterator[Layer]:
        for n, product in enumerate(self.products):
            twin = self.twins.get(self._origin(product)[0])
            if twin is None or twin.node in self.original.done:
                self.left[product.name] = NO_TWIN if twin is None else "the original runs it earlier"
                continue
            for run, node in ((self.original, twin.node), (self.small, product.node)):
                run.before(node)
                run.execute()
            yield from self._layer(*self._places(twin, product))
            progress(n + 1, len(self.products))

    def _places(self, twin: Product, product: Product) -> tuple[_Place, _Place]:
        """The product in both models, with what follows it in both."""
        (norm, other), (norm_small, other_small) = chain(twin, self.original.done), chain(product, self.small.done)
        if norm is None or norm_small is None:
            norm = norm_small = None
        if not self.residual or not self._alike(twin, other, product, other_small):
            other = other_small = None
        return _Place(self.original, twin, norm, other), _Place(self.small, product, norm_small, other_small)

    def _alike(self, twin: Product, other: fx.Node | None, product: Product, other_small: fx.Node | None) -> bool:
        """Whether the other sides of sums are there, and as large as the products' outputs."""
        if other is None or other_small is None:
            return False
        pairs = ((self.original, twin.node, other), (self.small, product.node, other_small))
        return all(run.value(a, 0).shape == run.value(b, 0).shape for run, a, b in pairs)

    def _layer(self, whole: _Place, place: _Place) -> Iterator[Layer]:
        """The layer refitted, unless nothing is lacking."""
        fit, held, variance = self._measured(whole, place)
        if not all(bool(t.isfinite().all()) for m in (fit, held) for t in m.sums):
            raise ValueError(f"repair: {place.product.name} sees or makes values that are not finite; look for NaN in weights and data")
        intercept = "bias" if place.product.bias else "batchnorm" if place.read("running_mean") is not None else ""
        weights = place.scale().double().square().reshape(held.sums[3].shape) / max(variance, torch.finfo(torch.float64).tiny)
        before = float((held.sums[4] * weights).sum())
        if before <= (ROUNDING * torch.finfo(tensor(self.small.graph, place.product.name).dtype).eps) ** 2:
            return
        candidates = [(ridge, *fit.solve(ridge, bool(intercept))) for ridge in self.ridges]
        errors = [float((held.error(change, shift) * weights).sum()) for _, change, shift in candidates]
        after = min(errors)
        if not after < before:
            yield Layer(place.product.name, before, before, None, "")
            return
        ridge, change, shift = candidates[errors.index(after)]
        _changed(place, change, shift, intercept)
        self.small.execute()
        yield Layer(place.product.name, before, after, ridge, intercept)

    def _measured(self, whole: _Place, place: _Place) -> tuple[_Moments, _Moments, float]:
        """Moments on fitted and on held-out examples, and the variance wanted of the latter's outputs, summed."""
        fit, held, product = _Moments(), _Moments(), place.product
        weight, wanted = tensor(self.small.graph, product.name), list[Tensor]()
        for n in range(self.count):
            target, lacking = self._lacking(whole, place, n)
            for part, x in inputs_of(product, self.small.value(product.reads, n), weight):
                (fit if n < self.fitted else held).add(x, outputs_of(product, lacking[part]))
            if n >= self.fitted:
                values = outputs_of(product, target).double()
                wanted.append(torch.stack([values.sum(-1), values.square().sum(-1)]))
        total, square = torch.stack(wanted).sum(0)
        return fit, held, float((square - total.square() / held.count).sum())

    def _lacking(self, whole: _Place, place: _Place, batch: int) -> tuple[Tensor, Tensor]:
        """What the product should join as the original has it, and what its own outputs lack to do so."""
        target, made = self._kept(whole.joined(batch), place.product), place.joined(batch)
        if target.shape != made.shape:
            seen = f"{place.product.name} makes outputs {tuple(made.shape)}, those of the original that stay are {tuple(target.shape)}"
            raise ValueError(f"repair: {seen}; give the plan that the model was made by")
        lacking = target - made
        if whole.other is not None and place.other is not None:
            lacking = lacking + self._kept(self.original.value(whole.other, batch), place.product) - self.small.value(place.other, batch)
        scale = place.scale()
        inverse = torch.where(scale.abs() > DEAD * scale.abs().max(), 1 / scale, 0.0)
        return target, lacking * inverse.reshape([-1, *[1] * (lacking.ndim - 2)] if _channel(place.product) == 1 else [-1])

    def _origin(self, product: Product) -> tuple[str, np.ndarray | None]:
        """The original's weight that a product stands for, and which of its outputs; None for all of them."""
        return self.origins.get((product.name, product.axis), (product.name, None))

    def _kept(self, outputs: Tensor, product: Product) -> Tensor:
        """Of the original's outputs those that the product makes, in its order."""
        rows = self._origin(product)[1]
        return outputs if rows is None else outputs.index_select(_channel(product), torch.as_tensor(rows, device=outputs.device))


def _channel(product: Product) -> int:
    """The dimension of a product's outputs that counts them."""
    return 1 if product.convolution else -1


def _changed(place: _Place, change: Tensor, shift: Tensor, intercept: str) -> None:
    """Change the layer's weight, and its bias or the mean that is subtracted behind it."""
    weight = tensor(place.run.graph, place.product.name)
    rows = change.mT.reshape(weight.mT.shape if place.product.by_columns else weight.shape)
    weight.add_((rows.mT if place.product.by_columns else rows).to(weight.dtype))
    if intercept == "bias":
        tensor(place.run.graph, place.product.bias).add_(shift.flatten().to(weight.dtype))
    elif (mean := place.read("running_mean")) is not None:
        mean.sub_(shift.flatten().to(mean.dtype))
