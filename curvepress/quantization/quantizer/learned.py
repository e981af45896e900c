"""Scales and zero points that are trained (LSQ, Esser et al. 2020, arXiv:1902.08153; LSQ+, Bhalgat et al. 2020, arXiv:2004.09576)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grids import Grid, Scheme
from .ranges import by_rows, from_rows

LEAST_SCALE = 1e-12
"""Training cannot take a scale below this; the quotients of a smaller one would not fit into the integers of the kernels."""


def fake_quantize_learned(x: Tensor, scheme: Scheme, scale: Tensor, zero_point: Tensor, gradient_scale: float = 1.0) -> Tensor:
    """``fake_quantize`` of ``x`` with gradients for ``x``, ``scale`` and ``zero_point`` (float32, shaped as in :class:`Grid`).

    With y = x / scale and v the level of x, d x'/d scale is v - zero_point - y on the grid and qmin or qmax minus zero_point beyond its
    ends; d x'/d zero_point is 0 on the grid and -scale beyond (LSQ+, equations 5 and 6, for zero points in steps).  Both are multiplied by
    ``gradient_scale``.  The grid used is that of :func:`learned_grid`; levels may differ from its own where y is within a few parts in
    10^7 of a tie, as the kernel multiplies by the inverse of the scale.
    """
    scale = _Instead.apply(scale.flatten(), _usable(scale).flatten())
    zero = _Instead.apply(zero_point.flatten(), _on_grid(zero_point, scheme).flatten())
    ends = (scheme.qmin, scheme.qmax, gradient_scale)
    if scheme.axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, *ends)
    if scheme.group is None:
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, scheme.axis % x.dim(), *ends)
    return from_rows(torch._fake_quantize_learnable_per_channel_affine(by_rows(x, scheme), scale, zero, 0, *ends), scheme, x.shape)


def gradient_scale(elements: int, scheme: Scheme) -> float:
    """1 / sqrt(elements * qmax), with the number of elements that share a scale (LSQ, section 2.2)."""
    return float((elements * scheme.qmax) ** -0.5)


def learned_grid(scheme: Scheme, scale: Tensor, zero_point: Tensor) -> Grid:
    """The grid that trained numbers stand for.

    Raises:
        ValueError: if training has made them NaN or infinite.
    """
    return Grid(scheme, _usable(scale), _on_grid(zero_point, scheme).to(torch.int32))


def _usable(scale: Tensor) -> Tensor:
    return scale.detach().clamp_min(LEAST_SCALE)


def _on_grid(zero_point: Tensor, scheme: Scheme) -> Tensor:
    return zero_point.detach().round().clamp(scheme.qmin, scheme.qmax)


class _Instead(torch.autograd.Function):
    """The second tensor, with the gradient going to the first as if it were the same: a scale below the least can grow again."""

    @staticmethod
    def forward(ctx: Any, trained: Tensor, used: Tensor) -> Tensor:
        return used.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
