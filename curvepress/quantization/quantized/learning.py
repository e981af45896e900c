"""Gradients of activations on a grid whose scale learns, in few passes over memory: this is most of what training quantized costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..quantizer import Scheme

aten = torch.ops.aten


def round_and_learn(x: Tensor, scheme: Scheme, scale: Tensor, offset: Tensor, slowness: float) -> Tensor:
    """``fake_quantize`` of ``x`` on one grid for the tensor, bit for bit, with gradients for ``x``, ``scale`` and ``offset``.

    ``offset`` is the lowest number of the grid, which begins at the nearest whole step.  Gradients are those of what is computed if all
    that rounding adds is held as it is.  That of ``x`` is 1 where it rounds to a level and 0 where it is clamped; that of ``scale`` is what
    rounding adds to x, in steps, and where x is clamped the steps from ``offset`` to that end; that of ``offset`` is 0, and 1 where x is
    clamped; the last two times ``slowness`` (LSQ+, Bhalgat et al. 2020, arXiv:2004.09576, equations 5 and 6, which leave the offset
    unrounded; without an offset LSQ, Esser et al. 2020, arXiv:1902.08153, equation 3).

    Raises:
        ValueError: if the scale is not positive.
    """
    step = float(scale.detach())
    if not 0 < step < math.inf:
        raise ValueError(f"a scale became {step}, which is no size of a step")
    zero = int((-offset.detach() / scale.detach()).round().clamp(scheme.qmin, scheme.qmax))
    found: Tensor = _Rounding.apply(x, scale, offset, (scheme.qmin - zero, scheme.qmax - zero), slowness)
    return found


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, limits: tuple[int, int], slowness: float) -> Tensor:
        y = (x / scale).round_().clamp_(*limits).mul_(scale)
        ctx.save_for_backward(x, y, scale, offset)
        ctx.limits, ctx.slowness = limits, slowness
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale, offset = ctx.saved_tensors
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)  # once here, rather than in each of the passes below
        low, high = ((limit + half) * float(scale) for limit, half in zip(ctx.limits, (-0.5, 0.5), strict=True))
        inside = aten.hardtanh_backward(gradient, x, low, high)
        clamped = gradient.sum() - inside.sum() if bool(offset) else torch.zeros_like(offset)
        by_scale = ctx.slowness * ((_dot(gradient, y) - _dot(inside, x)) / scale - clamped * offset / scale)  # steps from the offset
        found = inside, by_scale, ctx.slowness * clamped
        return *(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)), None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products of tensors that lie in memory in the same order, without a copy where that is one of the usual orders."""
    for order in (range(a.dim()), (0, *range(2, a.dim()), 1)):
        if a.permute(*order).is_contiguous():
            return torch.dot(a.permute(*order).view(-1), b.permute(*order).view(-1))
    return (a * b).sum()
