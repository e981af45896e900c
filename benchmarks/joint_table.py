"""The tables of the joint planner's figures, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks import records
from benchmarks.joint_planner import SHARES, SIZES
from benchmarks.networks import NETWORKS

BATCHES = 60
"""Of recovery in float, and as many quantized; the tables name other numbers."""


def table(rows: list[records.Record], methods: Sequence[str]) -> None:
    """Print the tables; plans come in the order of ``methods``."""
    for line in (*_accuracies(rows, methods), *_rates(rows), *_planner(rows)):
        print(line)


def _accuracies(rows: list[records.Record], methods: Sequence[str]) -> Iterator[str]:
    times = {r["onnx"]: r for r in rows if r.get("what") == "latency"}
    yield "| network | bytes | plan | test accuracy | bytes of the file | mean bits | parameters | G BOPs | latency, batch 1 | batch 64 |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    order = lambda r: ([*NETWORKS].index(r["network"]), r["batches"], -r["share"], methods.index(r["method"]))  # noqa: E731
    for r in sorted((r for r in rows if "method" in r), key=order):
        trained = "" if r["batches"] == BATCHES else f", {r['batches']} batches"
        head = f"| {r['network']}{trained} | {_share(r['share'])} | {r['method']} |"
        if "impossible" in r:
            yield f"{head} none so small | | | | | | |"
            continue
        bits = f"{r['mean_bits']:.2f}" if r["mean_bits"] else "32"
        taken = [f"{times[r['onnx']][f'batch {n}'][1]:.2f}" if r["onnx"] in times else "–" for n in (1, 64)]
        yield f"{head} {r['accuracy']:.2f} | {r['file']:,} | {bits} | {r['params']:,} | {r['bops'] / 1e9:.2f} | {' | '.join(taken)} |"


def _share(share: float) -> str:
    return "all" if share == 1 else f"1/{1 / share:.0f}"


def _rates(rows: list[records.Record]) -> Iterator[str]:
    for r in (r for r in rows if r.get("what") == "rates"):
        probes = "; ".join(f"{p['kind']} {p['predicted']:.3g} predicted, {p['measured']:.3g} measured" for p in r["probes"])
        rates = ", ".join(f"{k} {v:.3g}" for k, v in r["rates"].items())
        yield f"\nRates of exchange of {r['network']} after {r['batches']} batches: {rates} ({probes})."


def _planner(rows: list[records.Record]) -> Iterator[str]:
    yield "\n| groups | bytes | planner, CPU s | gap to exact, median | largest | exact, CPU s |\n|---|---|---|---|---|---|"
    for n in SIZES:
        for share in SHARES:
            own = [r for r in rows if r.get("what") == "planner" and (r["groups"], r["share"]) == (n, share)]
            if own:
                yield f"| {n:,} | {share:.0%} | {np.median([r['cpu_seconds'] for r in own]):.2f} | {' | '.join(_gaps(own))} |"


def _gaps(own: list[records.Record]) -> list[str]:
    gaps = [max(r["rise"] / r["bound"] - 1, 0.0) for r in own if r.get("bound")]
    if not gaps:
        return ["–"] * 3
    return [f"{np.median(gaps):.1%}", f"{max(gaps):.1%}", f"{np.median([r['exact_cpu_seconds'] for r in own]):.1f}"]
