"""How long exported files take to run: taken in turns, so that whatever else the machine does falls on all of them alike.

Every reading opens its file anew.  A file opened once keeps the memory it happened to get, and two copies of one file
then differ by several percent for as long as they stay open, which no number of readings averages out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from torch.utils import _pytree

from ..objective import arguments
from .onnx import feeds, input_names, open_session

Arguments = tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]
"""Inputs in order, and by name."""

SLICE = 0.01
"""Seconds that one reading lasts: many runs of a fast model, one run of a slow one."""
WARM = 3
"""Runs before a reading, one alone where it takes longer than a reading."""
FEWEST = 5
"""Rounds that are taken however long they last: fewer have no quartiles to speak of."""


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One file at one batch size.

    ``wall`` and ``cpu`` are milliseconds per batch.  ``ratio`` is the wall time over that of the first file in the
    same round.  All are over ``rounds`` rounds.
    """

    name: str
    batch: int
    threads: int
    rounds: int
    wall: Quartiles
    cpu: Quartiles
    ratio: Quartiles


def compare_latency(
    paths: Mapping[str, str | Path],
    example: Any,
    *,
    threads: int = 1,
    rounds: int = 40,
    batches: Sequence[int] = (1, 64),
    seconds: float = 8.0,
) -> tuple[Timing, ...]:
    """Timings of each file at each batch size, in the order of ``batches`` and then of ``paths``.

    Every round opens, warms and times every file, forwards in one round and backwards in the next.  The first file is
    what the others are compared with.

    Args:
        paths: ONNX files by name.
        example: an array, arrays by the names of the inputs, or several in order, the last of which may be such a mapping; dimension 0
            counts examples and is repeated to each batch size.
        threads: threads that ONNX Runtime may use within an operator.
        rounds: readings of every file at every batch size; fewer, but at least five, where ``seconds`` would be exceeded.
        seconds: wall-clock time to aim at for the whole comparison.

    Raises:
        ValueError: if there is no file or no batch size, or a file cannot be opened or does not take a batch size.
    """
    if not paths or not batches or min(*batches, threads, rounds) < 1:
        raise ValueError(f"give at least one file, batch size, thread and round; got {list(paths)}, {list(batches)}, {threads}, {rounds}")
    inputs = arguments(example)
    found: list[Timing] = []
    for size in batches:
        readings = _readings(paths, threads, _pytree.tree_map(partial(_repeated, size=size), inputs), rounds, seconds / len(batches))
        found += [_timing(name, size, threads, readings[:, n], readings[:, 0]) for n, name in enumerate(paths)]
    return tuple(found)


def faster(timing: Timing) -> bool | None:
    """Whether the file is faster than the first one: ``None`` where the middle half of the paired ratios holds 1."""
    if timing.ratio.high < 1:
        return True
    return False if timing.ratio.low > 1 else None


def quickest(times: Sequence[float]) -> float:
    """The mean of the quickest quarter: what a run takes when nothing disturbs it."""
    ordered = np.sort(np.asarray(times))
    return float(ordered[: max(1, len(ordered) // 4)].mean())


def _readings(paths: Mapping[str, str | Path], threads: int, inputs: Arguments, rounds: int, seconds: float) -> np.ndarray:
    """Seconds per run ``[rounds, files, 2]``: wall-clock and processor."""
    files, start = list(paths.values()), time.perf_counter()
    taken: list[np.ndarray] = []
    while len(taken) < rounds and (len(taken) < FEWEST or time.perf_counter() - start < seconds):
        turn = -1 if len(taken) % 2 else 1
        taken.append(np.array([_reading(file, threads, inputs) for file in files[::turn]])[::turn])
    return np.stack(taken)


def _reading(path: str | Path, threads: int, inputs: Arguments) -> tuple[float, float]:
    """Wall-clock and processor seconds of one run, the mean over one reading."""
    session = open_session(path, threads)
    given = _feeds(Path(path).name, session, inputs)
    once = _run(session, given, 1)[0]
    if once < SLICE:
        once = min(_run(session, given, 1)[0] for _ in range(WARM - 1))
    return _run(session, given, max(1, round(SLICE / once)))


def _run(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray], times: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        session.run(None, feeds)
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def _timing(name: str, batch: int, threads: int, own: np.ndarray, first: np.ndarray) -> Timing:
    wall, cpu = _quartiles(own[:, 0] * 1000), _quartiles(own[:, 1] * 1000)
    return Timing(name, batch, threads, len(own), wall, cpu, _quartiles(own[:, 0] / first[:, 0]))


def _quartiles(values: np.ndarray) -> Quartiles:
    return Quartiles(*(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))))


def _repeated(x: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(x[np.arange(size) % len(x)])


def _feeds(name: str, session: onnxruntime.InferenceSession, inputs: Arguments) -> dict[str, np.ndarray]:
    given = feeds(name, input_names(session), (*inputs[0], inputs[1]))
    for i in session.get_inputs():
        if i.shape and isinstance(i.shape[0], int) and i.shape[0] != len(given[i.name]):
            raise ValueError(f"{name} takes batches of {i.shape[0]} only, not {len(given[i.name])}; give batches=({i.shape[0]},)")
    return given
