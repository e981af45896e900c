"""A report is data that survives JSON, and a page that tells the truth about it and needs nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from curvepress.costs import cost
from curvepress.plan import Plan
from curvepress.report import Epoch, Latency, Point, Report, Spread, Stage, from_dict, headline, html, numerals, scales, text, to_dict
from curvepress.report.canvas import axes
from curvepress.report.summary import tables
from curvepress.scores import LOSS_UNIT, RELATIVE_UNIT, Scores
from curvepress.structure import Group, Member, Structure, TensorSpec


def resnet(depth: int = 20, frozen: str = "shortcuts pad with zeros") -> Structure:
    """The groups of a CIFAR ResNet: one inside each block, and one stream per stage that cannot be cut."""
    blocks, specs, groups = (depth - 2) // 6, {}, []
    before = 3
    for stage, width in enumerate((16, 32, 64)):
        place = (32 >> stage) ** 2
        stream = []
        for n in range(blocks):
            name = f"layer{stage + 1}.{n}"
            specs[f"{name}.conv1.weight"] = TensorSpec((width, before, 3, 3), "float32", "parameter", place)
            specs[f"{name}.conv2.weight"] = TensorSpec((width, width, 3, 3), "float32", "parameter", place)
            inner = (_member(f"{name}.conv1.weight", 0, width, "out"), _member(f"{name}.conv2.weight", 1, width, "in"))
            groups.append(Group(f"{name}.conv1", width, "channel", inner))
            stream.append(_member(f"{name}.conv2.weight", 0, width, "out"))
            before = width
        groups.append(Group(f"layer{stage + 1}.0.conv2", width, "channel", tuple(stream), frozen))
    return Structure(specs, tuple(groups))


def _member(tensor: str, dim: int, size: int, role: str) -> Member:
    return Member(tensor, dim, np.arange(size)[:, None], role)


def scored(structure: Structure, seed: int = 0, unit: str = LOSS_UNIT) -> Scores:
    generator = np.random.default_rng(seed)
    values = {g.name: np.exp(generator.normal(-7 + 0.02 * n, 1.3, g.size)) for n, g in enumerate(structure.free)}
    stderr = {n: (0.25 if unit == LOSS_UNIT else 0) * v * generator.random(len(v)) for n, v in values.items()}
    return Scores(values, stderr, "hessian_trace", unit, 32 if unit == LOSS_UNIT else 0, seed)


def lowest(structure: Structure, scores: Scores, share: float) -> Plan:
    """Cut the lowest scores, a different share of every group."""
    keep = {}
    for n, g in enumerate(structure.free):
        stay = max(1, round(g.size * (1 - share * (0.6 + 0.8 * ((n * 0.618) % 1)))))
        keep[g.name] = tuple(np.argsort(-scores.values[g.name])[:stay].tolist())
    return Plan(structure, keep)


def timing(batch: int, low: float, median: float, high: float) -> Latency:
    faster = True if high < 1 else False if low > 1 else None
    before = 3.24 * batch**0.9
    one, two = (Spread(0.97 * t, t, 1.05 * t) for t in (before, median * before))
    return Latency(batch, 1, 40, one, two, Spread(low, median, high), faster)


def example(depth: int = 20, share: float = 0.5, seed: int = 0) -> Report:
    structure = resnet(depth)
    scores = scored(structure, seed)
    plan = lowest(structure, scores, share)
    generator = np.random.default_rng(seed + 1)
    budgets = np.linspace(0.95, 0.3, 12)
    predicted = 0.4 * (1 / budgets - 1) ** 1.7 / 1.2 - 0.001
    points = tuple(
        Point(float(b), float(p), float(0.12 * abs(p) + 5e-4), float(p * np.exp(0.25 * generator.normal()) + 0.3 * max(p, 0) ** 2))
        for b, p in zip(budgets, predicted, strict=True)
    )
    history = tuple(
        Epoch(
            n, float(0.35 + 0.9 * np.exp(-n / 4) + 0.02 * generator.normal()), {"accuracy": 90.6 - 9 * float(np.exp(-n / 5)), "loss": 0.3}
        )
        for n in range(1, 21)
    )
    return Report(
        title="ResNet on CIFAR-10",
        plan=plan,
        scores=scores,
        before=cost(Plan(structure)),
        after=cost(plan),
        metrics={
            "original": {"accuracy": 91.94, "loss": 0.2841},
            "pruned": {"accuracy": 42.18, "loss": 2.4102},
            "BatchNorm re-estimated": {"accuracy": 71.3, "loss": 0.9513},
            "recovered": {"accuracy": 90.62, "loss": 0.3307},
        },
        test={"original": {"accuracy": 91.73, "loss": 0.291}, "recovered": {"accuracy": 90.41, "loss": 0.341}},
        frontier=points,
        history=history,
        latency=(timing(1, 0.60, 0.61, 0.63), timing(64, 0.68, 0.70, 0.71)),
        stages=(
            Stage("trace", 1.2, 1.3, 310),
            Stage("score", 84.0, 86.2, 905),
            Stage("recover", 4210.5, 4222.0, 1190),
            Stage("export", 3.1, 3.4, 720),
        ),
        form="module",
        reason="all constants of the model's code could be mended",
        environment={"torch": "2.13.0", "threads": "1", "processor": "a processor with a rather long name, 2 cores"},
        notes=("The validation split holds 5 000 images kept out of the training data.",),
    )


def alone(name: str = "encoder.layers.11.attention.self.query_and_a_very_long_suffix", unit: str = RELATIVE_UNIT) -> Report:
    """One group, scores that only rank, nothing trained, nothing timed, a metric that failed."""
    structure = Structure({"w": TensorSpec((12, 5), "float32", "parameter", 1)}, (Group(name, 12, "head", (_member("w", 0, 12, "out"),)),))
    scores = scored(structure, unit=unit)
    plan = lowest(structure, scores, 0.5)
    metrics = {"original": {"recall of <rare> $x$": 0.7312}, "pruned": {"recall of <rare> $x$": float("nan")}}
    return Report("one & only", plan, scores, cost(Plan(structure)), cost(plan), metrics, form="graph", reason="its code holds 12 <heads>")


def wide() -> Report:
    """More channels than can be drawn one by one, scores of both signs, an uncuttable giant, and a frontier below zero."""
    specs = {f"block{n}.conv.weight": TensorSpec((256, 3), "float32", "parameter", 4) for n in range(70)}
    groups = [Group(n.removesuffix(".weight"), 256, "channel", (_member(n, 0, 256, "out"),)) for n in specs]
    giant = Group("embedding", 30522, "embedding", (_member("embedding.weight", 0, 30522, "out"),), "model input")
    structure = Structure({**specs, "embedding.weight": TensorSpec((30522, 4), "float32", "parameter")}, (*groups, giant))
    scores = scored(structure)
    scores = replace(scores, values={n: v - 5e-4 for n, v in scores.values.items()})
    plan = lowest(structure, scores, 0.5)
    points = (Point(0.9, -0.002, 0.001, 0.0003), Point(0.7, 0.0, 0.001, -0.006), Point(0.5, 0.3, 0.02, 0.8))
    return replace(example(), plan=plan, scores=scores, before=cost(Plan(structure)), after=cost(plan), frontier=points)


def untouched() -> Report:
    """Nothing cut, nothing scored: every picture is all but empty."""
    structure = resnet()
    scores = Scores({}, {}, "random", RELATIVE_UNIT, 0, 0)
    whole = cost(Plan(structure))
    return Report("nothing done", Plan(structure), scores, whole, whole, {"original": {"accuracy": 91.9}})


def measured_only() -> Report:
    """A frontier whose plans were measured but not predicted, at one point."""
    return replace(alone("fc"), frontier=(Point(0.5, None, None, 0.2),), history=(Epoch(1, 0.5),))


def deep() -> Report:
    return example(56)


def elsewhere() -> Report:
    return alone("слой.卷积", LOSS_UNIT)


REPORTS = [example, deep, alone, wide, untouched, measured_only, elsewhere]


@cache
def page_of(make: Callable[[], Report]) -> str:
    return html(make())


class Page(HTMLParser):
    """What a page asks for and what it holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")
            self.links += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def pictures(page: str) -> dict[str, ElementTree.Element]:
    found = (ElementTree.fromstring(s) for s in re.findall(r"<svg .*?</svg>", page, re.DOTALL))
    return {e.attrib["class"]: e for e in found}


def labels(picture: ElementTree.Element) -> list[str]:
    return [e.text or "" for e in picture.iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("make", [example, deep, wide, untouched])
def test_a_report_survives_json(make) -> None:
    report = make()
    assert from_dict(json.loads(json.dumps(to_dict(report), allow_nan=False))) == report


def test_a_changed_report_is_another_report() -> None:
    data = to_dict(example())
    data["latency"][0]["ratio"]["median"] += 0.01
    assert from_dict(data) != example()


def test_what_is_no_report_is_refused() -> None:
    data = to_dict(example())
    with pytest.raises(ValueError, match="not a curvepress report of version 1; got 'curvepress plan'"):
        from_dict({**data, "format": "curvepress plan"})
    with pytest.raises(ValueError, match="the report is damaged .*'frontier'"):
        from_dict({k: v for k, v in data.items() if k != "frontier"})
    with pytest.raises(ValueError, match="form must be 'module' or 'graph', got 'blob'"):
        replace(example(), form="blob")
    with pytest.raises(ValueError, match="same metrics"):
        replace(example(), test={"original": {"accuracy": 1.0}, "recovered": {"loss": 1.0}})
    with pytest.raises(ValueError, match="at least one stage"):
        replace(example(), metrics={})


@pytest.mark.parametrize("make", REPORTS)
def test_the_page_needs_nothing_else(make) -> None:
    page = page_of(make)
    seen = Page(page)
    assert not {"script", "link", "iframe", "object", "embed"} & set(seen.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.links)
    assert "http" not in page and "@import" not in page and "font-family: '" not in page
    assert len(seen.ids) == len(set(seen.ids))
    assert {link[1:] for link in seen.links if link.startswith("#")} == set(seen.ids)


@pytest.mark.parametrize("make", [example, wide])
def test_the_page_is_the_same_every_time(make) -> None:
    assert html(make()) == page_of(make)


@pytest.mark.parametrize("make", REPORTS)
def test_page_and_terminal_say_the_same(make) -> None:
    report = make()
    words, plain = " ".join(Page(page_of(make)).words), text(report)
    for said in (words, plain):
        assert headline(report) in said and report.title in said and report.reason in said
        for table in tables(report):
            assert all(cell in said for row in table.rows for cell in row)
    for group in report.plan.structure.groups:
        assert group.name in words and group.frozen in words


@pytest.mark.parametrize("make", REPORTS)
def test_tables_line_up(make) -> None:
    for block in text(make()).split("\n\n"):
        if block.startswith("Frontier\n"):
            assert len({len(line) for line in block.splitlines()[1:]}) == 1


def test_the_pictures_show_what_the_plan_does() -> None:
    report = example()
    drawn = pictures(page_of(example))
    assert list(drawn) == ["ratios", "metric", "widths", "scores", "channels", "frontier", "calibration", "losses", "recovery"]
    sizes = [(g.size, len(report.plan.keep.get(g.name, range(g.size)))) for g in report.plan.structure.groups]
    shown = labels(drawn["widths"])
    assert [s for s in shown if "→" in s] == [f"{a} → {b}" for a, b in sizes if a != b]
    free = [(g.size, len(report.plan.keep[g.name])) for g in report.plan.structure.free]
    kept, cut = sum(b for _, b in free), sum(a - b for a, b in free)
    assert marks(drawn["channels"], "fill: var(--kept)") == kept and marks(drawn["channels"], "stroke: var(--lost)") == cut
    assert marks(drawn["scores"], "fill: var(--kept)") == kept and marks(drawn["scores"], "fill: var(--lost)") == cut
    assert {"0.61×", "0.70×"} <= set(labels(drawn["ratios"])) and {"91.94", "91.73", "90.41"} <= set(labels(drawn["metric"]))


def marks(picture: ElementTree.Element, look: str) -> int:
    """Marks of one look: uses of a shape, or paths that were drawn one by one."""
    uses = [e for e in picture.iter() if e.tag.endswith("use") and look in e.attrib.get("style", "")]
    paths = [
        e for g in picture.iter() for e in g if e.tag.endswith("path") and not g.tag.endswith("defs") and look in e.attrib.get("style", "")
    ]
    return len(uses) or len(paths)


def test_only_what_was_measured_is_drawn() -> None:
    assert set(pictures(page_of(untouched))) == {"ratios", "metric", "widths"}
    assert set(pictures(page_of(measured_only))) == {"ratios", "metric", "widths", "scores", "channels", "frontier", "losses"}
    assert "predicted rise" not in page_of(alone)


FASTER, SLOWER, OPEN = (0.60, 0.61, 0.63), (1.05, 1.08, 1.1), (0.95, 0.99, 1.02)


@pytest.mark.parametrize(
    ("ratios", "says"),
    [
        ([FASTER], "46 % of the parameters, 0.61× the latency, test accuracy 91.73 → 90.41"),
        ([FASTER, FASTER], "0.61× the latency at batch 1 and 0.61× at batch 2,"),
        ([SLOWER], "smaller but NOT faster (1.08× the latency),"),
        ([OPEN], "smaller but NOT measurably faster (0.99× the latency),"),
        ([OPEN, SLOWER], "smaller but NOT faster (0.99× the latency at batch 1 and 1.08× at batch 2),"),
        ([OPEN, FASTER], "0.61× the latency at batch 2 but NOT measurably faster otherwise (0.99× the latency at batch 1),"),
        ([], "46 % of the parameters, latency not measured, test"),
    ],
)
def test_the_headline_does_not_flatter(ratios: list[tuple[float, float, float]], says: str) -> None:
    report = replace(example(), latency=tuple(timing(n + 1, *r) for n, r in enumerate(ratios)))
    assert says in headline(report).replace(numerals.NBSP, " ")


def test_names_are_drawn_as_they_are() -> None:
    drawn = pictures(page_of(alone))
    assert "recall of <rare> $x$" in labels(drawn["metric"])
    assert pictures(page_of(elsewhere))["metric"].attrib["aria-label"].startswith("recall of <rare> $x$")


def test_the_headline_takes_the_validation_split_where_the_test_split_was_left_alone() -> None:
    assert headline(replace(example(), test={})).endswith("validation accuracy 91.94 → 90.62")


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([3.0, 4.0, 9.0], "linear"),
        ([-1.0, 0.5, 1.0], "linear"),
        ([0.0, 0.0], "linear"),
        ([], "linear"),
        ([1e-5, 1e-3, 2.0], "log"),
        ([0.02, 0.9], "log"),
        ([0.0, 1e-3, 2.0], "symlog"),
        ([-0.4, 1e-4, 2.0, float("nan")], "symlog"),
        ([-3.0, -1e-3], "symlog"),
        ([1e-30, 1e-3, 2.0], "symlog"),
    ],
)
def test_axes_fit_their_values(values: list[float], scale: str) -> None:
    _, ax = axes(200)
    low, high = scales.fit(ax, "x", np.array(values))
    finite = [v for v in values if np.isfinite(v)]
    assert ax.get_xscale() == scale and ax.get_xlim() == (low, high)
    assert all(low < v < high for v in finite)
    assert 2 <= sum(low <= t <= high for t in ax.get_xticks()) <= 7


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (numerals.count(269722), "270 k"),
        (numerals.count(9999), "9 999"),
        (numerals.count(999_960), "1.00 M"),
        (numerals.count(40_551_000), "40.6 M"),
        (numerals.size(1_080_000), "1.03 MiB"),
        (numerals.percent(0.4996), "50 %"),
        (numerals.percent(0.0731), "7.3 %"),
        (numerals.times(0.614), "0.61×"),
        (numerals.metric(91.73), "91.73"),
        (numerals.metric(0.91734), "0.9173"),
        (numerals.metric(float("inf")), "not finite"),
        (numerals.rise(0.02), "0.0200"),
        (numerals.rise(-1.23e-5), "−1.2×10⁻⁵"),
        (numerals.rise(0.0), "0"),
        (numerals.uncertain(0.012345, 0.00112), "0.0123 ± 0.0011"),
        (numerals.uncertain(1.2e-5, 3.1e-6), "(1.20 ± 0.31)×10⁻⁵"),
        (numerals.uncertain(0.5, 0.0), "0.500"),
        (numerals.tick(1e-4), "10⁻⁴"),
        (numerals.tick(-0.25), "−0.25"),
        (numerals.seconds(0.34), "340 ms"),
        (numerals.seconds(200.4), "3 min 20 s"),
        (numerals.seconds(3900), "1 h 05 min"),
        (numerals.shortened("a" * 30), "a" * 7 + "…" + "a" * 14),
    ],
)
def test_numbers_read_well(shown: str, wanted: str) -> None:
    assert re.sub(r"\s", " ", shown) == wanted


def test_drawing_leaves_matplotlib_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = dict(matplotlib.rcParams)
    html(alone())
    assert dict(matplotlib.rcParams) == before and "matplotlib.pyplot" not in sys.modules
