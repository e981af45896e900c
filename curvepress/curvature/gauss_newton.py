"""First-order estimators: sums of squared gradients ``(J'u)^2`` of single examples over output vectors ``u``.

They need no second derivative of the network, run through fused attention kernels, are never negative, and differ only in
which output vectors they take.  Each function takes the output curvature of a batch and returns the vectors as
``(examples, columns)``: which examples to run and one or more vectors for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objective import Batch, Loss, checked_loss
from .examples import Column, Reading, Sums, squares
from .outputs import Outputs, output_curvature
from .recording import Vectors, View
from .screening import Screen
from .sharding import spans
from .trees import concatenated, examples, leaves, mapped, rebuilt, rows


@dataclass(frozen=True)
class Draw:
    """How output vectors are drawn: ``threshold`` is the mass above which a term is always taken."""

    generator: torch.Generator
    threshold: float
    omit: float


Vectored = tuple[Tensor, list[Column]]


def exact(outputs: Outputs, draw: Draw) -> Vectored:
    """Every rank-one term of the output curvature: the Gauss-Newton diagonal of this batch, without error.

    ``diag G = sum_nk (J_n' u_nk)^2`` (Schraudolph 2002, eq. 5-7).  With ``draw.omit`` the smallest terms that together make
    up that share of the output curvature are left out.
    """
    count, width = outputs.mass.shape
    if draw.omit:
        largest = _largest(outputs.mass, draw.omit)
        return _chosen(outputs, largest, torch.ones(len(largest), dtype=torch.float64))
    return torch.arange(count), [_kth(outputs, k) for k in range(width)]


def pairs(outputs: Outputs, draw: Draw) -> Vectored:
    """Pairs of example and term, drawn with probability ``pi = min(1, mass / threshold)`` and weighted ``1 / pi``.

    Unbiased for the Gauss-Newton diagonal (Horvitz & Thompson 1952); systematic sampling in random order (Madow 1949).
    Best for trained networks, where a few examples carry nearly all of the curvature.
    """
    mass = outputs.mass.flatten().cpu()
    inclusion = (mass / draw.threshold).clamp_max(1) if draw.threshold > 0 else torch.zeros_like(mass)
    order = torch.randperm(len(mass), generator=draw.generator)
    reached = inclusion[order].cumsum(0) + torch.rand((), generator=draw.generator, dtype=torch.float64)
    before = torch.cat([reached[:1] - inclusion[order][:1], reached[:-1]])
    taken = order[reached.floor() > before.floor()].sort().values
    return _chosen(outputs, taken, inclusion[taken].rsqrt())


def sketch(outputs: Outputs, draw: Draw) -> Vectored:
    """One vector ``S e`` an example, with ``S S'`` the output curvature and random signs ``e``.

    Unbiased for the Gauss-Newton diagonal: cross terms between the columns of ``S`` have mean zero.  Best where all examples
    matter alike, or there are many classes or positions.
    """
    return torch.arange(len(outputs.mass)), [_whole(outputs.each(lambda t: t.sketch(draw.generator)))]


def monte_carlo_fisher(outputs: Outputs, draw: Draw) -> Vectored:
    """The gradient at labels drawn from the model's prediction.

    Unbiased for the Fisher matrix, which equals the Gauss-Newton matrix for these losses (Martens, "New insights and
    perspectives on the natural gradient method", JMLR 2020, section 9.2).
    """
    return torch.arange(len(outputs.mass)), [_whole(outputs.each(lambda t: t.drawn(draw.generator)))]


def _kth(outputs: Outputs, k: int) -> Column:
    def column(start: int, stop: int, _: Sequence[Tensor]) -> Vectors:
        n = torch.arange(start, stop, device=outputs.mass.device)
        return outputs.rows(n, torch.full_like(n, k))

    return column


def _whole(vectors: Vectors) -> Column:
    return lambda start, stop, _: {leaf: u[start:stop] for leaf, u in vectors.items()}


def _chosen(outputs: Outputs, taken: Tensor, weight: Tensor) -> Vectored:
    if not len(taken):  # nothing was drawn, and nothing weighs nothing
        taken, weight = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    width = outputs.mass.shape[1]
    n, k, scale = (i.to(outputs.mass.device) for i in (taken // width, taken % width, weight))

    def column(start: int, stop: int, tensors: Sequence[Tensor]) -> Vectors:
        own, terms = n[start:stop], k[start:stop]
        here = outputs.at(own, tensors) if outputs.follows else outputs
        found = here.rows(torch.arange(len(own), device=n.device) if outputs.follows else own, terms)
        return {leaf: u * scale[start:stop].reshape(-1, *[1] * (u.ndim - 1)) for leaf, u in found.items()}

    return taken // width, [column]


def _largest(mass: Tensor, omit: float) -> Tensor:
    ordered = mass.flatten().cpu().sort(descending=True)
    kept = int((ordered.values.cumsum(0) < (1 - omit) * ordered.values.sum()).sum()) + 1
    return ordered.indices[:kept].sort().values


def pooled(view: View, inputs: Any, micro: int) -> Any:
    """The outputs of a whole batch, run ``micro`` examples at a time without gradients."""
    count = examples(inputs)
    with torch.no_grad():
        parts = [(view.run(_last(view, rows(inputs, torch.arange(a, b)))), counts) for a, b, counts in spans(view.model, count, micro)]
    return concatenated([p for p, counts in parts if counts])


def _last(view: View, inputs: Any) -> Any:
    """Images with their channels last, as convolutions without gradients are faster so on processors, most of all in half precision."""
    if view.device.type != "cpu":
        return inputs
    return mapped(lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t, inputs)


def curvature_of(view: View, loss: Loss, batch: Batch, micro: int, temperature: float) -> Outputs:
    """The output curvature of a batch."""
    return output_curvature(loss, pooled(view, batch[0], micro), batch[1], temperature)


def screened(view: View, screen: Screen | None, loss: Loss, batch: Batch, micro: int, temperature: float) -> Outputs:
    """The output curvature of a batch to draw from: by quick passes, if what is drawn can take its own from the passes after."""
    if screen is not None:
        with screen.put(view) as quick:
            made = pooled(quick, batch[0], micro if quick.half == view.half else 2 * micro)
        if all(bool(torch.isfinite(t).all()) for t in leaves(made)):
            found = output_curvature(loss, made, batch[1], temperature)
            if found.follows:
                return found
    return curvature_of(view, loss, batch, micro, temperature)


def summed(view: View, reading: Reading, batch: Batch, vectored: Vectored, micro: int) -> Sums:
    """Squares of the vectors that an estimator chose."""
    index, columns = vectored
    inputs = batch[0] if len(index) == examples(batch[0]) and bool((index == torch.arange(len(index))).all()) else rows(batch[0], index)
    return scaled(lambda s: squares(view, reading, inputs, [_times(c, s) for c in columns], micro), view.half, 2)


def empirical(view: View, reading: Reading, loss: Loss, batch: Batch, micro: int) -> Sums:
    """Squares of the gradients at the given labels (see :data:`ESTIMATORS`)."""
    count = examples(batch[0])
    output = mapped(lambda t: t.detach().double() if t.is_floating_point() else t, pooled(view, batch[0], micro))
    tensors = leaves(output)
    floating = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    value = checked_loss(loss, rebuilt(output, tensors), mapped(lambda t: t.double() if t.is_floating_point() else t, batch[1]))
    slopes = torch.autograd.grad(value, [tensors[i] for i in floating], allow_unused=True)
    found = {i: g * count**0.5 for i, g in zip(floating, slopes, strict=True) if g is not None}
    return summed(view, reading, batch, (torch.arange(count), [_whole(found)]), micro)


def _times(column: Column, scale: float) -> Column:
    return column if scale == 1 else lambda a, b, outputs: {leaf: u * scale for leaf, u in column(a, b, outputs).items()}


SCALES = tuple(2.0**k for k in (15, 12, 9, 6, 3, 0, -3, -6, -9))
"""Loss scales tried in turn for float16, the largest first: the first whose passes stay finite loses least to underflow."""


def scaled(run: Callable[[float], Sums], half: torch.dtype | None, power: int) -> Sums:
    """``run(scale)`` with its sums unscaled by ``scale ** power``; in float16 at the largest scale that does not overflow.

    Each result is checked for finiteness, and what overflowed is run again at a lower scale (Micikevicius et al., "Mixed
    precision training", ICLR 2018, section 3.2, scale the loss the same way).

    Raises:
        ValueError: if no scale gives finite sums.
    """
    for scale in SCALES if half == torch.float16 else (1.0,):
        found = run(scale)
        if found.finite():
            unscaled = Sums()
            unscaled.add(found, scale**-power)
            return unscaled
    kind = "float16 at any loss scale" if half == torch.float16 else str(half or "the model's precision").removeprefix("torch.")
    raise ValueError(f"the curvature is not finite in {kind}; look for overflow in the weights or the data, or ask for another precision")
