"""Pictures with curves: rise of the loss along the frontier, prediction against measurement, recovery."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import numerals
from .canvas import KEPT, LOST, MUTED, axes, style, svg
from .data import Point, Report
from .scales import fit

DASHED = (0, (3, 2))
LEGEND = 22
"""Points above a picture for its legend."""


def frontier(report: Report) -> str:
    """Rise of the loss against the parameters left: predicted with its standard error, and measured."""
    points = sorted(report.frontier, key=lambda p: p.params)
    predicted, measured = (
        np.array([np.nan if v is None else v for v in side]) for side in zip(*((p.predicted, p.measured) for p in points), strict=True)
    )
    error = np.array([p.stderr or 0.0 for p in points])
    params = np.array([p.params for p in points])
    with style():
        figure, ax = axes(245, top=LEGEND)
        low, _ = fit(ax, "y", np.concatenate([predicted, measured]))
        if np.isfinite(measured).any():
            ax.plot(params, measured, "-o", color=LOST, markersize=4.5, label="measured")
        if np.isfinite(predicted).any():
            ax.fill_between(params, np.maximum(predicted - error, low), predicted + error, color=KEPT, alpha=0.18, linewidth=0)
            ax.plot(params, predicted, "--s", color=KEPT, markersize=4, label="predicted, ± 1 standard error")
        ours = report.after.params / report.before.params
        ax.axvline(ours, color=MUTED, linewidth=0.9, linestyle=DASHED)
        ax.annotate("this plan", (ours, 0), (3, 4), xycoords=("data", "axes fraction"), textcoords="offset points", color=MUTED, fontsize=8)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda r, _: numerals.percent(r)))
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.set(xlabel="parameters left", ylabel="rise of the loss")
        _legend_above(ax)
    return svg(figure, "frontier", "Predicted and measured rise of the loss against the parameters left")


def calibration(report: Report) -> str:
    """Measured against predicted rise of the loss, and the line on which they are equal."""
    points = compared(report.frontier)
    x, y, error = (
        np.array(side, dtype=np.float64) for side in zip(*((p.predicted, p.measured, p.stderr or 0.0) for p in points), strict=True)
    )
    with style():
        figure, ax = axes(245, top=LEGEND)
        low, high = fit(ax, "x", np.concatenate([x, y]))
        fit(ax, "y", np.concatenate([x, y]))
        ax.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle=DASHED, label="equal")
        ax.hlines(y, np.maximum(x - error, low), np.minimum(x + error, high), color=KEPT, linewidth=1.1, alpha=0.55)
        ax.plot(x, y, "o", color=KEPT, markersize=5, label="plans of the frontier, ± 1 standard error")
        ax.set(xlabel="predicted rise of the loss", ylabel="measured rise of the loss")
        _legend_above(ax)
    return svg(figure, "calibration", "Measured against predicted rise of the loss")


def _legend_above(ax: Axes) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def losses(report: Report) -> str:
    """Training loss by epoch."""
    with style():
        figure, ax = _by_epoch([e.epoch for e in report.history], [e.loss for e in report.history])
        ax.set_ylabel("training loss")
    return svg(figure, "losses", "Training loss by epoch")


def recovery(report: Report) -> str:
    """The metric that counts by epoch, on the validation split, with the level of the original."""
    first = next(iter(report.metrics.values()))
    name = next(iter(first))
    epochs = [e.epoch for e in report.history]
    with style():
        figure, ax = _by_epoch(epochs, [e.metrics.get(name, np.nan) for e in report.history])
        ax.axhline(first[name], color=MUTED, linewidth=0.9, linestyle=DASHED)
        ax.annotate("original", (epochs[0], first[name]), (0, 3), textcoords="offset points", color=MUTED, fontsize=8)
        ax.margins(y=0.12)
        ax.set_ylabel(f"{name} (validation)")
    return svg(figure, "recovery", f"{name} by epoch")


def compared(points: Sequence[Point]) -> list[Point]:
    """The points that have both a predicted and a measured rise."""
    return [p for p in points if p.predicted is not None and p.measured is not None and np.isfinite([p.predicted, p.measured]).all()]


def _by_epoch(epochs: Sequence[int], values: Sequence[float]) -> tuple[Figure, Axes]:
    figure, ax = axes(190)
    ax.plot(epochs, values, "-o", color=KEPT, markersize=3.5 if len(epochs) < 40 else 0)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    return figure, ax
