"""The published systems beside curvepress's own way, at equal budgets and with the same recovery; small corners first.

    python -m benchmarks.reproduce run                      # every cell that has no record; resumes
    python -m benchmarks.reproduce run --parts hap --minutes 8
    python -m benchmarks.reproduce list                     # the cells, and which are done
    python -m benchmarks.reproduce_page write               # docs/results.md, docs/reproduce.md and their figures, from the records

Test images are looked at once for each configuration, and nothing is chosen by them.  Where a table has a fine-tune it is the same for
every row: SGD with Nesterov momentum 0.9, learning rate 0.01 falling as a cosine, weight decay 1e-4, batch 128, flips and crops,
bfloat16, no teacher, from statistics re-estimated on 2,048 training images.  Needs the data of the recipes (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, reproduce_bits, reproduce_channels, reproduce_pipelines

FILE = Path(__file__).parent / "results" / "reproduce.jsonl"


@dataclass(frozen=True)
class Cell:
    """One configuration: what it is, and how its figures are measured."""

    key: Mapping[str, Any]
    measure: Callable[[Mapping[str, Any]], records.Record]


def cells(parts: Sequence[str]) -> list[Cell]:
    """The cells of some parts, the small and decisive ones first."""
    found = [*reproduce_channels.cells(), *reproduce_bits.cells(), *reproduce_pipelines.cells()]
    ordered = sorted(found, key=lambda c: c[0])
    return [Cell(key, measure) for _, key, measure in ordered if not parts or key["part"] in parts]


def done(key: Mapping[str, Any]) -> bool:
    """Whether a cell has its record."""
    return any(all(r.get(k) == v for k, v in key.items()) for r in records.read(FILE))


def run(parts: Sequence[str], minutes: float) -> None:
    """Measure what has no record, until the time is over; the cell that is being measured is finished."""
    torch.set_num_threads(1)
    start = time.monotonic()
    for cell in cells(parts):
        if not done(cell.key) and reproduce_pipelines.able(cell.key) and time.monotonic() - start < 60 * minutes:
            record = records.once(FILE, dict(cell.key), lambda cell=cell: timed(cell))
            print({k: v for k, v in record.items() if not isinstance(v, (dict, list))}, flush=True)


def timed(cell: Cell) -> records.Record:
    """The figures of a cell, and the processor seconds that they took, those of commands included."""
    start = sum(os.times()[:4])
    return {**cell.measure(cell.key), "cpu_seconds": round(sum(os.times()[:4]) - start, 1)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "list"))
    parser.add_argument("--parts", nargs="*", default=[], help="hap, agreement, hawq, pipeline, nvit; all if none is given")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    given = parser.parse_args()
    if given.what == "run":
        run(given.parts, given.minutes)
    else:
        for cell in cells(given.parts):
            print("done   " if done(cell.key) else "missing", dict(cell.key))


if __name__ == "__main__":
    main()
