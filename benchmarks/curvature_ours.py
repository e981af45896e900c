"""curvepress' own estimators in the comparison: generators of traces of every channel, as the peers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.curvature_task import Batch, Task, weights
from curvepress import curvature

PROBES = 12
SHARD = 512
APART = 8_192
BATCH = 128


def traces(model: nn.Module, batches: Any, **settings: Any) -> np.ndarray:
    """Traces of all channels ``[channels]`` in the order of ``weights``; ``settings`` are those of ``curvature.estimate``."""
    measures = {n: curvature.output_channels(n, w) for n, w in weights(model).items()}
    found = curvature.estimate(model, F.cross_entropy, batches, measures, **settings)
    return np.concatenate([found.mean[n] for n in measures])


def twice(batch: Batch, model: nn.Module, **settings: Any) -> Iterator[np.ndarray]:
    """One estimate from one batch, then the same again in a process that is warm."""
    for _ in range(2):
        yield traces(model, [batch], **settings)


def probed(batch: Batch, model: nn.Module, seed: int, **settings: Any) -> Iterator[np.ndarray]:
    """Hutchinson's estimate on the Hessian: one probe, which warms up, then 12 in one call."""
    for probes in (1, PROBES):
        yield traces(model, [batch], estimator="hessian", probes=probes, seed=seed, **settings)


def population(
    images: int | None = None, reliability: float | None = None, again: int = 2, **settings: Any
) -> Callable[[Task, int], Iterator[np.ndarray]]:
    """An estimate, ``again`` times, from images that come in batches of 512 until there are so many, or the ranking is that reliable.

    Every seed has its own 8,192 images, none of which is in the population or in a fixed batch of the first rounds.
    """

    def steps(work: Task, seed: int) -> Iterator[np.ndarray]:
        offset = seed * APART % 24_576 + 1_024
        stop = curvature.Stop(examples=images, reliability=reliability)
        for _ in range(again):
            batches = (work.pool(SHARD, offset + i) for i in range(0, APART, SHARD))
            yield traces(work.model, batches, seed=seed, stop=stop, **settings)

    return steps


def by_unit_vectors(model: nn.Module, batch: Batch, name: str, channel: int) -> float:
    """The trace of one channel's block of the true Hessian: a Hessian-vector product with each of its unit vectors."""
    weight = weights(model)[name].requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), [weight], create_graph=True)
    rows = (torch.autograd.grad(s, [weight], retain_graph=True)[0][channel].flatten() for s in slope[channel].flatten())
    return sum(float(row[i]) for i, row in enumerate(rows))


def equality(work: Task, images: int = 2) -> dict[str, float]:
    """The exact estimate against unit vectors in float64, for one channel of every sixth layer: their relative differences by name."""
    inputs, targets = work.pool(images)
    model, batch = work.model.double(), (inputs.double(), targets)
    found = dict(zip(weights(model), np.split(traces(model, [batch], estimator="exact"), _ends(model)), strict=True))
    differences = {}
    for name in list(weights(model))[::6]:
        channel = int(np.argmax(found[name]))
        truth = by_unit_vectors(model, batch, name, channel)
        differences[f"{name}[{channel}]"] = abs(found[name][channel] / truth - 1)
    return differences


def _ends(model: nn.Module) -> list[int]:
    return np.cumsum([len(w) for w in weights(model).values()])[:-1].tolist()
