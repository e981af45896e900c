"""Means with error bars over independent samples, and how far a decision taken on them can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

SPLITS = 16


@dataclass(frozen=True)
class Estimate:
    """``mean`` and its standard error ``stderr``, arrays of the shape of one sample, over ``samples`` samples.

    A single sample says nothing about its error: ``stderr`` is then NaN.
    """

    mean: np.ndarray
    stderr: np.ndarray
    samples: int


def average(rows: np.ndarray, sizes: np.ndarray) -> Estimate:
    """Mean of ``rows`` ``[samples, ...]``, each weighted by the number of examples behind it, and its standard error.

    The standard error is that of a ratio of means (Cochran, "Sampling Techniques", 1977, eq. 6.13); for samples of equal
    size it is the usual ``s / sqrt(n)``.
    """
    share = (sizes / sizes.sum()).reshape(-1, *[1] * (rows.ndim - 1))
    mean = (share * rows).sum(axis=0)
    count = len(rows)
    if count < 2:
        return Estimate(mean, np.full_like(mean, np.nan), count)
    spread = np.square(share * (rows - mean)).sum(axis=0) * count / (count - 1)
    return Estimate(mean, np.sqrt(spread), count)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors; 0 where one of them is constant."""
    x, y = rankdata(a), rankdata(b)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0


def overlap(a: np.ndarray, b: np.ndarray, share: float) -> float:
    """How much of the lowest ``share`` of ``a`` is also among the lowest of ``b``: 0 to 1."""
    count = max(1, round(share * len(a)))
    return len({*np.argsort(a, kind="stable")[:count]} & {*np.argsort(b, kind="stable")[:count]}) / count


def split_half(rows: np.ndarray, sizes: np.ndarray, agreement: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Mean ``agreement`` of the weighted means of two halves of ``rows`` ``[samples, values]``, over random balanced splits.

    The splits come from a fixed seed, so the same rows give the same answer wherever they were computed.
    """
    generator = np.random.default_rng(0)
    weighted = rows * sizes[:, None]
    found = []
    for _ in range(SPLITS):
        order = generator.permutation(len(rows))
        halves = order[: len(rows) // 2], order[len(rows) // 2 :]
        found.append(agreement(*(weighted[h].sum(axis=0) / sizes[h].sum() for h in halves)))
    return float(np.mean(found))


def reliability(rows: np.ndarray, sizes: np.ndarray) -> float:
    """Reliability of the ranking by the mean of all ``rows`` ``[samples, values]``.

    Split-half rank correlation ``r``, stepped up to the full length by the Spearman-Brown formula ``2r / (1 + r)``
    (Spearman 1910, Brown 1910).
    """
    r = split_half(rows, sizes, spearman)
    return 2 * r / (1 + r) if r > 0 else 0.0


def stability(rows: np.ndarray, sizes: np.ndarray, share: float) -> float:
    """Mean overlap of the sets of the lowest ``share`` of the values that two halves of ``rows`` choose: a pessimistic
    figure for the set that all rows choose, as each half has only half of the data."""
    return split_half(rows, sizes, lambda a, b: overlap(a, b, share))
