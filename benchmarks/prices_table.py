"""Tables and picture of :mod:`benchmarks.prices`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks import prices_channels, prices_kinds
from benchmarks.prices_networks import KINDS, NETWORKS, rows
from curvepress.curvature import spearman

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
"""Predicted and measured rises by price."""
LEAST = 3
"""Decisions or plans without which nothing is printed."""
DEFAULTS = {
    ("channels", "before"): ("mask_curvature",),
    ("channels", "after"): ("reconstruction",),
    ("bits", "before"): ("direction",),
    ("activations", "before"): ("trace",),
    ("ranks", "before"): ("direction",),
    ("ranks", "after"): ("direction",),
}
"""What `compress` takes, in bold."""
SHOWN = {
    "channels": ("hessian_trace", "mask_curvature", "mask_curvature, T=4", "reconstruction", "reconstruction, T=4", "joint_rise"),
    **dict.fromkeys(KINDS[1:], ("relative error", "trace", "trace, T=4", "direction", "direction, T=4", "joint_rise")),
}
"""Prices in the summary."""
DRAWN = {
    "channels": {"before": ("mask_curvature", "mask_curvature, T=4"), "after": ("reconstruction", "reconstruction, T=4")},
    "bits": {"before": ("trace", "direction", "direction, T=4")},
    "activations": {"before": ("trace", "trace, T=4")},
    "ranks": {"before": ("trace", "direction", "direction, T=4")},
}


def pairs(network: str, kind: str, what: str, when: str) -> Pairs:
    """Predicted and measured rises of single decisions or plans of a kind; empty where too few are known."""
    found = prices_channels.pairs(network, what, when) if kind == "channels" else prices_kinds.pairs(network, kind, what, when)
    return {n: both for n, both in found.items() if len(both[1]) >= LEAST}


def calibration(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation, the slope of log predicted over log measured, and the median of predicted over measured.

    The last two are over the rises and predictions that are positive.
    """
    both = (predicted > 0) & (truth > 0)
    x, y = np.log(truth[both]), np.log(predicted[both])
    slope = float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else float("nan")
    return spearman(predicted, truth), slope, float(np.exp(np.median(y - x)))


def cells(price: str, both: tuple[np.ndarray, np.ndarray]) -> list[str]:
    """Rank correlation, slope and ratio; those that rank only have no more than the first."""
    rank, slope, ratio = calibration(*both)
    loss = price not in ("magnitude", "relative error")
    return [f"{rank:.2f}", f"{slope:.2f}" if loss else "–", f"{ratio:.2g}" if loss else "–"]


def table(names: tuple[str, ...]) -> None:
    """Print the tables of these networks in Markdown."""
    for name in names:
        for what, of in (("single", "single channels"), ("plan", "plans")):
            if len(rows(name, what, "channels")) >= LEAST:
                print(f"\n**{name}, {len(rows(name, what, 'channels'))} {of}**\n")
                _print(name, what)


def _print(network: str, what: str) -> None:
    print("| price | CPU s | before repair: rank correlation | slope | predicted / measured | after: rank correlation | slope | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    spent = {r["price"]: f"{r['cpu_seconds']:.0f}" for r in rows(network, "scores", "channels")}
    before, after = (pairs(network, "channels", what, when) for when in ("before", "after"))
    for name in before:
        print(" | ".join([f"| {name}", spent.get(name, "–"), *cells(name, before[name]), *cells(name, after[name])]) + " |")


def summary() -> None:
    """Print one table of all networks and kinds of decisions in Markdown, the defaults in bold."""
    print(f"| decisions | price | {' | '.join(NETWORKS)} |\n|---|---|{'---|' * len(NETWORKS)}")
    for kind in KINDS:
        for what in ("single", "plan"):
            for when in ("before", "after"):
                found = [pairs(n, kind, what, when) for n in NETWORKS]
                for price in (p for p in SHOWN[kind] if any(p in f for f in found)):
                    _summarize(kind, what, when, price, found)


def _summarize(kind: str, what: str, when: str, price: str, found: list[Pairs]) -> None:
    default = price in DEFAULTS.get((kind, when), ())
    texts = [" / ".join(c for c in cells(price, f[price]) if c != "–") if price in f else "–" for f in found]
    bold = [f"**{t}**" if default and t != "–" else t for t in texts]
    of = f"{kind}, {what}s{', repaired' if (kind, when) == ('channels', 'after') else ', statistics read again' if when == 'after' else ''}"
    print(f"| {of} | {f'**{price}**' if default else price} | {' | '.join(bold)} |")


def plot(path: Path) -> None:
    """Draw predicted over measured rises: networks and kinds in rows, single decisions and plans beside each other."""
    import matplotlib.pyplot as plt

    drawable = [(n, k) for n in NETWORKS for k in KINDS if pairs(n, k, "single", "before")]
    figure, axes = plt.subplots(len(drawable), 2, figsize=(10, 3.2 * len(drawable)), squeeze=False)
    for row, (network, kind) in zip(axes, drawable, strict=True):
        for axis, what in zip(row, ("single", "plan"), strict=True):
            for when, names in DRAWN[kind].items():
                found = pairs(network, kind, what, when)
                for name in (n for n in names if n in found):
                    axis.loglog(found[name][1], found[name][0], ".", label=f"{name}{' (repaired)' if when == 'after' else ''}", alpha=0.6)
            axis.axline((1e-2, 1e-2), (1, 1), color="grey", linewidth=0.8)
            axis.set(xlabel="measured rise of the loss", ylabel="predicted", title=f"{network}, {kind}, {what}s")
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=60)
