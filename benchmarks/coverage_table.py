"""The records of the coverage benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.coverage_cases import CASES
from benchmarks.records import Record

PEER = "torch-pruning"
SHORT = (
    ("looked up by index", "entries of a table"),
    ("indexed by data", "entries of a table"),
    ("reads a dimension of fixed size", "model input"),
    ("model output", "model output"),
    ("not used", "not used"),
    ("indexed by a constant", "indexed by a constant"),
    ("meets a dimension of fixed size", "positions"),
    ("runs over it", "positions"),
    ("spatial dimension", "positions"),
    ("no rule", "no rule"),
    ("all coupled", "all coupled into one channel"),
)
"""Beginnings or ends of reasons, and what the table calls them."""


def table(records: Sequence[Record]) -> str:
    """What was found, what both tools make of it, what went wrong, and the large model, in Markdown."""
    found = {(r["model"], r["tool"]): r for r in records}
    names = [n for n in CASES if (n, "curvepress") in found]
    lines = ["| model | parameters | groups (channels) by kind | frozen | can be cut | exact | as a module | aligned | trace, CPU s |"]
    lines += ["|---|---|---|---|---|---|---|---|---|", *(_row(n, found[n, "curvepress"]) for n in names)]
    lines += ["", "| model | curvepress: exact | can be cut | Torch-Pruning: exact | can be cut |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {_pair(found[n, 'curvepress'])} | {_pair(found.get((n, PEER), {'failure': 'not run'}))} |" for n in names]
    lines += ["", "| model | tool | what else than an exact result | times |", "|---|---|---|---|", *_troubles(found)]
    return "\n".join([*lines, *_large(found)])


def _troubles(found: Mapping[tuple[str, str], Record]) -> list[str]:
    seen = [(*key, o, n) for key, r in found.items() for o, n in sorted(r.get("outcomes", {}).items())]
    return [f"| {name} | {tool} | {o.replace('|', ' ')} | {n} |" for name, tool, o, n in seen if o not in ("module", "graph", "exact")]


def _row(name: str, record: Record) -> str:
    if "failure" in record:
        return f"| {name} | {record['failure']} | | | | | | | |"
    kinds = ", ".join(f"{kind} {groups} ({channels:,})" for kind, (groups, channels) in record["kinds"].items())
    modules = record["outcomes"].get("module", 0)
    exact = f"{record['exact']} of {record['tried']}"
    form = record["aligned"] if record["aligned"] in ("module", "graph") else "refused"
    seconds = f"{record['trace_seconds']:.2f}"
    cells = (f"{record['params']:,}", kinds, _frozen(record), f"{record['cut']:.1%}", exact, modules, form, seconds)
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def _frozen(record: Record) -> str:
    counts: dict[str, int] = {}
    for _, _, reason in record["frozen"]:
        short = next((s for part, s in SHORT if part in reason), reason)
        counts[short] = counts.get(short, 0) + 1
    return ", ".join(f"{reason} {n}" for reason, n in counts.items())


def _pair(record: Record) -> str:
    if "failure" in record:
        return f"{record['failure']} | "
    return f"{record['exact']} of {record['tried']} | {record['cut']:.1%}"


def _large(found: Mapping[tuple[str, str], Record]) -> list[str]:
    record = found.get(("Llama, 7B", "curvepress"))
    if not record:
        return []
    groups = sum(n for n, _ in record["kinds"].values())
    seconds, memory = f"{record['trace_seconds']:.1f} CPU s", f"{record['peak_gib']:.2f} GiB at most"
    what = f"{groups} groups, {record['cut']:.1%} can be cut; {seconds}, {memory}"
    return ["", f"Trace of a Llama of {record['params']:,} parameters on the meta device: {what}."]
