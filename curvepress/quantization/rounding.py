"""Rounding that looks at what a layer computes: error compensation and coordinate descent, from calibration data.

A layer's squared output error, summed over the calibration data, is tr(D G Dᵀ): D is what rounding changes in the weight, one row for
each output channel, and G the Gram matrix of what the rows are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .quantizer import Grid, dequantize, quantize, spread

Sizes = int | Sequence[int]
Method = Literal["nearest", "compensated", "adaptive"]
COLUMNS = 1 << 24
BLOCK = 64
SWEEPS = 20


def gram_linear(x: Tensor) -> Tensor:
    """``[1, inputs, inputs]`` float64: the Gram matrix of a linear layer's input ``[..., inputs]``; add it up over batches."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    return (rows.T @ rows).double()[None]


def gram_convolution(x: Tensor, weight: Tensor, *, stride: Sizes = 1, padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """``[groups, inputs, inputs]`` float64: the same for a convolution over one or two dimensions; inputs are the elements of a filter."""
    total = torch.zeros(groups, weight[0].numel(), weight[0].numel(), dtype=torch.float64)
    if weight.dim() == 3:
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        stride, padding, dilation = (1, _last(stride)), (0, _last(padding)), (1, _last(dilation))
    if weight.dim() != 4:
        raise ValueError(f"Gram matrices are for convolutions over one or two dimensions, got a weight {tuple(weight.shape)}; use nearest")
    examples = max(1, COLUMNS // (x[0].numel() * weight[0, 0].numel()))
    for part in x.detach().float().split(examples):
        columns = torch.nn.functional.unfold(part, weight.shape[2:], _pair(dilation), _pair(padding), _pair(stride))  # [N, C k, L]
        rows = columns.reshape(len(part), groups, -1, columns.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        total += (rows @ rows.mT).double()
    return total


def round_weight(weight: Tensor, grid: Grid, gram: Tensor, *, method: Method = "adaptive", damping: float = 0.01) -> Tensor:
    """Levels of ``weight`` (as ``quantize`` gives them; output channels along dimension 0) with a small output error.

    ``nearest`` is ``quantize``.  ``compensated`` rounds one input after the other, those with the largest entry of G's diagonal first,
    and moves the ones still to come to make up for the error (GPTQ, Frantar et al. 2023, arXiv:2210.17323).  ``adaptive`` goes on from
    there: it sets one input's levels after the other to the best ones given all others, until none changes (QuantEase,
    Behdin et al. 2023, arXiv:2309.01885).  ``damping`` times the mean of G's diagonal is added to the diagonal; the error
    so defined is not larger for ``adaptive`` than for ``compensated`` or ``nearest``.

    Raises:
        ValueError: if G is not finite or of another layer, or the grid's channels are not along dimension 0.
    """
    levels = quantize(weight, grid)
    if method not in ("nearest", "compensated", "adaptive"):
        raise ValueError(f"methods are nearest, compensated and adaptive, got {method!r}")
    if method == "nearest":
        return levels
    layer = _Layer(weight, grid, _damped(gram, weight, damping))
    compensated = layer.compensated()
    if method == "compensated":
        return layer.levels(compensated)
    nearest = layer.rows(levels.double()) - layer.zero
    return layer.levels(layer.descended(torch.where(layer.error(nearest) < layer.error(compensated), nearest, compensated)))


def fit_and_round(
    weight: Tensor, grid: Grid, gram: Tensor, *, method: Method = "adaptive", damping: float = 0.01, rounds: int = 4
) -> tuple[Tensor, Grid]:
    """Levels and a grid for them: rounding and the scales with the least output error for what was rounded, in turn.

    The pair with the least (damped) error of all rounds comes back; the first has the levels of ``round_weight`` on the given grid, so it
    is never worse.  Grids with groups are left as they are.

    Raises:
        ValueError: as :func:`round_weight` does.
    """
    if grid.scheme.group is not None:
        return round_weight(weight, grid, gram, method=method, damping=damping), grid
    damped, found = _damped(gram, weight, damping), []
    for _ in range(rounds):
        levels = round_weight(weight, grid, gram, method=method, damping=damping)
        grid = _rescaled(weight, levels, grid, damped)
        found.append((output_error(dequantize(levels, grid) - weight, damped), levels, grid))
    _, levels, grid = min(found, key=lambda f: f[0])
    return levels, grid


def _rescaled(weight: Tensor, levels: Tensor, grid: Grid, gram: Tensor) -> Grid:
    """The grid with the scales that suit the levels best: ``w G k / k G k`` for the steps k of each row (or all rows)."""
    layer = _Layer(weight, grid, gram)
    steps = layer.rows(levels.double()) - layer.zero
    seen = steps @ layer.gram
    above, below = (seen * layer.values).sum(-1).flatten(), (seen * steps).sum(-1).flatten()
    if grid.scheme.axis is None:
        above, below = above.sum(), below.sum()
    scale = torch.where((above > 0) & (below > 0), above / below, grid.scale.double())
    return replace(grid, scale=scale.float())


def output_error(change: Tensor, gram: Tensor) -> float:
    """Squared error of the layer's output over the data of ``gram``, in the output's units squared, for a change of its weight."""
    rows = change.detach().double().reshape(len(gram), -1, gram.shape[-1])
    return float((rows @ gram * rows).sum())


class _Layer:
    """A weight as rows ``[groups, channels per group, inputs]`` with its steps, bounds (in steps from zero) and Gram matrices."""

    def __init__(self, weight: Tensor, grid: Grid, gram: Tensor) -> None:
        if grid.scheme.axis not in (None, 0):
            raise ValueError(f"channels are along dimension 0 where rounding looks at outputs, got {grid.scheme}; use nearest")
        self.shape, self.grid, self.gram = weight.shape, grid, gram
        self.values = self.rows(weight.detach().double())
        self.scale, self.zero = (
            self.rows(spread(t.double(), grid.scheme, weight.shape).expand(weight.shape)) for t in (grid.scale, grid.zero_point)
        )
        self.low, self.high = grid.scheme.qmin - self.zero, grid.scheme.qmax - self.zero

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(len(self.gram), -1, self.gram.shape[-1])

    def levels(self, steps: Tensor) -> Tensor:
        return (steps + self.zero).reshape(self.shape).to(self.grid.scheme.dtype)

    def error(self, steps: Tensor) -> Tensor:
        """Output error of every row, ``[groups, channels per group, 1]``."""
        change = steps * self.scale - self.values
        return (change @ self.gram * change).sum(-1, keepdim=True)

    def compensated(self) -> Tensor:
        """Steps from zero, an input's error made up for by the inputs after it, in blocks."""
        order = self.gram.diagonal(dim1=1, dim2=2).argsort(descending=True)
        values, scale, low, high = (_taken(t, order) for t in (self.values, self.scale, self.low, self.high))
        factor = _inverse_factor(self.gram.gather(1, order[:, :, None].expand_as(self.gram)).gather(2, order[:, None].expand_as(self.gram)))
        steps = torch.empty_like(values)
        for start in range(0, values.shape[-1], BLOCK):
            end = min(start + BLOCK, values.shape[-1])
            errors = []
            for i in range(start, end):
                steps[..., i] = (values[..., i] / scale[..., i]).round().clamp(low[..., i], high[..., i])
                errors.append((values[..., i] - steps[..., i] * scale[..., i]) / factor[:, None, i, i])
                values[..., i:end] -= errors[-1][..., None] * factor[:, None, i, i:end]
            values[..., end:] -= torch.stack(errors, -1) @ factor[:, start:end, end:]
        return torch.empty_like(steps).scatter(-1, order[:, None].expand_as(steps), steps)

    def descended(self, steps: Tensor) -> Tensor:
        """Steps from zero, each the best one given those of the other inputs, or as near to that as ``SWEEPS`` rounds come."""
        steps = steps.clone()
        slope = (steps * self.scale - self.values) @ self.gram  # half the gradient of the error
        diagonal = self.gram.diagonal(dim1=1, dim2=2)[:, None]
        for _ in range(SWEEPS):
            before = steps.clone()
            for i in range(steps.shape[-1]):
                old, scale = steps[..., i].clone(), self.scale[..., i]
                best = (old - slope[..., i] / (diagonal[..., i] * scale)).round().clamp(self.low[..., i], self.high[..., i])
                steps[..., i] = best
                slope += ((best - old) * scale)[..., None] * self.gram[:, None, i]
            if torch.equal(steps, before):
                break
        return steps


def _taken(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(-1, order[:, None].expand_as(x))


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with UᵀU the inverse: row i holds what an error at input i asks of the inputs after it."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)


def _damped(gram: Tensor, weight: Tensor, damping: float) -> Tensor:
    inputs = weight[0].numel()
    if gram.dim() != 3 or gram.shape[1:] != (inputs, inputs) or weight.shape[0] % len(gram):
        raise ValueError(f"a weight {tuple(weight.shape)} goes with Gram matrices [groups, {inputs}, {inputs}], got {tuple(gram.shape)}")
    if not bool(gram.isfinite().all()) or damping <= 0:
        raise ValueError(f"Gram matrices are finite and damping is positive, got damping {damping}; check the calibration data")
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    level = torch.where(level > 0, level, 1.0)  # a group that never sees anything rounds to the nearest
    return gram.double() + damping * level[:, None, None] * torch.eye(inputs, dtype=torch.float64)


def _pair(sizes: Sizes) -> tuple[int, int]:
    return (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[-1])


def _last(sizes: Sizes) -> int:
    return sizes if isinstance(sizes, int) else sizes[-1]
