"""Gradients of activations on a grid whose scale learns, in few passes over memory: this is most of what training quantized costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..quantizer import Scheme

aten = torch.ops.aten


def round_and_learn(x: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor, slowness: float) -> Tensor:
    """``fake_quantize`` of ``x`` on one grid for the tensor, bit for bit, with gradients for ``x`` and ``scale``.

    The gradient of ``x`` is 1 where it rounds to a level and 0 where it is clamped.  That of ``scale`` is the level minus the zero
    point, and minus ``x / scale`` where it is not clamped, times ``slowness`` (LSQ, Esser et al. 2020, arXiv:1902.08153, equation 3).

    Raises:
        ValueError: if the scale is not positive.
    """
    zero, step = int(zero_point), float(scale.detach())
    if not 0 < step < math.inf:
        raise ValueError(f"a scale became {step}, which is no size of a step")
    found: Tensor = _Rounding.apply(x, scale, scheme.qmin - zero, scheme.qmax - zero, slowness)
    return found


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, slowness: float) -> Tensor:
        y = (x / scale).round_().clamp_(low, high).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.limits, ctx.slowness = (low, high), slowness
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)  # once here, rather than in each of the passes below
        low, high = ((limit + half) * float(scale) for limit, half in zip(ctx.limits, (-0.5, 0.5), strict=True))
        inside = aten.hardtanh_backward(gradient, x, low, high)
        by_scale = (_dot(gradient, y) - _dot(inside, x)) / scale * ctx.slowness if ctx.needs_input_grad[1] else None
        return (inside if ctx.needs_input_grad[0] else None), by_scale, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products of tensors that lie in memory in the same order, without a copy where that is one of the usual orders."""
    for order in (range(a.dim()), (0, *range(2, a.dim()), 1)):
        if a.permute(*order).is_contiguous():
            return torch.dot(a.permute(*order).view(-1), b.permute(*order).view(-1))
    return (a * b).sum()
