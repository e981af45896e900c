"""Means with error bars over independent samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """``mean`` and its standard error ``stderr``, arrays of the shape of one sample, over ``samples`` samples."""

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
    spread = np.square(share * (rows - mean)).sum(axis=0) * count / (count - 1)
    return Estimate(mean, np.sqrt(spread), count)
