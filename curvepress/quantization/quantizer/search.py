"""The scale and zero point with the least squared error, for many rows of numbers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .grids import Scheme

STEP, COARSE, POLISH = 0.93, 64, 12
FINE, FINEST, MANY = 12, 120, 512  # rows of few elements have many narrow minima; more steps are cheap there
CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class Rows:
    """Numbers that share a scale, ``values [rows, elements]``, with weights of the same shape (None: all one)."""

    values: Tensor
    weights: Tensor | None
    scale_shape: torch.Size

    def ends(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of every row, ``[rows]``."""
        return self.values.amin(1), self.values.amax(1)


class Fit(NamedTuple):
    """One candidate for every row: ``[rows, 1]`` each."""

    scale: Tensor
    zero: Tensor
    error: Tensor


def span(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the finest grid from ``low`` to ``high`` (and zero); they broadcast, and so does the result."""
    low, high = low.clamp_max(0).double(), high.clamp_min(0).double()
    if scheme.symmetric:
        scale = torch.maximum(high / scheme.qmax, low / scheme.qmin)
        return scale, torch.zeros_like(scale)
    scale = (high - low) / scheme.qmax
    return scale, (-low / scale).nan_to_num(0.0).round().clamp(0, scheme.qmax)


def least_error(rows: Rows, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point ``[rows]`` (float64) with the least (weighted) squared error that the search finds.

    Ranges shrink from minimum and maximum to a hundredth in steps of 7 %, first together, then each end alone, then in finer steps;
    last, scale and rounding are improved in turn, the scale in closed form, until nothing changes.  Among what was tried the best is kept,
    so the error is never larger than that of minimum and maximum.
    """
    size = max(1, CHUNK // rows.values.shape[1])
    parts = [_least(rows.values[k : k + size], None if rows.weights is None else rows.weights[k : k + size], scheme)
             for k in range(0, len(rows.values), size)]  # fmt: skip
    return torch.cat([p.scale for p in parts]).squeeze(1), torch.cat([p.zero for p in parts]).squeeze(1)


def _least(x: Tensor, w: Tensor | None, scheme: Scheme) -> Fit:
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    coarse = [STEP**k for k in range(COARSE)]
    count = min(max(FINE * MANY // x.shape[1], FINE), FINEST)
    fine = [STEP ** (k / count) for k in range(-count, count + 1) if k]
    best = _tried(x, w, scheme, None, low, high, [(r, r) for r in coarse])
    if not scheme.symmetric:
        for ratios in ([(r, 1.0) for r in coarse], [(1.0, r) for r in coarse]) * 2:
            best = _tried(x, w, scheme, best, *_ends(best, scheme), ratios)
    best = _tried(x, w, scheme, best, *_ends(best, scheme), [(r, r) for r in fine])
    return _polished(x, w, scheme, best)


def _ends(fit: Fit, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The outermost values on the grid; for a symmetric one the part that both sides have."""
    low = -scheme.qmax if scheme.symmetric else -fit.zero
    return low * fit.scale, (scheme.qmax - fit.zero) * fit.scale


def _tried(
    x: Tensor, w: Tensor | None, scheme: Scheme, best: Fit | None, low: Tensor, high: Tensor, ratios: list[tuple[float, float]]
) -> Fit:
    for below, above in ratios:
        best = _better(best, _fit(x, w, scheme, *span(low * below, high * above, scheme)))
    assert best is not None
    return best


def _fit(x: Tensor, w: Tensor | None, scheme: Scheme, scale: Tensor, zero: Tensor) -> Fit:
    steps = _steps(x, scheme, scale, zero)
    square = steps.mul_(scale.to(x.dtype)).sub_(x).square_()
    return Fit(scale, zero, (square if w is None else square.mul_(w)).sum(1, keepdim=True, dtype=torch.float64))


def _steps(x: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor) -> Tensor:
    """Whole steps from zero; rows without a range stay at zero."""
    by = torch.where(scale > 0, scale, 1.0).to(x.dtype)
    return (x / by).round_().clamp_((scheme.qmin - zero).to(x.dtype), (scheme.qmax - zero).to(x.dtype))


def _better(old: Fit | None, new: Fit) -> Fit:
    if old is None:
        return new
    wins = new.error < old.error
    return Fit(*(torch.where(wins, n, o) for n, o in zip(new, old, strict=True)))


def _polished(x: Tensor, w: Tensor | None, scheme: Scheme, best: Fit) -> Fit:
    for _ in range(POLISH):
        before = best.error
        for shift in (0,) if scheme.symmetric else (0, -1, 1):
            zero = (best.zero + shift).clamp(scheme.qmin, scheme.qmax)
            steps = _steps(x, scheme, best.scale, zero)
            weighted = steps if w is None else steps * w
            scale = (weighted * x).sum(1, keepdim=True, dtype=torch.float64) / (weighted * steps).sum(1, keepdim=True, dtype=torch.float64)
            best = _better(best, _fit(x, w, scheme, torch.where(scale > 0, scale, best.scale), zero))
        if bool((best.error == before).all()):
            break
    return best
