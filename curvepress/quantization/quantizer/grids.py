"""Affine grids of 2 to 8 bits and the four maps on them, as ONNX QuantizeLinear and DequantizeLinear define them.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x' = (q - zero_point) * scale

Rounding is to the nearest, ties to even; zero is always on the grid, so that padding costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Scheme:
    """What a grid looks like before its numbers are known.

    ``symmetric`` grids have zero point 0 and signed levels, ``-2**(bits-1) .. 2**(bits-1) - 1``, without the lowest if
    ``narrow``; the others have unsigned levels ``0 .. 2**bits - 1``.  ``axis`` None means one scale for the tensor; otherwise each index
    of dimension ``axis`` (output channels) has its own, and with ``group`` each run of ``group`` elements of that channel (the
    other dimensions flattened in their order; the last run may be shorter) has its own.

    Raises:
        ValueError: if the bits are not from 2 to 8, or there is a group without an axis.
    """

    bits: int
    symmetric: bool = True
    axis: int | None = None
    group: int | None = None
    narrow: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"grids have {FEWEST_BITS} to {MOST_BITS} bits, got {self.bits!r}; leave what needs more in float")
        if self.group is not None and (self.axis is None or type(self.group) is not int or self.group < 1):
            raise ValueError(f"groups are runs of at least one element of a channel, got group {self.group!r} and axis {self.axis!r}")

    @property
    def qmin(self) -> int:
        """The lowest level."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The highest level."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """What levels are stored as: int8 where they are signed, uint8 where not."""
        return torch.int8 if self.symmetric else torch.uint8


@dataclass(frozen=True, eq=False)
class Grid:
    """A scheme with its numbers.

    ``scale`` (float32, positive) and ``zero_point`` (int32, from qmin to qmax) have shape ``[]`` per tensor, ``[channels]`` per
    channel and ``[channels, groups]`` per group.

    Raises:
        ValueError: if a scale is not a positive normal number, or a zero point is off the grid.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        scheme, dims = self.scheme, 0 if self.scheme.axis is None else 1 if self.scheme.group is None else 2
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32 or self.scale.shape != self.zero_point.shape:
            raise ValueError(f"a grid has a float32 scale and an int32 zero point of one shape, got {self.scale} and {self.zero_point}")
        if self.scale.dim() != dims:
            raise ValueError(f"the scale of {scheme} has {dims} dimensions, got {tuple(self.scale.shape)}")
        if not bool(((self.scale >= torch.finfo(torch.float32).tiny) & self.scale.isfinite()).all()):
            raise ValueError(f"scales are positive normal float32 numbers, got {self.scale}; the data has no usable range")
        if not bool(((self.zero_point >= scheme.qmin) & (self.zero_point <= scheme.qmax)).all()) or (
            scheme.symmetric and bool(self.zero_point.any())
        ):
            raise ValueError(f"zero points of {scheme} are {'0' if scheme.symmetric else 'levels'}, got {self.zero_point}")

    @property
    def bits(self) -> int:
        """Bits of a level."""
        return self.scheme.bits


def grid(scheme: Scheme, scale: Any, zero_point: Any = 0) -> Grid:
    """A grid from numbers of any kind; ``zero_point`` is rounded, and spread where it is a single one."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    return Grid(scheme, scale, torch.as_tensor(zero_point).round().to(torch.int32).expand(scale.shape).clone())


def spread(values: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """Scales or zero points of a grid, in a shape that broadcasts against a tensor of the given shape.

    Raises:
        ValueError: if their number is not the tensor's number of channels and groups.
    """
    if scheme.axis is None:
        return values
    channels, moved = shape[scheme.axis], [shape[scheme.axis], *(n for d, n in enumerate(shape) if d != scheme.axis % len(shape))]
    size = shape.numel() // max(channels, 1)
    wanted = (channels,) if scheme.group is None else (channels, -(-size // scheme.group))
    if values.shape != wanted:
        raise ValueError(f"the grid has scales {tuple(values.shape)}, a tensor {tuple(shape)} with {scheme} needs {wanted}")
    if scheme.group is None:
        return values.reshape([-1 if d == scheme.axis % len(shape) else 1 for d in range(len(shape))])
    return values.repeat_interleave(scheme.group, 1)[:, :size].reshape(moved).movedim(0, scheme.axis)


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """The levels of ``x``: integers of ``grid.scheme.dtype``, in the shape of ``x``.

    Raises:
        ValueError: if ``x`` holds NaN, or the grid is for another shape.
    """
    if bool(x.isnan().any()):
        raise ValueError("there is no level for NaN; find where the values come from, or leave the tensor in float")
    steps, zero = _steps(x, grid)
    return (steps + zero).to(grid.scheme.dtype)


def dequantize(levels: Tensor, grid: Grid) -> Tensor:
    """The float32 values of integer ``levels``."""
    zero = spread(grid.zero_point, grid.scheme, levels.shape)
    return (levels.to(torch.int32) - zero).to(torch.float32) * spread(grid.scale, grid.scheme, levels.shape)


def centred(levels: Tensor, grid: Grid) -> Tensor:
    """int8 levels less their zero point: what kernels without one for weights run, with the same scales and the same values.

    Raises:
        ValueError: if the grid has 8 bits and zero points, for then the differences need nine.
    """
    if grid.bits == MOST_BITS and not grid.scheme.symmetric:
        raise ValueError("8-bit levels with zero points need nine bits without; use a symmetric grid, or 7 bits")
    return (levels.to(torch.int32) - spread(grid.zero_point, grid.scheme, levels.shape)).to(torch.int8)


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """``dequantize(quantize(x))`` with the straight-through gradient: 1 where ``x`` rounds to a level, 0 where it is clamped."""
    return _StraightThrough.apply(x, grid) if x.requires_grad and torch.is_grad_enabled() else _rounded(x, grid)


def _steps(x: Tensor, grid: Grid) -> tuple[Tensor, Any]:
    """Whole steps from zero to ``x``, clamped to the grid, and the zero point."""
    scheme, zero = grid.scheme, _zero(grid, x.shape)
    return (x / spread(grid.scale, scheme, x.shape)).round_().clamp_(scheme.qmin - zero, scheme.qmax - zero), zero


def _zero(grid: Grid, shape: torch.Size) -> Any:
    """The zero point; one that is the same for all as a number, for which the kernels are several times faster."""
    if grid.scheme.symmetric:
        return 0
    return int(grid.zero_point) if grid.scheme.axis is None else spread(grid.zero_point, grid.scheme, shape)


def _rounded(x: Tensor, grid: Grid) -> Tensor:
    steps, _ = _steps(x, grid)
    return steps.mul_(spread(grid.scale, grid.scheme, x.shape))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid) -> Tensor:
        steps = (x / spread(grid.scale, grid.scheme, x.shape)).round_()
        zero = _zero(grid, x.shape)
        inside = (steps >= grid.scheme.qmin - zero) & (steps <= grid.scheme.qmax - zero)
        ctx.save_for_backward(inside)
        return _rounded(x, grid)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None
