"""The figures that were asked for of curvature beside those measured, from the records of ``benchmarks.curvature``.

Times are ratios within a round, whose modes take turns on the same images: the middle one, the least and the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    for depth in sorted({r["depth"] for r in records}):
        mine = [r for r in records if r["depth"] == depth]
        for kind in (_ranked, _ratios, _population, _half, _equality, _processes):
            for what, limit, found in kind(mine):
                print(f"| ResNet-{depth}: {what} | {limit} | {found} |")


def _cells(records: Sequence[Record], mode: str, code: str | None) -> dict[int, Record]:
    return {r["round"]: r for r in records if r["mode"] == mode and "round" in r and r.get("code") == code}


def _in_turns(records: Sequence[Record], *modes: str) -> tuple[list[tuple[Record, ...]], str]:
    """Cells of the same round and code, one of each mode, for the newest code they all were measured with; what to say of that code."""
    codes = list(dict.fromkeys(r.get("code") for r in reversed(records) if "round" in r))
    for code in codes:
        cells = [_cells(records, mode, code) for mode in modes]
        common = sorted(set.intersection(*map(set, cells)))
        if common:
            return [tuple(c[n] for c in cells) for n in common], "" if code == codes[0] else "; older code"
    return [], ""


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """The middle value, and the least and the largest."""
    middle = format(median(values), form) + unit
    return f"{middle} ({format(min(values), form)} to {format(max(values), form)})" if len(values) > 1 else middle


def _ranked(records: Sequence[Record]) -> Iterator[Line]:
    needed = [r["needed"][LEVEL] for r in records if r["mode"] == "hap_extrapolated"]
    for mode in ("exact", "exact_99", "pairs"):
        rounds, age = _in_turns(records, "hap", mode)
        if rounds and needed:
            times = [median(needed) * probe(hap) / probe(own) for hap, own in rounds]
            least = min(own["same"] for _, own in rounds)
            if least < float(LEVEL):
                continue
            what = f"CPU time to ρ {LEVEL} on the same images, HAP against `{mode}`"
            yield what, "≥ 1,000×", f"{spread(times, ',.0f', '×')}, at ρ ≥ {least:.3f}{age}"


def _ratios(records: Sequence[Record]) -> Iterator[Line]:
    asked = (
        ("exact trace, in HAP's probes", "≤ 5", "exact", "hap"),
        ("exact trace, curvlinops' exact diagonal against ours", "≥ 2.5×", "curvlinops_exact", "exact"),
        ("a Hessian product, ours against PyHessian's", "≤ 1", "hessian", "pyhessian"),
        ("`exact`, full precision against bfloat16: time", "≥ 1.5×", "exact", "exact_bfloat16"),
        ("`hessian`, full precision against bfloat16: time", "≥ 1.5×", "hessian", "hessian_bfloat16"),
    )
    for what, limit, one, other in asked:
        rounds, age = _in_turns(records, one, other)
        if rounds:
            yield what, limit, spread([probe(a) / probe(b) for a, b in rounds], ".2f") + age
    for mode in ("exact", "pairs"):
        rounds, age = _in_turns(records, mode, "hap")
        if rounds:
            less = spread([100 * (own["peak"] / hap["peak"] - 1) for own, hap in rounds], "+.0f", " %")
            yield f"peak memory above idle, `{mode}` against HAP", "≤ -70 %", less + age


def _population(records: Sequence[Record]) -> Iterator[Line]:
    for mode in sorted({r["mode"] for r in records if r["mode"].startswith("population_")}):
        rounds, age = _in_turns(records, mode)
        ranks = [r["population"] for (r,) in rounds if "population" in r]
        if ranks:
            found = f"{spread(ranks, '.3f')}; {spread([probe(r) for (r,) in rounds], '.2f')}{age}"
            yield f"`{mode}`: ranking of the population; CPU s", f"ρ ≥ {ENOUGH}; ≤ 4", found


def _half(records: Sequence[Record]) -> Iterator[Line]:
    rounds, age = _in_turns(records, "exact_bfloat16")
    if ranks := [r["same"] for (r,) in rounds if "same" in r]:
        yield "`exact_bfloat16`: ranking of the same images", "ρ ≥ 0.99", spread(ranks, ".4f") + age


def _equality(records: Sequence[Record]) -> Iterator[Line]:
    for r in (r for r in records if r["mode"] == "equality"):
        yield "unit-vector products of the Hessian, float64: relative difference", "≤ 1e-10", f"{max(r['differences'].values()):.0e}"


def _processes(records: Sequence[Record]) -> Iterator[Line]:
    rows = [r for r in records if r["mode"] == "processes"]
    if rows:
        times = spread([r["one"]["wall"] / r["two"]["wall"] for r in rows], ".2f", "×")
        yield "two processes against one: wall clock; difference", "≥ 1.7×; 0", f"{times}; {max(r['difference'] for r in rows):.0e}"
