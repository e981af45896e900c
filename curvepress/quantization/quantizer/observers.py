"""What activations were seen to be, batch by batch, in constant memory and without chance."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from .ranges import Histogram

REACH = 3 * 2730 + 1
"""Bins on either side of zero: whole triples around every third.  Widths are powers of 3, so at least a third of one side is used."""
UNIT = math.sqrt(2)
"""Times that, so that no number that is likely to occur lies halfway between two bins, where rounding would tell how a stream was cut."""


class Observer:
    """A histogram that grows with what it sees; neither order nor batch size matter to the result."""

    def __init__(self, name: str = "activation") -> None:
        self.name = name
        self._seen: Histogram | None = None

    def observe(self, x: Tensor) -> None:
        """Count the elements of ``x``.

        Raises:
            ValueError: naming the activation, if ``x`` holds NaN or infinities.
        """
        new = observed(x, name=self.name)
        self._seen = new if self._seen is None else merged(self._seen, new)

    def histogram(self) -> Histogram:
        """What was seen so far.

        Raises:
            ValueError: naming the activation, if nothing was seen, or never more than one value.
        """
        if self._seen is None:
            raise ValueError(f"{self.name} was never seen; calibrate on at least one batch that reaches it, or leave it in float")
        if self._seen.low == self._seen.high:
            raise ValueError(f"{self.name} was {self._seen.low:g} throughout; calibrate on data that changes it, or leave it in float")
        return self._seen


def observed(x: Tensor, *, name: str = "activation") -> Histogram:
    """The histogram of one tensor, on the finest width that holds it.

    Raises:
        ValueError: naming the activation, if ``x`` is empty or holds NaN or infinities.
    """
    if not x.numel():
        raise ValueError(f"{name} is empty; calibrate on whole batches")
    low, high = (float(v) for v in x.detach().aminmax())
    if not math.isfinite(low + high):
        raise ValueError(f"{name} holds NaN or infinities; check the calibration data, or leave it in float")
    width = _width(max(-low, high))
    at = (x.detach().double().flatten() / width).round_().long().add_(REACH)
    return Histogram(torch.bincount(at, minlength=2 * REACH + 1), width, low, high)


def merged(*parts: Histogram) -> Histogram:
    """The histogram of everything that the parts have counted, exact: their widths are powers of 3 on one lattice."""
    width = max(p.width for p in parts)
    counts = reduce(torch.add, (_widened(p, width) for p in parts))
    return Histogram(counts, width, min(p.low for p in parts), max(p.high for p in parts))


def _width(most: float) -> float:
    """The finest width whose bins reach as far."""
    exponent = math.floor(math.log(max(most, 1e-30) / UNIT / REACH, 3)) - 1
    while round(most / (UNIT * 3.0**exponent)) > REACH:
        exponent += 1
    return UNIT * 3.0**exponent


def _widened(part: Histogram, width: float) -> Tensor:
    steps = round(math.log(width / part.width, 3))
    counts = part.counts
    for _ in range(steps):  # the bins 3j - 1, 3j, 3j + 1 are the bin j
        sums = counts.reshape(-1, 3).sum(1)
        counts = torch.nn.functional.pad(sums, ((len(counts) - len(sums)) // 2,) * 2)
    return counts
