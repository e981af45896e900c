"""The figures that were asked for of curvature beside those measured, from the records of ``benchmarks.curvature``.

Times are ratios within a round, whose modes take turns on the same images: the middle one, the least and the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from benchmarks.records import Record

LEVEL = "0.95"
ENOUGH = 0.97
Line = tuple[str, str, str]


def newest(records: Sequence[Record]) -> list[Record]:
    """Cells of each mode and depth measured with the newest code it was measured with, and whatever is no cell."""
    last = {(r["depth"], r["mode"]): r.get("code") for r in records if "round" in r}
    return [r for r in records if "round" not in r or r.get("code") == last[r["depth"], r["mode"]]]


def probe(record: Record) -> float:
    """CPU seconds of one probe after the first, or of all there is."""
    return median(record["steps"][1:] or record["steps"]) / record.get("probes", 1)


def required(records: Sequence[Record]) -> None:
    """Print each figure that was asked for beside the one that was measured."""
    print("\n| figure | required | measured |\n|---|---|---|")
    records = newest(records)
    for depth in sorted({r["depth"] for r in records}):
        mine = [r for r in records if r["depth"] == depth]
        for kind in (_ranked, _ratios, _population, _half, _equality, _processes):
            for what, limit, found in kind(mine):
                print(f"| ResNet-{depth}: {what} | {limit} | {found} |")


def _cells(records: Sequence[Record], mode: str) -> dict[int, Record]:
    return {r["round"]: r for r in records if r["mode"] == mode and "round" in r}


def _against(records: Sequence[Record], one: str, other: str, value: Callable[[Record], float]) -> list[float]:
    """``value`` of mode ``one`` over that of ``other``, by round."""
    a, b = _cells(records, one), _cells(records, other)
    return [value(a[n]) / value(b[n]) for n in sorted(a.keys() & b.keys())]


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """The middle value, and the least and the largest."""
    middle = format(median(values), form) + unit
    return f"{middle} ({format(min(values), form)} to {format(max(values), form)})" if len(values) > 1 else middle


def _ranked(records: Sequence[Record]) -> Iterator[Line]:
    needed = [r["needed"][LEVEL] for r in records if r["mode"] == "hap_extrapolated"]
    for mode in ("exact", "exact_99", "pairs"):
        times = [median(needed) * t for t in _against(records, "hap", mode, probe)] if needed else []
        if times:
            least = min(r["same"] for r in _cells(records, mode).values())
            what = f"CPU time to ρ {LEVEL} on the same images, HAP against `{mode}`"
            yield what, "≥ 1,000×", f"{spread(times, ',.0f', '×')}, at ρ ≥ {least:.3f}"


def _ratios(records: Sequence[Record]) -> Iterator[Line]:
    asked = (
        ("exact trace, in HAP's probes", "≤ 5", "exact", "hap"),
        ("exact trace, curvlinops' exact diagonal against ours", "≥ 2.5×", "curvlinops_exact", "exact"),
        ("a Hessian product, ours against PyHessian's", "≤ 1", "hessian", "pyhessian"),
    )
    for what, limit, one, other in asked:
        if times := _against(records, one, other, probe):
            yield what, limit, spread(times, ".2f")
    for mode in ("exact", "pairs"):
        if peaks := _against(records, mode, "hap", lambda r: r["peak"]):
            yield f"peak memory above idle, `{mode}` against HAP", "≤ -70 %", spread([100 * (p - 1) for p in peaks], "+.0f", " %")


def _population(records: Sequence[Record]) -> Iterator[Line]:
    for mode in sorted({r["mode"] for r in records if r["mode"].startswith("population_")}):
        rows = _cells(records, mode).values()
        ranks = [r["population"] for r in rows if "population" in r]
        if ranks:
            found = f"{spread(ranks, '.3f')}; {spread([probe(r) for r in rows], '.2f')}"
            yield f"`{mode}`: ranking of the population; CPU s", f"ρ ≥ {ENOUGH}; ≤ 4", found


def _half(records: Sequence[Record]) -> Iterator[Line]:
    for mode in ("exact", "hessian"):
        if times := _against(records, mode, f"{mode}_bfloat16", probe):
            yield f"`{mode}`, full precision against bfloat16: time", "≥ 1.5×", spread(times, ".2f", "×")
    if rows := _cells(records, "exact_bfloat16").values():
        yield "`exact_bfloat16`: ranking of the same images", "ρ ≥ 0.99", spread([r["same"] for r in rows if "same" in r], ".4f")


def _equality(records: Sequence[Record]) -> Iterator[Line]:
    for r in (r for r in records if r["mode"] == "equality"):
        yield "unit-vector products of the Hessian, float64: relative difference", "≤ 1e-10", f"{max(r['differences'].values()):.0e}"


def _processes(records: Sequence[Record]) -> Iterator[Line]:
    rows = [r for r in records if r["mode"] == "processes"]
    if rows:
        times = spread([r["one"]["wall"] / r["two"]["wall"] for r in rows], ".2f", "×")
        yield "two processes against one: wall clock; difference", "≥ 1.7×; 0", f"{times}; {max(r['difference'] for r in rows):.0e}"
