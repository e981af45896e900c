"""Scores as data, and the task they are estimated on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from .. import curvature
from ..curvature import Part, Progress, Sample, Stop, average
from ..objective import Batch, Batches, Loss, batch_loss, batch_size
from ..structure import Group, Member

LOSS_UNIT = "rise of the loss"
RELATIVE_UNIT = "relative"


@dataclass(frozen=True, eq=False)
class Scores:
    """A score for every channel of every free group.

    ``values[group]`` and ``stderr[group]`` are float64 arrays ``[channels]``.  ``unit`` is ``rise of the loss`` for
    predictions in units of the loss, and ``relative`` for scores that only rank.  ``stderr`` is over ``samples``
    independent samples, and zero where a score is exact.  ``detail`` says in words how they came about.
    """

    values: Mapping[str, np.ndarray]
    stderr: Mapping[str, np.ndarray]
    method: str
    unit: str
    samples: int
    seed: int
    detail: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scores) and _flat(self) == _flat(other)


def _flat(scores: Scores) -> tuple[object, ...]:
    arrays = [(g, v.tobytes(), scores.stderr[g].tobytes()) for g, v in scores.values.items()]
    return (arrays, scores.method, scores.unit, scores.samples, scores.seed)


@dataclass(frozen=True)
class Task:
    """The data side of a score: what to average over, how, and for how long."""

    loss: Loss
    batches: Batches
    stop: Stop
    seed: int = 0
    estimator: str = "auto"
    precision: str = "full"
    probes: int = 4
    temperature: float = 1.0
    progress: Callable[[Progress], None] = lambda _: None
    done: MutableMapping[int, Sample] = field(default_factory=dict)


def per_channel(member: Member, tensor: Tensor) -> np.ndarray:
    """Sum of everything each channel owns in ``tensor``: float64 ``[channels]``."""
    sums = tensor.detach().to(torch.float64).movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).sum(1)
    return np.asarray(sums.cpu().numpy()[member.rows].sum(axis=1))


def predicted_rise(scores: Scores, gone: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Predicted rise of the loss when channels ``gone[group]`` are removed, and its standard error (independent channels)."""
    rise = sum(float(scores.values[g][c].sum()) for g, c in gone.items())
    variance = sum(float(np.square(scores.stderr[g][c]).sum()) for g, c in gone.items())
    return rise, variance**0.5


def part_of(member: Member, weight: Tensor) -> Part:
    """The elements of ``weight`` under the number of the channel that owns them.

    Raises:
        ValueError: if two channels own the same element.
    """
    labels = np.full(weight.shape[member.dim], -1)
    labels[member.rows.ravel()] = np.repeat(np.arange(len(member.rows)), member.rows.shape[1])
    return curvature.along(member.tensor, weight.shape, member.dim, labels)


def readers(group: Group, weights: Mapping[str, Tensor]) -> list[Member]:
    """The weights that read the group's channels; where none does, those that make them."""
    found = [m for m in group.members if m.role == "in" and m.tensor in weights]
    return found or [m for m in group.producers() if m.tensor in weights]


def gradient(model: nn.Module, loss: Loss, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The slope of the batch's loss for each of ``weights``; zero for those it does not depend on."""
    own = dict(model.named_parameters())
    with curvature.only(model, list(weights)):
        slopes = torch.autograd.grad(batch_loss(model, loss, batch), [own[n] for n in weights], allow_unused=True)
    return {n: torch.zeros_like(w) if s is None else s for (n, w), s in zip(weights.items(), slopes, strict=True)}


def averaged(sample: Callable[[Batch], Sample], task: Task, method: str, unit: str) -> Scores:
    """Scores that are means of what ``sample`` finds for each batch."""
    rows, sizes, started = [], [], time.perf_counter()
    wanted = task.stop.samples
    for number, batch in enumerate(islice(task.batches, wanted)):
        if number not in task.done:
            task.done[number] = sample(batch)
        rows.append(task.done[number])
        sizes.append(batch_size(batch))
        seconds = time.perf_counter() - started
        left = seconds * (wanted / len(rows) - 1) if wanted else None
        task.progress(Progress(len(rows), wanted, sum(sizes), seconds, left, 0, None))
        if task.stop.seconds is not None and seconds >= task.stop.seconds:
            break
    if len(rows) < 2:
        raise ValueError(f"{method} needs at least 2 calibration batches for its error bars, got {len(rows)}; give more or smaller ones")
    estimates = {g: average(np.stack([r[g] for r in rows]), np.array(sizes)) for g in rows[0]}
    for group, e in estimates.items():
        if not np.isfinite(e.mean).all():
            raise ValueError(f"{method} of group {group!r} is not finite; look for overflow in the weights or the loss")
    values, errors = ({g: getattr(e, part) for g, e in estimates.items()} for part in ("mean", "stderr"))
    return Scores(values, errors, method, unit, len(rows), task.seed)


def exact(values: dict[str, np.ndarray], method: str, seed: int) -> Scores:
    """Scores without error that only rank."""
    return Scores(values, {g: np.zeros_like(v) for g, v in values.items()}, method, RELATIVE_UNIT, 0, seed)
