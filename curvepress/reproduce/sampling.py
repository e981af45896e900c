"""One batch and many random vectors, as HAP and EHAP take them, in samples that have an error bar."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..curvature.trees import concatenated, examples, leaves, rows
from ..objective import Batch, Batches

MOST = 8
"""Samples that the random vectors of one batch are divided into, at most."""


@dataclass(frozen=True)
class Drawn:
    """Batches to take samples from, and the random vectors of each sample."""

    batches: list[Batch]
    probes: int


def one_batch(batches: Batches, count: int, probes: int) -> Drawn:
    """The first ``count`` examples as one batch, as many times as makes ``probes`` vectors in all; a single vector is drawn once more.

    Examples of several lengths cannot be one batch: they stay in the batches they come in, each with all vectors of its own.
    """
    found = list(_first(batches, count))
    columns = zip(*(leaves(b[0]) for b in found), strict=True)
    if any(len({t.shape[1:] for t in column}) > 1 for column in columns):
        return Drawn(found, probes)
    whole = (concatenated([b[0] for b in found]), concatenated([b[1] for b in found]))
    times = max((n for n in range(2, MOST + 1) if probes % n == 0), default=max(probes, 2))
    return Drawn([whole] * times, max(1, probes // times))


def apart(batches: Batches, count: int) -> Drawn:
    """The first ``count`` examples in batches of their own, for estimators without random vectors."""
    return Drawn(list(_first(batches, count)), 1)


def _first(batches: Batches, count: int) -> Iterator[Batch]:
    for batch in batches:
        size = examples(batch[0])
        if size > count:
            index = torch.arange(count)
            batch = rows(batch[0], index), rows(batch[1], index)
        yield batch
        count -= min(size, count)
        if not count:
            return
