"""The picture of a frontier: predicted, and where there is one measured, quality against bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.ticker import FuncFormatter

from . import numerals
from .canvas import KEPT, LOST, axes, style
from .scales import fit


def picture(points: Sequence[Mapping[str, Any]], original: Mapping[str, Any]) -> str:
    """An SVG file: predicted rise of the loss, with its standard error, over the share of bytes; where measured, also the first metric, and
    beside each point's number its latency over the original's."""
    share = np.array([p["cost"]["bytes"] / original["bytes"] for p in points])
    rise, error = (np.array([p["predicted"][k] for p in points]) for k in ("rise", "stderr"))
    measured = [(x, p["measured"]) for x, p in zip(share, points, strict=True) if p["measured"]]
    with style():
        figure, ax = axes(245, right=56 if measured else 12)
        fit(ax, "x", share)
        low, _ = fit(ax, "y", rise)
        ax.fill_between(share, np.maximum(rise - error, low), rise + error, color=KEPT, alpha=0.18, linewidth=0)
        ax.plot(share, rise, "--s", color=KEPT, markersize=4)
        for p, x, y in zip(points, share, rise, strict=True):
            times = f": {p['latency']['median']:.2f}x" if p["latency"] else ""
            ax.annotate(f"{p['number']}{times}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda r, _: numerals.percent(r)))
        ax.set(xlabel="bytes left", ylabel="predicted rise of the loss")
        if measured:
            name = next(iter(measured[0][1]))
            other = ax.twinx()
            other.plot([x for x, _ in measured], [m[name] for _, m in measured], "-o", color=LOST, markersize=4)
            other.set_ylabel(f"{name}, measured without training", color=LOST)
        buffer = io.BytesIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()
