"""A report as one page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import curves, rows, summary
from .data import Report, in_loss


@dataclass(frozen=True)
class Picture:
    """An SVG element with its heading, a sentence on how to read it, and a key: ``(class of the swatch, words)``."""

    heading: str
    svg: Markup
    caption: str
    key: tuple[tuple[str, str], ...] = ()
    wide: bool = False


def html(report: Report) -> str:
    """The report as a self-contained HTML page."""
    loader = PackageLoader("curvepress.report", package_path="")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("template.html.j2")
    return page.render(
        report=report,
        headline=summary.headline(report),
        tiles=summary.tiles(report),
        sections=[(name, list(pictures)) for name, pictures in _sections(report)],
        tables=summary.tables(report),
        method=summary.method(report),
        form=summary.form(report),
    )


def _sections(report: Report) -> Iterator[tuple[str, Iterator[Picture]]]:
    yield "Result", _result(report)
    yield "What was cut", _cuts(report)
    if report.frontier:
        yield "Prediction", _prediction(report)
    if report.history:
        yield "Recovery", _recovery(report)


def _result(report: Report) -> Iterator[Picture]:
    key = (("kept", "after"), ("gone", "original"))
    spread = " Whiskers hold the middle half of the paired readings." if report.latency else " Latency was not measured."
    yield Picture("Cost", Markup(rows.ratios(report)), f"What is left, as ratios to the original.{spread}", key)
    splits = (("kept dot", "validation split"), *((("lost diamond", "test split, touched once"),) if report.test else ()))
    name = next(iter(next(iter(report.metrics.values()))))
    yield Picture(name.capitalize(), Markup(rows.metric(report, name)), "Stage by stage, from top to bottom.", splits)


def _cuts(report: Report) -> Iterator[Picture]:
    key = (
        ("kept", "kept"),
        ("gone", "cut"),
        *((("frozen", "cannot be cut"),) if any(g.frozen for g in report.plan.structure.groups) else ()),
    )
    yield Picture(
        "Width of every group",
        Markup(rows.widths(report)),
        "In network order. A group is a set of channels that must be cut together.",
        key,
    )
    if not any(len(v) for v in report.scores.values.values()):
        return
    unit = "the predicted rise of the loss" if in_loss(report) else "a score that only ranks"
    bars = " with its standard error" if any(e.any() for e in report.scores.stderr.values()) else ""
    caption = f"One dot per channel: {unit}{bars}. A tick marks the threshold of a group in which the lowest scores were cut."
    yield Picture("Scores", Markup(rows.scores(report)), caption, (("kept dot", "kept"), ("lost dot", "cut"), ("tick", "threshold")))
    caption = "One cell per channel, in its own place. The stronger the colour, the higher its score ranks among all channels."
    yield Picture("Channel map", Markup(rows.channels(report)), caption, (("kept", "kept"), ("lost hollow", "cut")), wide=True)


def _prediction(report: Report) -> Iterator[Picture]:
    before = "All before any recovery, on the calibration batches."
    if any(p.predicted is not None or p.measured is not None for p in report.frontier):
        yield Picture("Frontier", Markup(curves.frontier(report)), f"Rise of the loss along plans of shrinking budgets. {before}")
    if curves.compared(report.frontier):
        yield Picture(
            "Predicted against measured", Markup(curves.calibration(report)), f"On the dashed line the prediction is exact. {before}"
        )


def _recovery(report: Report) -> Iterator[Picture]:
    name = next(iter(next(iter(report.metrics.values()))))
    yield Picture("Training loss", Markup(curves.losses(report)), "The mean over each epoch.")
    if any(name in e.metrics for e in report.history):
        yield Picture(name.capitalize(), Markup(curves.recovery(report)), "On the validation split, after each epoch.")
