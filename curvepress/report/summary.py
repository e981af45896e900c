"""What a report says in words and tables; terminal and page show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from ..plan import kept
from ..structure import Group
from . import numerals
from .data import Latency, Point, Replacement, Report, Spread, in_loss, outcome, predicted_in_all, predicted_of

VERDICTS = {True: "faster", False: "NOT faster", None: "NOT measurably faster"}


@dataclass(frozen=True)
class Table:
    """Cells ready to be shown; columns whose header is in ``words`` hold words, the others numbers."""

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tile:
    """One number that matters, what it is, what it was made of, and a ``verdict`` where it needs one."""

    label: str
    value: str
    detail: str
    verdict: str = ""


def headline(report: Report) -> str:
    """What came out, in one sentence; it says so where smaller is not faster."""
    split, name, first, last = outcome(report)
    params = report.after.params / report.before.params
    result = f"{split} {name} {numerals.metric(first)} → {numerals.metric(last)}"
    return f"{numerals.percent(params)} of the parameters, {_speed(report)}, {result}"


def _speed(report: Report) -> str:
    won, rest = [t for t in report.latency if t.faster], [t for t in report.latency if not t.faster]
    several = len(report.latency) > 1
    if not rest:
        return f"{_at(won, several)}" if won else "latency not measured"
    verdict = VERDICTS[False if any(t.faster is False for t in rest) else None]
    if won:
        return f"{_at(won, several)} but {verdict} otherwise ({_at(rest, several)})"
    return f"{'smaller but ' if report.after.params < report.before.params else ''}{verdict} ({_at(rest, several)})"


def _at(timings: Sequence[Latency], several: bool) -> str:
    ratios = [f"{numerals.times(t.ratio.median)} the latency" if n == 0 else numerals.times(t.ratio.median) for n, t in enumerate(timings)]
    return " and ".join(f"{r} at batch{numerals.NBSP}{t.batch}" if several else r for r, t in zip(ratios, timings, strict=True))


def tiles(report: Report) -> tuple[Tile, ...]:
    """The numbers at the top of the page."""
    a, b = report.before, report.after
    split, name, first, last = outcome(report)
    change = numerals.signed(f", {last - first:+.3g}") if isfinite(last - first) else ""
    return (
        Tile("Parameters", _left(a.params, b.params), f"{numerals.count(a.params)} → {numerals.count(b.params)}"),
        Tile("Size", _left(a.bytes, b.bytes), f"{numerals.size(a.bytes)} → {numerals.size(b.bytes)}"),
        Tile("MACs per example", _left(a.macs, b.macs), f"{numerals.count(a.macs)} → {numerals.count(b.macs)}"),
        *(_latency_tile(t) for t in report.latency or [None]),
        Tile(f"{name.capitalize()}, {split}", numerals.metric(last), f"{numerals.metric(first)} before{change}"),
    )


def _left(before: float, after: float) -> str:
    return numerals.percent(after / before) if before else "none"


def _latency_tile(t: Latency | None) -> Tile:
    if t is None:
        return Tile("Latency", "–", "not measured")
    detail = f"{numerals.milliseconds(t.original.median)} → {numerals.milliseconds(t.compressed.median)}"
    return Tile(f"Latency, batch {t.batch}", numerals.times(t.ratio.median), detail, VERDICTS[t.faster])


def tables(report: Report) -> tuple[Table, ...]:
    """All tables that have rows: costs, latency, metrics, groups, implants, frontier, stages of the work, environment."""
    made = (_costs, _latencies, _metrics, _groups, _implants, _frontier, _stages, _environment)
    return tuple(t for table in made if (t := table(report)).rows)


def _costs(report: Report) -> Table:
    a, b = report.before, report.after
    entries = (("parameters", a.params, b.params), ("bytes", a.bytes, b.bytes), ("multiply-accumulates per example", a.macs, b.macs))
    rows = tuple((name, numerals.exact(x), numerals.exact(y), _left(x, y)) for name, x, y in entries)
    return Table("Cost", ("", "original", "compressed", "left"), rows, ("",))


def _latencies(report: Report) -> Table:
    rows = tuple(
        (
            str(t.batch),
            str(t.threads),
            numerals.milliseconds(t.original.median),
            numerals.milliseconds(t.compressed.median),
            *_spread(t.ratio),
            VERDICTS[t.faster],
        )
        for t in report.latency
    )
    header = ("batch", "threads", "original", "compressed", "ratio", "middle half", "verdict")
    return Table("Latency", header, rows, ("verdict",))


def _spread(ratio: Spread) -> tuple[str, str]:
    return numerals.times(ratio.median), f"{ratio.low:.2f} to {ratio.high:.2f}"


def _metrics(report: Report) -> Table:
    splits = (("validation", report.metrics), ("test", report.test))
    names = next(iter(report.metrics.values()))
    rows = tuple(
        (stage, split, *(numerals.metric(m[n]) if n in m else "–" for n in names))
        for split, stages in splits
        for stage, m in stages.items()
    )
    return Table("Metrics", ("stage", "split", *names), rows, ("stage", "split"))


def _groups(report: Report) -> Table:
    loss = in_loss(report)
    rows = tuple(
        (g.name, g.kind, str(g.size), str(len(kept(report.plan, g))), _cut(report, g) if loss else _share(report, g), g.frozen)
        for g in report.plan.structure.groups
    )
    header = ("group", "kind", "channels", "kept", "predicted rise" if loss else "score cut", "cannot be cut because")
    return Table("Groups", header, rows, ("group", "kind", "cannot be cut because"))


def _cut(report: Report, group: Group) -> str:
    predicted = predicted_of(report, group)
    return numerals.uncertain(*predicted) if predicted else "–"


def _share(report: Report, group: Group) -> str:
    cut = predicted_of(report, group)
    whole = float(report.scores.values[group.name].sum()) if cut else 0.0
    return numerals.percent(cut[0] / whole) if cut and whole else "–"


def _implants(report: Report) -> Table:
    rows = tuple(
        (i.weight, i.kind.replace("_", " "), f"{i.rank} of {i.most}", numerals.exact(i.before), numerals.exact(i.after), _predicted(i))
        for i in report.implants
    )
    header = ("weight", "kind", "rank or channels", "parameters", "with the implant", "predicted rise")
    return Table("Implants", header, rows, ("weight", "kind"))


def _frontier(report: Report) -> Table:
    rows = tuple(
        (numerals.percent(p.params), _predicted(p), "–" if p.measured is None else numerals.rise(p.measured))
        for p in sorted(report.frontier, key=lambda p: -p.params)
    )
    return Table("Frontier", ("parameters left", "predicted rise", "measured rise"), rows)


def _predicted(p: Point | Replacement) -> str:
    return "–" if p.predicted is None else numerals.uncertain(p.predicted, p.stderr or 0.0)


def _stages(report: Report) -> Table:
    rows = tuple((s.name, numerals.seconds(s.cpu), numerals.seconds(s.wall), f"{s.peak:.0f} MiB") for s in report.stages)
    return Table("Work", ("stage", "processor", "wall clock", "peak memory"), rows, ("stage",))


def _environment(report: Report) -> Table:
    return Table("Environment", ("what", "value"), tuple(report.environment.items()), ("what", "value"))


def method(report: Report) -> str:
    """How the scores were made, and what they predict for the whole plan."""
    s = report.scores
    how = f"Scores by {s.method} ({s.unit}), {f'{s.samples} samples' if s.samples else 'exact'}, seed {s.seed}."
    predicted = predicted_in_all(report)
    if not predicted or not in_loss(report):
        return how
    return f"{how} Predicted rise of the loss for this plan, before recovery: {numerals.uncertain(*predicted)}."


def form(report: Report) -> str:
    """What kind of module the user got, and why."""
    what = {
        "module": "The compressed model is an ordinary module with smaller tensors",
        "graph": "The compressed model is a rewritten exported graph",
    }
    return f"{what[report.form]}{f': {report.reason}' if report.reason else ''}."
