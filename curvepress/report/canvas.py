"""From a matplotlib figure to an SVG element that lives in a page: its colours are the page's, its text is text."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from . import numerals

WIDTH = 350
"""Points: a picture is drawn for a telephone or half a page, and grows little."""
WIDE = 760
"""Points: for a whole page."""

INK, MUTED, LINE = "#1b2530", "#66717e", "#dfe3e7"
KEPT, GONE, LOST, FROZEN = "#1f6f8b", "#d3e0e6", "#d1622b", "#b4bbc3"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", KEPT: "kept", GONE: "gone", LOST: "lost", FROZEN: "frozen"}
"""Each colour of the pictures and the name of the page's variable that stands in for it."""

STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "curvepress",
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for our pictures, put back afterwards."""
    with matplotlib.rc_context(STYLE):
        yield


def axes(
    height: float, *, width: float = WIDTH, left: float = 56, bottom: float = 36, top: float = 8, right: float = 12
) -> tuple[Figure, Axes]:
    """A figure of ``width`` and ``height`` points, with one set of axes; ``left``, ``bottom``, ``top`` and ``right`` are for labels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=200)
    return figure, figure.add_axes((left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height))


def rows(names: Sequence[str], *, width: float = WIDTH, row: float = 13.5, bottom: float = 36) -> tuple[Figure, Axes]:
    """Axes with a row of ``row`` points per name, the first on top; beyond sixty the rows get thinner and some names are left out."""
    row = row if len(names) <= 60 else max(6.0, 60 * row / len(names))
    labels = [numerals.shortened(n) for n in names]
    left = 12 + 4.8 * max((len(label) for label in labels), default=0)
    figure, ax = axes(len(names) * row + bottom + 8, width=width, left=left, bottom=bottom)
    ax.set_ylim(len(names) - 0.5, -0.5)
    every = math.ceil(9 / row)
    ax.set_yticks(range(0, len(names), every), labels[::every], color=INK, fontsize=8)
    ax.grid(visible=False, axis="y")
    ax.spines["left"].set_visible(False)
    return figure, ax


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element of class ``name``: colours and fonts are the page's, ``label`` is read to the blind."""
    buffer = io.BytesIO()
    canvas: Any = FigureCanvasSVG(figure)
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # the reader's fonts draw it, not ours
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    for pattern, instead in CLEANING:
        text = pattern.sub(instead, text)
    opening = f'<svg class="{escape(name)}" role="img" aria-label="{escape(label)}" \\1>'
    text = re.sub(r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", opening, text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return _own_identifiers(text, name)


def _own_identifiers(text: str, name: str) -> str:
    """Identifiers that are used get ``name`` in front, so that pictures share a page; the others go."""
    used = set(re.findall(r'(?:url\(|href=")#([^)"]*)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", text)


CLEANING = tuple(
    (re.compile(pattern, re.DOTALL), instead)
    for pattern, instead in (
        (r"^.*?(?=<svg )", ""),  # what a file of its own needs
        (r"<!--.*?-->\s*", ""),
        (r"<defs>\s*<style.*?</style>\s*</defs>\s*", ""),  # would hold for the whole page
        (r"xlink:href", "href"),
        (r" font-family: [^;\"]*;", ""),
        (r' transform="rotate\(-0 [^)]*\)"', ""),
        (r"\s*\n\s*", "\n"),
    )
)
