"""How well an estimate ranks channels, and how many more probes of the same kind a given agreement would take."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.stats import rankdata

GRID = 1.08


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation of two vectors, ties at their mean rank."""
    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def overlap(a: np.ndarray, b: np.ndarray, share: float = 0.5) -> float:
    """The share of the ``share`` least of ``b`` that is among the ``share`` least of ``a``."""
    count = int(share * len(a))
    return len(np.intersect1d(np.argsort(a)[:count], np.argsort(b)[:count])) / count


def resampled(probes: np.ndarray, exact: np.ndarray, count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of ``count`` probes each, ``[draws, channels]``, by a centred bootstrap of recorded ``probes`` ``[probes, channels]``.

    The recorded probes are shifted to have ``exact`` as their mean, so that their own error is not taken for a bias (Efron
    and Tibshirani, "An Introduction to the Bootstrap", 1993); then ``count`` are drawn with replacement.
    """
    times = rng.multinomial(count, np.full(len(probes), 1 / len(probes)), size=draws)
    return times / count @ (probes - probes.mean(0)) + exact


def agreement(probes: np.ndarray, exact: np.ndarray, truth: np.ndarray, count: int, *, draws: int = 40, seed: int = 0) -> np.ndarray:
    """Rank correlations ``[draws]`` of means of ``count`` resampled probes with ``truth`` ``[channels]``."""
    means = resampled(probes, exact, count, draws, np.random.default_rng((seed, count)))
    return np.array([spearman(m, truth) for m in means])


def needed(probes: np.ndarray, exact: np.ndarray, level: float, *, most: int = 1_000_000, draws: int = 40) -> int:
    """The least number of probes, on a grid of 8 % steps, at which the median rank correlation with ``exact`` is ``level``.

    Raises:
        ValueError: if not even ``most`` probes suffice.
    """
    for count in _grid(most):
        if np.median(agreement(probes, exact, exact, count, draws=draws)) >= level:
            return count
    raise ValueError(f"not even {most} probes reach a rank correlation of {level}; ask for less or allow more")


def _grid(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count = max(count + 1, int(count * GRID))
