"""Pictures with one row per thing: groups in network order, costs, stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.ticker import MaxNLocator

from ..plan import Plan, kept, lost
from ..structure import Group
from . import numerals
from .canvas import FROZEN, GONE, INK, KEPT, LINE, LOST, MUTED, WIDE, rows, style, svg
from .data import Report, in_loss
from .scales import fit

MANY = 6000
"""Channels beyond which they are drawn as pixels, without error bars: browsers are slow with that many paths."""
GOLDEN = 0.6180339887
Row = tuple[int, Group]


def widths(report: Report) -> str:
    """Channels of every group in network order: what stays, what goes, what could not be cut."""
    groups = report.plan.structure.groups
    full = np.array([g.size for g in groups])
    left = np.array([len(kept(report.plan, g)) for g in groups])
    longest = max((g.size for g in report.plan.structure.free), default=int(full.max(initial=1)))
    limit = longest if full.max(initial=1) > 4 * longest else int(full.max(initial=1))
    with style():
        figure, ax = rows([g.name for g in groups])
        ax.barh(range(len(groups)), full, height=0.72, color=GONE)
        ax.barh(range(len(groups)), left, height=0.72, color=[FROZEN if g.frozen else KEPT for g in groups])
        for n, (a, b) in enumerate(zip(full, left, strict=True)):
            if len(groups) <= 90:
                _beside(ax, min(a, limit), n, f"{b}" if a == b else f"{a} → {b}", color=MUTED, fontsize=7.5)
        ax.set_xlim(0, 1.28 * limit)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.set_xlabel("channels" if limit == full.max(initial=1) else "channels (longer bars run off the edge)")
    return svg(figure, "widths", "Channels of every group before and after")


def scores(report: Report) -> str:
    """Every channel's score with its error bar, in the rows of :func:`widths`, and each group's threshold where there is one."""
    groups = report.plan.structure.groups
    scored = [(n, g) for n, g in enumerate(groups) if g.name in report.scores.values]
    with style():
        figure, ax = rows([g.name for g in groups])
        low, _ = fit(ax, "x", np.concatenate([np.zeros(0), *(report.scores.values[g.name] for _, g in scored)]))
        for chosen, colour in ((kept, KEPT), (lost, LOST)):
            _dots(ax, report, scored, chosen, colour, low)
        for n, group in scored:
            if (threshold := _threshold(report, group)) is not None:
                ax.plot([threshold, threshold], [n - 0.45, n + 0.45], color=INK, linewidth=1.1, solid_capstyle="butt")
        ax.set_xlabel("predicted rise of the loss, each channel alone" if in_loss(report) else "score (ranks only)")
    return svg(figure, "scores", "Scores of all channels, kept and cut")


def channels(report: Report) -> str:
    """Every channel as a cell in its own place: the higher its score, the stronger its colour; hollow where it was cut."""
    groups = [g for g in report.plan.structure.groups if g.name in report.scores.values]
    with style():
        figure, ax = rows([g.name for g in groups], width=WIDE, bottom=8)
        (_pixels if _are_many(groups) else _squares)(ax, report.plan, groups, _ranks(report, groups))
        ax.set_xlim(0, max([48, *(g.size for g in groups)]))  # so that few channels are cells, not planks
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_xticks([])
        ax.spines["bottom"].set_visible(False)
    return svg(figure, "channels", "Map of all channels")


def _squares(ax: Axes, plan: Plan, groups: Sequence[Group], ranks: Sequence[np.ndarray]) -> None:
    for n, group in enumerate(groups):
        stay, go = kept(plan, group), lost(plan, group)
        colours = [(*_rgb(KEPT), 0.3 + 0.7 * r) for r in ranks[n][stay]]
        ax.add_collection(PolyCollection(_cells(stay, n), facecolors=colours, linewidths=0), autolim=False)
        ax.add_collection(PolyCollection(_cells(go, n), facecolors="none", edgecolors=LOST, linewidths=0.6), autolim=False)


def _pixels(ax: Axes, plan: Plan, groups: Sequence[Group], ranks: Sequence[np.ndarray]) -> None:
    image = np.zeros((len(groups), max(g.size for g in groups), 4))
    for n, group in enumerate(groups):
        stay, go = kept(plan, group), lost(plan, group)
        image[n, stay, :3], image[n, stay, 3] = _rgb(KEPT), 0.3 + 0.7 * ranks[n][stay]
        image[n, go] = (*_rgb(LOST), 0.3)
    ax.imshow(image, interpolation="none", aspect="auto", extent=(0, image.shape[1], len(groups) - 0.5, -0.5))


def ratios(report: Report) -> str:
    """What is left of parameters, bytes, multiply-accumulates and latency, as ratios to the original."""
    a, b = report.after, report.before
    costs = (("parameters", a.params, b.params), ("bytes", a.bytes, b.bytes), ("multiply-accumulates", a.macs, b.macs))
    bars = [(name, *(after / before,) * 3) for name, after, before in costs if before]
    bars += [(f"latency, batch {t.batch}", t.ratio.low, t.ratio.median, t.ratio.high) for t in report.latency]
    with style():
        figure, ax = rows([name for name, *_ in bars], row=25)
        ax.barh(range(len(bars)), [1] * len(bars), height=0.6, color=GONE)
        ax.barh(range(len(bars)), [middle for _, _, middle, _ in bars], height=0.6, color=KEPT)
        for n, (_, low, middle, high) in enumerate(bars):
            if low < high:
                ax.errorbar(middle, n, xerr=[[middle - low], [high - middle]], color=INK, linewidth=1.1, capsize=2.5)
            _beside(ax, max(high, 1.0), n, numerals.times(middle), weight="bold")
        ax.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
        ax.set_xlim(0, 1.2 * max([1.0, *(high for *_, high in bars)]))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel("ratio to the original")
    return svg(figure, "ratios", "Costs after, as ratios to the original")


def metric(report: Report, name: str) -> str:
    """One metric through the stages: on the validation split, and on the test split at those stages that it was measured."""
    stages = list(dict.fromkeys([*report.metrics, *report.test]))
    splits = [[split.get(s, {}).get(name, np.nan) for s in stages] for split in (report.metrics, report.test)]
    seen = np.array([v for v in (*splits[0], *splits[1]) if np.isfinite(v)])
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    room = (high - low) or abs(high) or 1.0
    with style():
        figure, ax = rows(stages, row=25)
        ax.set_xlim(low - 0.1 * room, high + 0.55 * room)
        ax.hlines(range(len(stages)), low - 0.1 * room, np.nan_to_num(splits[0], nan=low), color=LINE, linewidth=1.2)
        ax.plot(splits[0], range(len(stages)), "o", color=KEPT, markersize=6.5)
        ax.plot(splits[1], range(len(stages)), "D", markerfacecolor="none", markeredgecolor=LOST, markersize=5.5, markeredgewidth=1.3)
        for n, (validation, test) in enumerate(zip(*splits, strict=True)):
            end = float(np.nanmax([validation, test, low]))
            _beside(ax, end, n, numerals.metric(validation) if stages[n] in report.metrics else "", weight="bold", gap=9)
            _beside(ax, end, n, numerals.metric(test) if stages[n] in report.test else "", color=LOST, gap=48)
        ax.grid(visible=False)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel(name)
    return svg(figure, "metric", f"{name} through the stages")


def _beside(ax: Axes, x: float, y: float, text: str, *, gap: float = 4, **look: object) -> None:
    ax.annotate(text, (x, y), (gap, 0), textcoords="offset points", va="center_baseline", **look)  # type: ignore[arg-type]


def _dots(ax: Axes, report: Report, scored: Sequence[Row], chosen: Callable[[Plan, Group], np.ndarray], colour: str, low: float) -> None:
    picked = [(n, g.name, chosen(report.plan, g)) for n, g in scored]
    x = np.concatenate([np.zeros(0), *(report.scores.values[name][c] for _, name, c in picked)])
    error = np.concatenate([np.zeros(0), *(report.scores.stderr[name][c] for _, name, c in picked)])
    y = np.concatenate([np.zeros(0), *(n + 0.6 * (c * GOLDEN % 1 - 0.5) for n, _, c in picked)])  # spread within the row
    many = _are_many([g for _, g in scored])
    barred = (error > 0) & (not many)
    ax.hlines(y[barred], np.maximum(x - error, low)[barred], (x + error)[barred], color=colour, linewidth=0.6, alpha=0.4)
    ax.plot(x, y, "o", color=colour, markersize=1.2 if many else 2.4, markeredgewidth=0, alpha=0.85, rasterized=many)


def _threshold(report: Report, group: Group) -> float | None:
    """Between the highest score that was cut and the lowest that was kept, if the first is the lower one."""
    values = report.scores.values[group.name]
    stay, go = values[kept(report.plan, group)], values[lost(report.plan, group)]
    return float(go.max() + stay.min()) / 2 if len(go) and go.max() <= stay.min() else None


def _are_many(groups: Sequence[Group]) -> bool:
    return sum(g.size for g in groups) > MANY


def _ranks(report: Report, groups: Sequence[Group]) -> list[np.ndarray]:
    """Rank of every channel's score among all channels, from 0 to 1."""
    values = np.concatenate([np.zeros(0), *(report.scores.values[g.name] for g in groups)])
    rank: np.ndarray = np.argsort(np.argsort(values)) / max(1, len(values) - 1)
    return np.split(rank, np.cumsum([g.size for g in groups])[:-1]) if groups else []


def _cells(columns: np.ndarray, row: int) -> list[np.ndarray]:
    corners = np.array([(0.12, -0.36), (0.88, -0.36), (0.88, 0.36), (0.12, 0.36)])
    return [corners + np.array([column, row]) for column in columns]


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
