"""The report of one compression as data: frozen, JSON-ready, and equal after a round trip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from math import hypot
from typing import Any, Literal

import numpy as np

from ..costs import Cost
from ..plan import Plan, from_json, lost, to_json
from ..scores import LOSS_UNIT, Scores, predicted_rise
from ..structure import Group

FORMAT, VERSION = "curvepress report", 1

Metrics = Mapping[str, float]
"""Metric by name, in order; the first one counts, larger is better."""


@dataclass(frozen=True)
class Point:
    """One plan of the frontier, before any recovery.

    ``params`` is the ratio of parameters left.  ``predicted`` and its standard error ``stderr`` are the rise of the
    loss that the scores predict, ``None`` where they are not in units of the loss; ``measured`` is the rise measured
    on the same calibration batches, ``None`` where it was not measured.
    """

    params: float
    predicted: float | None
    stderr: float | None
    measured: float | None


@dataclass(frozen=True)
class Epoch:
    """One epoch of the recovery: its number, the mean training loss, and metrics of the validation split."""

    epoch: int
    loss: float
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Both models in the same runtime, timed in turns.

    ``original`` and ``compressed`` are milliseconds per batch of ``batch`` examples on ``threads`` threads, ``ratio``
    is compressed over original, paired by round.  ``faster`` is ``None`` where the spread leaves it open.
    """

    batch: int
    threads: int
    rounds: int
    original: Spread
    compressed: Spread
    ratio: Spread
    faster: bool | None


@dataclass(frozen=True)
class Replacement:
    """An implant: the weight it replaces, its kind, its rank of ``most`` (or how many channels of ``most`` have 1x1 filters), parameters
    before and after, and the predicted rise of the loss with its standard error, ``None`` where it has no price."""

    weight: str
    kind: str
    rank: int
    most: int
    before: int
    after: int
    predicted: float | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Stage:
    """What one stage of the work took: seconds of processor and wall clock, and the peak memory in MiB."""

    name: str
    cpu: float
    wall: float
    peak: float


@dataclass(frozen=True)
class Report:
    """Everything that came out of one compression.

    ``metrics`` holds, stage by stage in order, the metrics of the validation split ("original", "pruned", ...,
    "recovered"); ``test`` those of the test split, which is touched once, of the original and the final model; it may
    be empty.  ``before`` and ``after`` are the costs.  ``form`` is ``module`` for an ordinary module with smaller
    tensors or ``graph`` for a rewritten exported graph, ``reason`` says why.  ``latency`` is empty where it was not
    measured, ``history`` where nothing was trained.

    Raises:
        ValueError: if ``form`` is neither of the two, there are no metrics, or stages differ in what they measure.
    """

    title: str
    plan: Plan
    scores: Scores
    before: Cost
    after: Cost
    metrics: Mapping[str, Metrics]
    test: Mapping[str, Metrics] = field(default_factory=dict)
    frontier: tuple[Point, ...] = ()
    history: tuple[Epoch, ...] = ()
    latency: tuple[Latency, ...] = ()
    stages: tuple[Stage, ...] = ()
    form: Literal["module", "graph"] = "module"
    reason: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    implants: tuple[Replacement, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in ("module", "graph"):
            raise ValueError(f"form must be 'module' or 'graph', got {self.form!r}")
        for split in (self.metrics, self.test):
            if len({tuple(m) for m in split.values()}) > 1:
                raise ValueError(
                    f"every stage must hold the same metrics in the same order, got { ({s: list(m) for s, m in split.items()}) }"
                )
        if not any(self.metrics.values()):
            raise ValueError("a report needs the metrics of at least one stage; give metrics={'original': {'accuracy': ...}, ...}")


def in_loss(report: Report) -> bool:
    """Whether the scores are in units of the loss."""
    return report.scores.unit == LOSS_UNIT


def predicted_of(report: Report, *groups: Group) -> tuple[float, float] | None:
    """Sum of the scores of what the plan cuts from ``groups``, and its standard error; ``None`` where nothing is cut."""
    gone = {g.name: lost(report.plan, g) for g in groups if g.name in report.scores.values}
    return predicted_rise(report.scores, gone) if any(len(c) for c in gone.values()) else None


def predicted_in_all(report: Report) -> tuple[float, float] | None:
    """Predicted rise of the loss by all that is cut and all implants, and its standard error; ``None`` where there is nothing, or one has
    no price."""
    cut = predicted_of(report, *report.plan.structure.groups)
    parts = [*([cut] if cut else []), *((i.predicted, i.stderr or 0.0) for i in report.implants)]
    rises = [rise for rise, _ in parts if rise is not None]
    return (sum(rises), hypot(*(error for _, error in parts))) if rises and len(rises) == len(parts) else None


def outcome(report: Report) -> tuple[str, str, float, float]:
    """The metric that counts before and after: ``(split, name, first, last)``; of the test split where it was measured."""
    split, stages = ("test", report.test) if len(report.test) > 1 else ("validation", report.metrics)
    values = list(stages.values())
    name = next(iter(values[0]))
    return split, name, values[0][name], values[-1][name]


def to_dict(report: Report) -> dict[str, Any]:
    """The report as JSON-ready data; :func:`from_dict` reads it back to an equal report."""
    plain = {f.name: getattr(report, f.name) for f in fields(report) if f.name not in ("plan", "scores")}
    data = {name: _plain(value) for name, value in plain.items()}
    scores = {**vars(report.scores), "values": _lists(report.scores.values), "stderr": _lists(report.scores.stderr)}
    return {"format": FORMAT, "version": VERSION, **data, "scores": scores, "plan": json.loads(to_json(report.plan))}


def from_dict(data: Mapping[str, Any]) -> Report:
    """The report written by :func:`to_dict`.

    Raises:
        ValueError: if the data is not a report of this version.
    """
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ValueError(f"this is not a {FORMAT} of version {VERSION}; got {data.get('format')!r}, version {data.get('version')!r}")
    try:
        scores = {**data["scores"], "values": _arrays(data["scores"]["values"]), "stderr": _arrays(data["scores"]["stderr"])}
        return Report(
            **{name: data[name] for name in ("title", "metrics", "test", "form", "reason", "environment")},
            plan=from_json(json.dumps(data["plan"])),
            scores=Scores(**scores),
            before=Cost(**data["before"]),
            after=Cost(**data["after"]),
            frontier=tuple(Point(**p) for p in data["frontier"]),
            history=tuple(Epoch(**e) for e in data["history"]),
            latency=tuple(_latency(entry) for entry in data["latency"]),
            stages=tuple(Stage(**s) for s in data["stages"]),
            notes=tuple(data["notes"]),
            implants=tuple(Replacement(**i) for i in data.get("implants", [])),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the report is damaged ({type(error).__name__}: {error}); write it again") from None


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _latency(data: Mapping[str, Any]) -> Latency:
    return Latency(**{**data, **{name: Spread(**data[name]) for name in ("original", "compressed", "ratio")}})


def _lists(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: a.tolist() for name, a in arrays.items()}


def _arrays(lists: Mapping[str, list[float]]) -> dict[str, np.ndarray]:
    return {name: np.array(v, dtype=np.float64) for name, v in lists.items()}
