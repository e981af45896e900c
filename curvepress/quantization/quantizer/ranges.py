"""Scales and zero points from data: min-max, percentile, and the least squared error, plain or weighted by curvature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .grids import Grid, Scheme, fake_quantize
from .search import Rows, least_error, span

Method = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True, eq=False)
class Histogram:
    """What streams of activations are kept as: how many values were nearest to each multiple of ``width``.

    ``counts`` is int64 ``[2 * reach + 1]``, for the multiples from ``-reach`` to ``reach``; ``low`` and ``high`` are the exact
    minimum and maximum.
    """

    counts: Tensor
    width: float
    low: float
    high: float

    def points(self) -> tuple[Tensor, Tensor]:
        """The values that occur, rising, from exactly ``low`` to exactly ``high``, and how often; float64."""
        at = self.counts.nonzero().squeeze(1)
        values = (at - len(self.counts) // 2).double() * self.width
        values[0], values[-1] = self.low, self.high
        return values, self.counts[at].double()


def fit_grid(
    data: Tensor | Histogram,
    scheme: Scheme,
    *,
    method: Method = "mse",
    weights: Tensor | None = None,
    percentile: float = 99.99,
    name: str = "tensor",
) -> Grid:
    """The grid of a scheme that suits the data (``axis`` None for a histogram).

    ``minmax`` covers all values; ``percentile`` that many in a hundred of each channel, the rest split between both ends if not
    symmetric; ``mse`` has the least squared error.  ``weights`` (shape of the data, not negative), such as a diagonal of the Hessian,
    weigh each element's squared error: the curvature-weighted error; a channel whose weights are all zero counts as unweighted.
    Channels that are zero throughout get the largest scale of the others.

    Raises:
        ValueError: naming the tensor, if the data holds NaN or infinities or is zero throughout, or the weights do not fit.
    """
    rows = _rows_of(data, scheme, weights, name)
    if weights is not None and method != "mse":
        raise ValueError(f"weights go with method 'mse', got {method!r}")
    if method == "mse":
        scale, zero = least_error(rows, scheme)
    elif method == "minmax":
        scale, zero = span(*rows.ends(), scheme)
    elif method == "percentile":
        scale, zero = span(*_percentiles(rows, scheme, percentile), scheme)
    else:
        raise ValueError(f"methods are minmax, percentile and mse, got {method!r}")
    return _shaped(scale, zero, rows, scheme, name)


def squared_error(data: Tensor | Histogram, grid: Grid, *, weights: Tensor | None = None) -> float:
    """``‖Q(x) − x‖²``, the sum of squared errors over all elements; ``weights`` (shape of the data) weigh each.

    Multiplied by half a mean curvature this is the rise of the loss that HAWQ-V2 predicts (Dong et al. 2020, arXiv:1911.03852).
    """
    values, counts = (data, weights) if isinstance(data, Tensor) else data.points()
    square = (fake_quantize(values.detach(), grid) - values.detach()).double().square()
    return float((square if counts is None else square * counts).sum())


def by_rows(x: Tensor, scheme: Scheme) -> Tensor:
    """``[scales, elements]``: the elements that share a scale as one row, filled up with zeros; see :func:`from_rows`."""
    if scheme.axis is None:
        return x.reshape(1, -1)
    flat = x.movedim(scheme.axis, 0).reshape(x.shape[scheme.axis], -1)
    if scheme.group is None:
        return flat
    return torch.nn.functional.pad(flat, (0, -flat.shape[1] % scheme.group)).reshape(-1, scheme.group)


def from_rows(rows: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """The tensor of the given shape that :func:`by_rows` made into rows."""
    if scheme.axis is None:
        return rows.reshape(shape)
    moved = torch.Size([shape[scheme.axis], *(n for d, n in enumerate(shape) if d != scheme.axis % len(shape))])
    flat = rows.reshape(moved[0], -1)[:, : moved.numel() // moved[0]]
    return flat.reshape(moved).movedim(0, scheme.axis)


def _rows_of(data: Tensor | Histogram, scheme: Scheme, weights: Tensor | None, name: str) -> Rows:
    if isinstance(data, Histogram):
        if scheme.axis is not None or weights is not None:
            raise ValueError(f"{name}: a histogram has one scale and weights of its own; give the tensor, or a scheme with axis None")
        values, counts = data.points()
        return Rows(values[None], counts[None], scale_shape=torch.Size([]))
    x = data.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    _check_values(x, name)
    shape = [] if scheme.axis is None else [x.shape[scheme.axis]] if scheme.group is None else [x.shape[scheme.axis], -1]
    values = by_rows(x, scheme)
    return Rows(values, _row_weights(x, weights, scheme, name), torch.empty(len(values)).reshape(shape).shape)


def _check_values(x: Tensor, name: str) -> None:
    if not x.numel():
        raise ValueError(f"{name} is empty, so there is nothing to fit; leave it in float")
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} holds NaN or infinities ({bad} of {x.numel()} values); find where they come from, or leave it in float")
    if not bool(x.any()):
        raise ValueError(f"{name} is zero throughout and has no range; leave it in float, or calibrate on data that reaches it")


def _row_weights(x: Tensor, weights: Tensor | None, scheme: Scheme, name: str) -> Tensor | None:
    if weights is None and (scheme.group is None or by_rows(x, scheme).numel() == x.numel()):
        return None
    w = torch.ones_like(x) if weights is None else weights.detach().double()
    if w.shape != x.shape or not bool((w >= 0).all() & w.isfinite().all()):
        raise ValueError(f"the weights of {name} are finite, not negative and {tuple(x.shape)}; got {tuple(w.shape)}, least {w.min():.3g}")
    rows = by_rows(w, scheme)
    most = rows.amax(1, keepdim=True)
    return torch.where(most > 0, rows / most, by_rows(torch.ones_like(x), scheme)).to(x.dtype)


def _percentiles(rows: Rows, scheme: Scheme, percentile: float) -> tuple[Tensor, Tensor]:
    """Lower and upper end of every row, ``[rows]``."""
    if not 50 < percentile <= 100:
        raise ValueError(f"percentiles are above 50 and at most 100, got {percentile}")
    share = percentile / 100
    if scheme.symmetric:
        high = _quantile(replace(rows, values=rows.values.abs()), share)
        return -high, high
    return -_quantile(replace(rows, values=-rows.values), (1 + share) / 2), _quantile(rows, (1 + share) / 2)


def _quantile(rows: Rows, share: float) -> Tensor:
    """The least value of each row with at least that share of the weight at or below it."""
    values, order = rows.values.sort(1)
    weights = torch.ones_like(values, dtype=torch.float64) if rows.weights is None else rows.weights.double().gather(1, order)
    below = weights.cumsum(1)
    at = torch.searchsorted(below, below[:, -1:] * share * (1 - 1e-12)).clamp_max(values.shape[1] - 1)
    return values.gather(1, at).squeeze(1)


def _shaped(scale: Tensor, zero: Tensor, rows: Rows, scheme: Scheme, name: str) -> Grid:
    empty = ~(rows.values != 0).any(1)
    scale = torch.where(empty, scale.max(), scale).float()
    try:
        return Grid(scheme, scale.reshape(rows.scale_shape), zero.to(torch.int32).reshape(rows.scale_shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
