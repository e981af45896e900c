"""The plots of the results page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import records
from benchmarks.reproduce_bits import WAYS as BITS
from benchmarks.reproduce_channels import SHOWN as CHANNELS

Rows = list[records.Record]
mpl.rcParams.update({"svg.hashsalt": "curvepress", "svg.fonttype": "none", "font.size": 9})


def channels(rows: Rows, path: Path) -> None:
    """Accuracy after the fine-tune by the share of the parameters that is left, a line for each way."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(4.4 * len(networks), 3.4), squeeze=False)
    for ax, network in zip(axes[0], networks, strict=True):
        for way in CHANNELS:
            points = sorted({r["left"] for r in rows if (r["network"], r["way"]) == (network, way)})
            values = [mean(r["accuracy"] for r in rows if (r["network"], r["way"], r["left"]) == (network, way, p)) for p in points]
            if points:
                ax.plot([100 * p for p in points], values, marker="o", markersize=3, linewidth=1, label=way)
        _finish(ax, network, "parameters left, %", "accuracy, fine-tuned, %")
    _save(figure, path)


def bits(rows: Rows, path: Path) -> None:
    """Accuracy after calibration by how many times fewer bytes the weights take, a line for each way."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    figure, axes = plt.subplots(1, len(networks), figsize=(4.4 * len(networks), 3.4), squeeze=False)
    for ax, network in zip(axes[0], networks, strict=True):
        for way in BITS:
            own = sorted((r["ratio"], r["accuracy"]) for r in rows if (r["network"], r["way"], r["eighths"]) == (network, way, 0))
            if own:
                ax.plot(*zip(*own, strict=True), marker="o", markersize=3, linewidth=1, label=way)
        _finish(ax, network, "times fewer bytes than float", "accuracy after calibration, %")
    _save(figure, path)


def _finish(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=6)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


PLOTS: Mapping[str, Callable[[Rows, Path], None]] = {"hap": channels, "hawq": bits}
"""By part of the page."""
