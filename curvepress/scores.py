"""Scores: what removing each channel is predicted to cost.  Arrays by group, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from .curvature import Estimate, average, gradient, hessian_diagonal
from .objective import Batch, Batches, Loss, batch_size
from .structure import Group, Member, Structure

LOSS_UNIT = "rise of the loss"
RELATIVE_UNIT = "relative"


@dataclass(frozen=True, eq=False)
class Scores:
    """A score for every channel of every free group.

    ``values[group]`` and ``stderr[group]`` are float64 arrays ``[channels]``.  ``unit`` is ``rise of the loss`` for
    predictions in units of the loss, and ``relative`` for scores that only rank.  ``stderr`` is over ``samples``
    independent samples, and zero where a score is exact.
    """

    values: Mapping[str, np.ndarray]
    stderr: Mapping[str, np.ndarray]
    method: str
    unit: str
    samples: int
    seed: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scores) and _flat(self) == _flat(other)


def _flat(scores: Scores) -> tuple[object, ...]:
    arrays = [(g, v.tobytes(), scores.stderr[g].tobytes()) for g, v in scores.values.items()]
    return (arrays, scores.method, scores.unit, scores.samples, scores.seed)


Sample = dict[str, np.ndarray]
"""One independent sample of every score: group -> ``[channels]``."""
Progress = Callable[[int, int], None]
"""Called with (samples done, samples wanted)."""


def score(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    structure: Structure,
    *,
    method: str = "hessian_trace",
    samples: int = 32,
    probes: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    done: MutableMapping[int, Sample] | None = None,
) -> Scores:
    """Scores of every channel of ``structure`` by ``method``, one of :data:`METHODS`.

    Args:
        batches: the calibration batches; the first ``samples`` of them are used, one independent sample each.
        probes: random vectors per batch (``hessian_trace`` only).
        done: samples by number; those in it are not computed again, and new ones are put in, so that long work can go on
            where it stopped.

    Raises:
        ValueError: if the method is unknown, nothing can be cut, there are too few batches, or the loss fails.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not structure.free:
        reasons = sorted({g.frozen for g in structure.groups if g.frozen})
        raise ValueError(f"nothing in this model can be cut: {'; '.join(reasons) or 'it has no weights with channels'}")
    training = model.training
    model.eval()
    try:
        return METHODS[method](model, structure, Task(loss, batches, samples, probes, seed, progress, {} if done is None else done))
    finally:
        model.train(training)


@dataclass(frozen=True)
class Task:
    """The data side of a score: what to average over."""

    loss: Loss
    batches: Batches
    samples: int
    probes: int
    seed: int
    progress: Progress | None
    done: MutableMapping[int, Sample]

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of one sample, the same in whatever order the samples are made."""
        entropy = np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(entropy[0] >> 1))


def hessian_trace(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Relative Hessian trace ``tr(H_c) / p_c * |w_c|^2 / 2``, summed over the weights that make the channel.

    The trace of the true Hessian's block is estimated by Hutchinson's probes (Yu et al., "Hessian-Aware Pruning and
    Optimal Neural Implant", WACV 2022).  ``p_c`` counts the channel's weights in that tensor.
    """
    weights = _weights(model, structure)
    factors = {g.name: [_half_mean_square(m, weights[m.tensor]) for m in _producers(g, weights)] for g in structure.free}

    def sample(number: int, batch: Batch) -> Sample:
        diagonal = hessian_diagonal(model, task.loss, batch, list(weights), probes=task.probes, generator=task.generator(number))
        return {
            g.name: sum(f * per_channel(m, diagonal[m.tensor]) for m, f in zip(_producers(g, weights), factors[g.name], strict=True))
            for g in structure.free
        }

    return _averaged(sample, task, "hessian_trace", LOSS_UNIT)


def taylor(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """First-order Taylor: the mean over batches of ``|g_c . w_c|`` over the weights that make the channel.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8 (without the square).
    """
    weights = _weights(model, structure)

    def sample(number: int, batch: Batch) -> Sample:
        slopes = gradient(model, task.loss, batch, list(weights))
        moved = {n: slopes[n] * w for n, w in weights.items()}
        return {g.name: np.abs(sum(per_channel(m, moved[m.tensor]) for m in _producers(g, weights))) for g in structure.free}

    return _averaged(sample, task, "taylor", LOSS_UNIT)


def magnitude(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Group L2 norm over all members, relative to the mean of its group (Fang et al., DepGraph, CVPR 2023, section 3.3)."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    squares = {n: w.square() for n, w in weights.items()}
    norms = {g.name: np.sqrt(sum(per_channel(m, squares[m.tensor]) for m in g.members if m.tensor in squares)) for g in structure.free}
    return _exact({n: v / (v.mean() or 1.0) for n, v in norms.items()}, "magnitude", task.seed)


def random(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Uniform random scores: the control that every other method must beat."""
    generator = np.random.default_rng(task.seed)
    return _exact({g.name: generator.random(g.size) for g in structure.free}, "random", task.seed)


METHODS: Mapping[str, Callable[[nn.Module, Structure, Task], Scores]] = {f.__name__: f for f in (hessian_trace, taylor, magnitude, random)}


def per_channel(member: Member, tensor: Tensor) -> np.ndarray:
    """Sum of everything each channel owns in ``tensor``: float64 ``[channels]``."""
    sums = tensor.detach().to(torch.float64).movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).sum(1)
    return np.asarray(sums.cpu().numpy()[member.rows].sum(axis=1))


def predicted_rise(scores: Scores, gone: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Predicted rise of the loss when channels ``gone[group]`` are removed, and its standard error (independent channels)."""
    rise = sum(float(scores.values[g][c].sum()) for g, c in gone.items())
    variance = sum(float(np.square(scores.stderr[g][c]).sum()) for g, c in gone.items())
    return rise, variance**0.5


def _weights(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    wanted = {m.tensor for g in structure.free for m in g.producers()}
    return {n: p.detach() for n, p in model.named_parameters() if n in wanted}


def _producers(group: Group, weights: Mapping[str, Tensor]) -> list[Member]:
    return [m for m in group.producers() if m.tensor in weights]


def _half_mean_square(member: Member, weight: Tensor) -> np.ndarray:
    return per_channel(member, weight.square()) / (2 * per_channel(member, torch.ones_like(weight)))


def _averaged(sample: Callable[[int, Batch], Sample], task: Task, method: str, unit: str) -> Scores:
    rows, sizes = [], []
    for number, batch in enumerate(islice(task.batches, task.samples)):
        if number not in task.done:
            task.done[number] = sample(number, batch)
        rows.append(task.done[number])
        sizes.append(batch_size(batch))
        if task.progress:
            task.progress(len(rows), task.samples)
    if len(rows) < 2:
        raise ValueError(f"{method} needs at least 2 calibration batches for its error bars, got {len(rows)}; give more or smaller ones")
    estimates: dict[str, Estimate] = {g: average(np.stack([r[g] for r in rows]), np.array(sizes)) for g in rows[0]}
    for group, e in estimates.items():
        if not np.isfinite(e.mean).all():
            raise ValueError(f"{method} of group {group!r} is not finite; look for overflow in the weights or the loss")
    values, errors = ({g: getattr(e, part) for g, e in estimates.items()} for part in ("mean", "stderr"))
    return Scores(values, errors, method, unit, len(rows), task.seed)


def _exact(values: dict[str, np.ndarray], method: str, seed: int) -> Scores:
    return Scores(values, {g: np.zeros_like(v) for g, v in values.items()}, method, RELATIVE_UNIT, 0, seed)
