"""Records of :mod:`benchmarks.quantization` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]


def table(rows: Sequence[Record]) -> None:
    """Print accuracies, sizes and kernels of everything that was measured."""
    floats = {r["network"]: r["accuracy"] for r in rows if r.get("configuration") == "float"}
    heads = ("network", "bits", "how", "test accuracy", "drop", "same as simulation", "kernels", "packed bytes, smaller")
    show(heads, [_row(r, floats.get(r["network"], float("nan"))) for r in rows if "accuracy" in r])


def _row(r: Record, original: float) -> tuple[str, ...]:
    how = ", ".join(str(x) for x in (r["method"], r.get("rounding"), f"{r['epochs']} epochs" if "epochs" in r else None) if x)
    same = f"{r['same']:.2f} %" if "same" in r else "–"
    small = f"{r['packed_bytes']:,}, {r['float_weight_bytes'] / r['packed_bytes']:.1f}×" if "packed_bytes" in r else "–"
    accuracy = f"{r['accuracy']:.2f}", f"{original - r['accuracy']:+.2f}"
    return (r["network"], r["configuration"], how, *accuracy, same, r.get("kernels", "–"), small)


def show(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
