"""What a piece of work takes: processor and wall-clock seconds, and peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Taken:
    """Seconds of processor and wall clock, and the peak of resident memory in MiB; filled in when the work is done."""

    cpu: float = 0.0
    wall: float = 0.0
    peak: float = 0.0


@contextmanager
def metered() -> Iterator[Taken]:
    """Meter the body of a ``with``.  Where the system cannot reset its peak, the peak is that of the process so far."""
    taken, wall, cpu = Taken(), time.perf_counter(), time.process_time()
    _reset_peak()
    yield taken
    taken.cpu, taken.wall, taken.peak = time.process_time() - cpu, time.perf_counter() - wall, _peak()


def clock(seconds: float) -> str:
    """A duration, roughly."""
    if seconds < 1:
        return "less than 1 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _reset_peak() -> None:
    try:
        RESET.write_text("5")
    except OSError:
        return


def _peak() -> float:
    try:
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
