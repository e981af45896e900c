"""The tables of ``benchmarks.curvature``, in Markdown, from its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.curvature_cells import MODES
from benchmarks.curvature_required import LEVEL, newest, probe
from benchmarks.records import Record


def show(records: Sequence[Record]) -> None:
    """Print every table there are records for; of each way, those of the newest code it was measured with."""
    records = newest(records)
    for depth in sorted({r["depth"] for r in records}):
        print(f"\n### ResNet-{depth}\n")
        mine = [r for r in records if r["depth"] == depth]
        if any("round" in r for r in mine):
            _costs(mine)
        _extrapolations(mine)
        for r in mine:
            if r["mode"] in SENTENCES:
                print(f"\n{SENTENCES[r['mode']](r)}")


def _costs(records: Sequence[Record]) -> None:
    cells = {m: [r for r in records if r["mode"] == m and "round" in r] for m in MODES}
    cost = median(probe(r) for r in cells["hap"]) if cells["hap"] else float("nan")
    memory = median(r["peak"] for r in cells["hap"]) if cells["hap"] else float("nan")
    whole = cost * median([r["needed"][LEVEL] for r in records if r["mode"] == "hap_extrapolated"] or [float("nan")])
    print(f"HAP's procedure needs {whole:.0f} CPU s for ρ {LEVEL} with the exact value of the same images.\n")
    heads = ("way", "n", "CPU s, one probe or all", "first in its process", "in HAP probes", "HAP to ρ 0.95 takes", "peak above idle, MiB")
    print("|", " | ".join((*heads, "against HAP", "ρ same images", "ρ population")), "|")
    print("|---" * (len(heads) + 3) + "|")
    last = [r for r in records if "round" in r][-1].get("code")
    for mode, rows in cells.items():
        if rows:
            name = mode if rows[0].get("code") == last else f"{mode}, older code"
            print("|", " | ".join([name, *_row(mode, rows, (cost, memory, whole))]), "|")


def _row(mode: str, rows: Sequence[Record], hap: tuple[float, float, float]) -> list[str]:
    """One row, with HAP's seconds a probe, its peak of memory and its seconds for a rank correlation of 0.95."""
    each, memory, whole = hap
    seconds, peak = [probe(r) for r in rows], [r["peak"] for r in rows]
    ranks = MODES[mode].exact and min(r.get("same", 0) for r in rows) >= float(LEVEL)
    times = f"{whole / median(seconds):,.0f}×" if ranks else "–"
    cost = [_spread(seconds, ".3g"), format(median(r["steps"][0] for r in rows), ".3g"), f"{median(seconds) / each:.2f}", times]
    room = [_spread(peak, ".0f"), f"{100 * (median(peak) / memory - 1):+.0f} %"]
    return [str(len(rows)), *cost, *room, _agreement(rows, "same"), _agreement(rows, "population")]


def _spread(values: Sequence[float], form: str) -> str:
    middle = format(median(values), form)
    return f"{middle} ({format(min(values), form)}–{format(max(values), form)})" if len(values) > 1 else middle


def _agreement(rows: Sequence[Record], what: str) -> str:
    found = [r[what] for r in rows if what in r]
    return _spread(found, ".4f") if found else "–"


def _extrapolations(records: Sequence[Record]) -> None:
    """What HAP's probes would take, by a centred bootstrap of real ones, and what 300 of them give."""
    rows = [r for r in records if r["mode"] == "hap_extrapolated"]
    if rows:
        levels = list(rows[0]["needed"])
        print(f"\nHAP's procedure, centred bootstrap of {rows[0]['probes']} real probes a batch; ρ are medians.\n")
        heads = (*(f"probes to ρ {level}" for level in levels), "300 probes: ρ same images", "ρ population")
        print("| batch |", " | ".join((*heads, "exact value of the batch: ρ population", "deviation of a probe / trace")), "|")
        print("|---" * (len(heads) + 3) + "|")
    for r in rows:
        figures = [f"{r['of_300'][k][0]:.2f}" for k in ("same", "population")] + [f"{r['exact_of_batch']['population']:.3f}"]
        print("|", " | ".join([str(r["batch"]), *map(str, r["needed"].values()), *figures, f"{r['relative_deviation']:.1f}"]), "|")
    for r in rows[:1]:
        alone = r["without_curvature"]
        print(
            f"\nWith the population, without any curvature: ‖w‖²/p {alone['mean_square']:.3f}, ‖w‖² {alone['squared_norm']:.3f}; ", end=""
        )
        print(f"one half of the population with the other: {r['population_halves']:.3f}.")


def _scale(r: Record) -> str:
    shares, ranking = ", ".join(f"{100 * s:.2f} %" for s in r["shares"]), r["ranking"]
    return (
        f"EHAP as released, float16: loss scales of the probes {_list(r['scales'])}; share of the sum of absolute values {shares}; "
        f"ratio to the same probe in float32 {_list(r['ratio_to_float32'])}; channels exactly zero {_list(r['zero_channels'], 'd')}. "
        f"The mean ranks channels as its first probe alone does ({ranking['first_probe']:.4f}); with the mean of the same probes in "
        f"float32 it agrees to {ranking['mean_float32']:.2f}."
    )


def _equality(r: Record) -> str:
    largest = max(r["differences"].values())
    return (
        f"Exact estimate against products of the true Hessian with unit vectors, float64, {len(r['differences'])} channels: {largest:.1e}."
    )


def _processes(r: Record) -> str:
    one, two = r["one"], r["two"]
    return (
        f"Two processes of one thread, {r['images']} images: CPU seconds {one['cpu']:.2f} and, of the busier, {two['cpu']:.2f} "
        f"({one['cpu'] / two['cpu']:.2f} times less); wall clock {one['wall'] / two['wall']:.2f} times less; largest relative difference "
        f"of a trace {r['difference']:.1e}."
    )


SENTENCES: dict[str, Callable[[Record], str]] = {"ehap_released": _scale, "equality": _equality, "processes": _processes}


def _list(values: Sequence[float], form: str = ".3g") -> str:
    return ", ".join(format(v, form) for v in values)
