"""Integer programs, solved exactly by HiGHS (through SciPy) without its remarks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

from scipy.optimize import milp


def solved(costs: Any, **program: Any) -> Any:
    """What :func:`scipy.optimize.milp` returns, with nothing written to the standard output."""
    with _silence():
        return milp(costs, **program)


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS writes past Python, whatever its options say."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    sys.stdout.flush()
    with TemporaryFile() as aside:
        os.dup2(aside.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
