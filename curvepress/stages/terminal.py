"""What the command line shows: tables, progress, and what went wrong in one message."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from .. import report as reports
from ..costs import Cost, written
from ..runs.desk import Progress as Show
from ..structure import Group, Structure
from .pipeline import Outcome

console, errors = Console(), Console(stderr=True)


def print_what_can_be() -> None:
    """Have characters that the terminal's encoding lacks shown as question marks, rather than fail on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def hush() -> None:
    """Have this process print nothing but what goes wrong."""
    console.quiet = True


def say(*parts: str) -> None:
    """Print a line as it is: not wrapped, brackets and paths untouched."""
    console.print(*parts, highlight=False, markup=False, soft_wrap=True)


def complain(text: str, style: str = "bold red") -> None:
    """Print a message on the error stream, likewise."""
    errors.print(Text.assemble(("curvepress: ", style), text), highlight=False, soft_wrap=True)


@contextmanager
def explained() -> Iterator[None]:
    """What goes wrong in the body is said in one message, and the program ends: with status 1, or 130 where it was interrupted."""
    with warnings.catch_warnings():
        warnings.showwarning = _noted
        try:
            yield
        except ValueError as error:
            complain(str(error))
            sys.exit(1)
        except OSError as error:
            complain(_said(error))
            sys.exit(1)
        except KeyboardInterrupt:
            complain("interrupted; the same command goes on from here")
            sys.exit(130)


def _said(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    way_out = "free the disk or choose another folder, and run the same command"
    return f"{where}{error.strerror or error}; nothing half-written is left: {way_out}"


def _noted(message: Any, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    complain(str(message) if ours else f"{category.__name__}: {message} ({filename}, line {lineno})", "yellow")


@contextmanager
def bars(stage: str) -> Iterator[Show]:
    """Progress bars on a terminal; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as shown:
        tasks = {"": shown.add_task(stage, total=None)}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(f"{stage}: {what}", total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield show


def tell(stage: str, outcome: Outcome) -> None:
    """One line on a stage: what it took, and what it wrote."""
    taken = outcome.entry.taken
    how = "done before" if outcome.kept else f"{taken['wall']:.1f} s, peak {taken['peak']:.0f} MiB"
    say(f"{stage:8} {how:24} {', '.join(outcome.entry.outputs)}")


def show_groups(structure: Structure) -> None:
    """A table of the groups of a model."""
    table = Table("group", "kind", "channels", "tensors", "may be cut")
    for g in structure.groups:
        table.add_row(Text(g.name), g.kind, str(g.size), str(len(g.members)), Text(_may_be_cut(g)))
    console.print(table)


def _may_be_cut(group: Group) -> str:
    return f"no: {group.frozen}" if group.frozen else "yes" if group.size > 1 else "no: one channel"


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; all but the first column are numbers."""
    table = Table(*(Column(h, justify="right" if n else "left", no_wrap=not n, overflow="fold") for n, h in enumerate(heads)), box=None)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def show_costs(before: Cost, after: Cost) -> None:
    """A table of the costs of the whole model and of a plan."""
    table = Table("", "original", "plan", "ratio")
    for name, old in before.known().items():
        new = getattr(after, name)
        table.add_row(name, written(name, old), written(name, new), f"{new / old:.3f}" if old else "-")
    console.print(table)


def show_frontier(points: Sequence[Mapping[str, Any]], original: Mapping[str, Any], folder: Path) -> None:
    """A table of the points of a frontier, and where its files are."""
    metrics = list(points[0]["measured"] or {}) if points else []
    timed = ["latency"] if metrics else []
    names = [k for k in ("bytes", *([] if timed else ["params"]), "macs", "bops") if k in original]
    columns = [*names, *timed, "predicted rise", *metrics]
    table = Table("", *(Column(k, justify="right", no_wrap=True) for k in columns))
    for p in points:
        shares = [f"{p['cost'][k] / original[k]:.1%}" if original[k] else "-" for k in names]
        found = [f"{(p['measured'] or {})[m]:.4g}" for m in metrics]
        times = [f"{p['latency']['median']:.2f}x" if p["latency"] else "-" for _ in timed]
        table.add_row(str(p["number"]), *shares, *times, _priced([p["predicted"]["rise"], p["predicted"]["stderr"]]), *found)
    console.print(table)
    if metrics:
        say("measured on the validation split: pruned and rounded, nothing trained; latency: ratio to the original, ONNX Runtime, batch 1")
    say(f"files: {folder / 'frontier.json'}, {folder / 'frontier.svg'}")


def show_quantized(facts: Mapping[str, Any], folder: Path) -> None:
    """What became of a quantized model: the bits with their reasons, then accuracy, size, kernels and latency."""
    table = Table(
        Column("weight or site", overflow="fold"),
        "elements",
        "bits",
        "predicted rise",
        "with one bit less",
        title="bits and why",
        title_justify="left",
    )
    for row in (*facts["weights"], *facts["sites"]):
        shown = "float" if row["bits"] is None else str(row["bits"])
        table.add_row(Text(row["name"]), f"{row['elements']:,}", shown, _priced(row["price"]), _priced(row.get("fewer")))
    console.print(table)
    choice, sizes, agreement = facts["choice"], facts["bytes"], facts["agreement"]
    say(f"bits: {choice['average']:.2f} a weight on average; predicted rise of the loss {_priced([choice['rise'], choice['stderr']])}")
    for name, metrics in facts["validation"].items():
        say(f"{name + ':':12} {', '.join(f'{k} {v:.4g}' for k, v in metrics.items())}  (validation)")
    say(f"kernels: {facts['kernels']} in ONNX Runtime, which predicts the same as the simulation for {agreement['same']:.2f} %")
    for name, reason in agreement["kernels"]["float"].items():
        say(f"in float: {name}, since {reason}")
    for name, other in facts["others"].items():
        say(f"{name}: predicts the same as the simulation for {other['same']:.2f} %{_counted(other)}")
    packed = sizes["quantized.safetensors"]
    say(f"bytes: {packed:,} packed, {sizes['float weights'] / packed:.1f} times fewer than float weights; ONNX {sizes['quantized.onnx']:,}")
    for t in facts["latency"][1::2]:
        low, middle, high = (1 / t["ratio"][k] for k in ("high", "median", "low"))
        say(f"latency, batch {t['batch']}: {middle:.2f} times as fast as float in ONNX Runtime (middle half {low:.2f} to {high:.2f})")
    say(f"files: {folder.resolve()}")


def _counted(other: Mapping[str, Any]) -> str:
    """The integer kernels of a runtime, where it tells them."""
    return "".join(f", {other['integer'].get(kind, 0)} of {count} {kind} integer" for kind, count in other.get("total", {}).items())


def _priced(price: Sequence[float] | None) -> str:
    return "-" if price is None else f"{price[0]:.2g} ± {price[1]:.1g}"


def show_report(report: reports.Report, page: Path) -> None:
    """The report in words, and where its page is."""
    say(reports.text(report))
    say(f"report: {page.resolve()}")
