"""Measuring a latency table: which widths are timed, where the cliffs are, and what a model takes besides its layers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..files import write_text
from ..latency import FLOAT, Axis, Grid, Layer, Machine, Table, activations, check_machine, layers_seconds, table_from_json, table_to_json
from ..structure import TensorSpec
from .graphs import Case
from .runtimes import RUNTIMES

Timer = Callable[[Sequence[Case]], list[float]]
"""Seconds of each case."""
Tensors = Mapping[str, TensorSpec]
PERIODS, ALIGNS = (1, 4, 8, 16, 32), (1, 2, 4, 8, 16)
WINDOW = 48
"""Widths, up to the whole one, that are timed one by one to find the cliffs."""
TOGETHER = 32
"""Layers that are timed in one go: few enough not to crowd each other's weights out of the caches."""
BLOCKS = 5
"""Blocks of an axis that are measured: all of a narrow layer, some of a wide one."""
MOST_OF_IT = 0.7
CLEAR = 0.05
"""Differences below this share are none."""


def measured_table(
    layers: Mapping[str, Layer], tensors: Tensors, here: Machine, *, bits: Sequence[int] = (FLOAT,), timer: Timer | None = None
) -> Table:
    """The times of all layers, at all widths up to those of the given tensors.

    Layers that are used alike share one grid.  What the model takes besides is still 0: see :func:`calibrated`.

    Raises:
        ValueError: if the runtime cannot run a layer.
    """
    runtime = RUNTIMES[here.runtime]
    run = timer or (lambda cases: runtime.layers(cases, here.threads, here.batch))
    widest = _widest(layers, tensors)
    grids = {(layer, b): _grid(run, layer, b, *wide, coarse=runtime.dear) for b in bits for layer, wide in widest.items()}
    return Table(here, dict(layers), grids)


def _widest(layers: Mapping[str, Layer], tensors: Tensors) -> dict[Layer, tuple[int, int]]:
    found: dict[Layer, tuple[int, int]] = {}
    for name, layer in layers.items():
        own, known = layer.widths(tensors[name].shape), found.get(layer, (0, 0))
        found[layer] = (max(own[0], known[0]), max(own[1], known[1]))
    return found


def _grid(run: Timer, layer: Layer, bits: int, out: int, into: int, *, coarse: bool) -> Grid:
    if coarse:
        outs, ins = (Axis(tuple(sorted({w, -(-w // 2), -(-w // 4)}))) for w in (out, into))
    else:
        outs = axis_of(_line(run, [Case(layer, w, into, bits) for w in _window(out)]), out)
        ins = axis_of(_line(run, [Case(layer, out, w, bits) for w in _window(into)]), into)
    cases = [Case(layer, o, i, bits) for o in outs.knots for i in ins.knots]
    times = np.array(_timed(run, cases)).reshape(len(outs.knots), len(ins.knots))
    return Grid(outs, ins, tuple(map(tuple, times.tolist())))


def _window(width: int) -> range:
    return range(max(1, width - WINDOW + 1), width + 1)


def _line(run: Timer, cases: Sequence[Case]) -> dict[int, float]:
    varied = [c.out for c in cases] if len({c.out for c in cases}) > 1 else [c.into for c in cases]
    return dict(zip(varied, _timed(run, cases), strict=True))


def _timed(run: Timer, cases: Sequence[Case]) -> list[float]:
    """Each set has cases from everywhere, so that none takes all the large ones."""
    sets = max(1, -(-len(cases) // TOGETHER))
    found = np.empty(len(cases))
    for n in range(sets):
        found[n::sets] = run(cases[n::sets])
    return [float(x) for x in found]


def axis_of(line: Mapping[int, float], width: int) -> Axis:
    """The widths worth measuring, up to ``width``, by the times of some of them: both sides of every cliff."""
    align = _align(line)
    period = max(_period({w: t for w, t in line.items() if w % align == 0}), align)
    blocks = np.unique(np.linspace(0, -(-width // period) - 1, min(BLOCKS, -(-width // period))).round().astype(int)).tolist()
    if period == 1:
        return Axis(tuple(sorted({max(1, round(width * part)) for part in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)})))
    inside = {1, align, period // 2, period} | ({period // 2 - 1, period - 1} if align > 1 else set())
    knots = {b * period + k for b in blocks for k in inside} | {width}
    return Axis(tuple(sorted(k for k in knots if 1 <= k <= width)), period, align)


def _align(line: Mapping[int, float]) -> int:
    """The multiple whose widths clearly run faster than their neighbours: 1 where none do."""
    gains = {a: _gain(line, a) for a in ALIGNS[1:]}
    best = max(gains.values(), default=0.0)
    return min((a for a, g in gains.items() if best > CLEAR and g >= 0.3 * best), default=1)


def _gain(line: Mapping[int, float], align: int) -> float:
    """By how much a multiple is quicker than the width before it, which is less work: the lower quartile in the upper half of widths."""
    steps = [1 - line[w] / line[w - 1] for w in line if w % align == 0 and w - 1 in line and 2 * w > max(line)]
    return float(np.quantile(steps, 0.25)) if steps else 0.0


def _period(line: Mapping[int, float]) -> int:
    """The largest multiple after which most of the rise happens, in steps: 1 where it rises evenly or not at all."""
    widths = sorted(line)
    rises = {w: np.log(line[after] / line[w]) for w, after in pairwise(widths)}
    total = sum(rises.values())
    shares = {p: sum(r for w, r in rises.items() if w % p == 0) / total for p in PERIODS[1:]} if total > CLEAR else {}
    return max((p for p, share in shares.items() if share >= MOST_OF_IT), default=1)


def calibrated(table: Table, measured: Sequence[tuple[Tensors, float]], *, bits: Mapping[str, int] | None = None) -> Table:
    """The table with what whole models take besides their layers, fitted to measured seconds of some of them.

    ``measured`` holds the tensors of a model and its seconds, all with their layers at ``bits`` (32 where none are given); relative
    errors count alike.  Both terms are kept from being negative.

    Raises:
        ValueError: if nothing was measured, or a time is not positive and finite.
    """
    seconds = np.array([t for _, t in measured])
    if not len(seconds) or not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ValueError(f"a table is calibrated by measured times above zero; got {seconds.tolist()}")
    from scipy.optimize import nnls

    rest = seconds - [layers_seconds(tensors, table, bits) for tensors, _ in measured]
    terms = np.array([[1.0, activations(tensors, table)] for tensors, _ in measured])
    scale = terms.max(axis=0)
    found, _ = nnls(terms / scale / seconds[:, None], rest / seconds)
    fixed, each = (found / scale).tolist()
    return replace(table, fixed=fixed, each=each)


def table_path(layers: Mapping[str, Layer], tensors: Tensors, here: Machine, bits: Sequence[int] = (FLOAT,)) -> Path:
    """Where the table of such a model on such a machine is kept: ``CURVEPRESS_CACHE``, or the user's cache folder."""
    named = os.environ.get("CURVEPRESS_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "curvepress")
    about = [asdict(here), {n: [asdict(layer), tensors[n].shape] for n, layer in layers.items()}, list(bits)]
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return Path(named).expanduser() / "latency" / f"{key}.json"


def cached_table(path: Path, here: Machine, measure: Callable[[], Table]) -> Table:
    """The table in a file, or, where there is none, a measured one that is kept there.

    Raises:
        ValueError: if the file is damaged, or its table was measured on another machine or otherwise.
    """
    if path.exists():
        try:
            table = table_from_json(path.read_text(encoding="utf-8"))
            check_machine(table, here)
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}; delete the file to have it measured again") from None
        return table
    table = measure()
    write_text(path, table_to_json(table))
    return table
