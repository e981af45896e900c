"""A report for the terminal."""

from __future__ import annotations

from . import summary
from .data import Report
from .summary import Table


def text(report: Report) -> str:
    """The report as plain text: what came out, the tables, how it was made, the notes."""
    parts = [report.title, summary.headline(report)]
    parts += [f"{t.name}\n{aligned(t)}" for t in summary.tables(report)]
    parts += [summary.method(report), summary.form(report), *(f"Note: {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def aligned(table: Table) -> str:
    """The table with words to the left and numbers to the right of their columns."""
    rows = [table.header, *table.rows]
    sizes = [max(len(row[n]) for row in rows) for n in range(len(table.header))]
    left = [h in table.words for h in table.header]
    lines = ["  ".join(c.ljust(s) if w else c.rjust(s) for c, s, w in zip(row, sizes, left, strict=True)) for row in rows]
    return "\n".join(f"  {line}".rstrip() for line in lines)
