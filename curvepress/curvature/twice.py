"""Convolution and normalisation whose derivatives of every order are fast kernels.

PyTorch's own second derivative of a convolution runs it with images as filters, and that of batch normalisation in evaluation
mode is put together from a dozen elementwise operations, in half precision with as many conversions.  Both are linear in their
input, and a convolution in its weight too, so that every derivative is again one of a few operations, given here in terms of
one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Geometry = tuple[Any, Any, Any, bool, Any, int]
"""Stride, padding, dilation, transposed, output padding and groups, as ``aten::convolution`` takes them."""


class Twice(TorchFunctionMode):
    """Within, convolutions and batch normalisation in evaluation mode are differentiated, any number of times, by fast kernels."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """What ``func`` returns."""
        known = RULES.get(func)
        found = known(*args, **(kwargs or {})) if known else None
        return func(*args, **(kwargs or {})) if found is None else found


class Convolution(Function):
    """``w * x``, bilinear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        """The result of the convolution."""
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(x, w, None, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``w``."""
        (x, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        return (
            Inputs.apply(g, w, x.detach(), ctx.geometry) if needs[0] else None,
            Weights.apply(g, x, w.detach(), ctx.geometry) if needs[1] else None,
            None,
        )


class Inputs(Function):
    """The gradient of ``x``: bilinear in that of the result, ``g``, and in ``w``; of the shape of ``like``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of ``x``."""
        ctx.save_for_backward(g, w)
        ctx.geometry = geometry
        return torch.ops.aten.convolution_backward(g, like, w, None, *geometry, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``g`` and ``w``."""
        (g, w), needs = ctx.saved_tensors, ctx.needs_input_grad
        return (
            Convolution.apply(u, w, ctx.geometry) if needs[0] else None,
            Weights.apply(g, u, w.detach(), ctx.geometry) if needs[1] else None,
            None,
            None,
        )


class Weights(Function):
    """The gradient of ``w``: bilinear in that of the result, ``g``, and in ``x``; of the shape of ``like``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        """The gradient of ``w``."""
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return torch.ops.aten.convolution_backward(g, x, like, None, *geometry, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``g`` and ``x``."""
        (g, x), needs = ctx.saved_tensors, ctx.needs_input_grad
        return (
            Convolution.apply(x, u, ctx.geometry) if needs[0] else None,
            Inputs.apply(g, u, x.detach(), ctx.geometry) if needs[1] else None,
            None,
            None,
        )


class Normalised(Function):
    """``scale * x + shift`` for each channel, as batch normalisation with its running statistics computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The normalised input, of its type."""
        ctx.save_for_backward(scale)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.ops.aten.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``x``."""
        (scale,) = ctx.saved_tensors
        return Normalised.apply(g, scale, torch.zeros_like(scale)), None, None


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    """The convolution of a batch; None for what is left to PyTorch: a single example, or padding given by name."""
    dims = weight.ndim - 2
    if x.ndim != weight.ndim or isinstance(padding, str):
        return None
    if torch.is_autocast_enabled(x.device.type):
        half = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(half), weight.to(half)
    each = [[n] * dims if isinstance(n, int) else [*n] * (dims // len(n)) for n in (stride, padding, dilation)]
    out = Convolution.apply(x, weight, (*each, False, [0] * dims, groups))
    return out if bias is None else out + bias.to(out.dtype).reshape(-1, *[1] * dims)


def _normalised(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch normalisation with statistics that are there; None where it is left to PyTorch, which also knows gradients of its weight."""
    if training or mean is None or var is None or any(t is not None and t.requires_grad for t in (weight, bias)):
        return None
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    return Normalised.apply(x, scale, (0 if bias is None else bias) - mean * scale)


RULES: Mapping[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolved),
    F.batch_norm: _normalised,
}
"""What stands in for an operation; None where it cannot."""
