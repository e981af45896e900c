"""Axes that fit what is drawn on them: linear where values are close, in decades where they are not."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from . import numerals

CLOSE = 20
"""Largest over small values (the 5 % quantile) up to which an axis is linear."""
TICKS = 5


def fit(ax: Axes, which: str, values: np.ndarray) -> tuple[float, float]:
    """Scale the ``x`` or ``y`` axis to ``values`` and return its limits.

    Values far apart get a logarithmic axis; one that is linear around zero if some are zero, negative or all but zero.
    """
    v = values[np.isfinite(values)]
    v = v if len(v) else np.zeros(1)
    sizes = np.abs(v[v != 0])
    small = float(np.quantile(sizes, 0.05, method="lower")) if len(sizes) else 0.0
    if not len(sizes) or sizes.max() < CLOSE * small:
        limits, ticks = _linear(v), None
    elif 0 < v.max() < 1e6 * v.min():
        limits = float(v.min()) / 1.6, float(v.max()) * 1.6
        powers = _powers(*limits, TICKS)
        ticks = powers if len(powers) > 1 else _rounded(*limits)
        ax.set(**{f"{which}scale": "log"})
    else:
        bend = 10.0 ** math.floor(math.log10(max(small, float(sizes.max()) * 1e-4)))
        limits, ticks = _around_zero(v, bend)
        getattr(ax, f"set_{which}scale")("symlog", linthresh=bend, linscale=0.5)
    ax.set(**{f"{which}lim": limits})
    _set_ticks(ax.xaxis if which == "x" else ax.yaxis, ticks)
    return limits


def _linear(v: np.ndarray) -> tuple[float, float]:
    room = 0.07 * float(np.ptp(v) or abs(v.max()) or 1.0)
    return float(v.min()) - room, float(v.max()) + room


def _around_zero(v: np.ndarray, bend: float) -> tuple[tuple[float, float], list[float]]:
    low = float(v.min()) * 1.6 if v.min() < -bend else -0.6 * bend
    high = float(v.max()) * 1.6 if v.max() > bend else 0.6 * bend
    above = _powers(bend, high, TICKS // 2) if v.max() > bend else []
    below = [-t for t in _powers(bend, -low, TICKS // 2)] if v.min() < -bend else []
    return (low, high), [*below, 0.0, *above]


def _powers(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` powers of ten in ``[low, high]``, evenly apart, the largest among them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / most))
    return [10.0**e for e in range(last, first - 1, -step)][::-1]


def _rounded(low: float, high: float) -> list[float]:
    """One, two and five times powers of ten in ``[low, high]``."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [t for e in exponents for t in (10.0**e, 2 * 10.0**e, 5 * 10.0**e) if low <= t <= high]


def _set_ticks(axis: Axis, ticks: list[float] | None) -> None:
    axis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(TICKS - 1))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: numerals.tick(value)))
