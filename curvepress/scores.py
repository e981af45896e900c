"""Scores: what removing each channel is predicted to cost.  Arrays by group, with error bars."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from . import curvature
from .curvature import Direction, Part, Progress, Sample, Stop, average
from .gates import gate_slopes
from .objective import Batch, Batches, Loss, batch_loss, batch_size
from .structure import Group, Member, Structure

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


def score(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    structure: Structure,
    *,
    method: str = "mask_curvature",
    samples: int = 32,
    reliability: float | None = None,
    seconds: float | None = None,
    estimator: str = "auto",
    precision: str = "full",
    probes: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    done: MutableMapping[int, Sample] | None = None,
) -> Scores:
    """Scores of every channel of ``structure`` by ``method``, one of :data:`METHODS`.

    Args:
        batches: the calibration batches, one independent sample each.
        samples: at most so many batches.
        reliability: stop earlier when the ranking of the channels is as reliable as this, 0 to 1.
        seconds: stop earlier after so much time.
        estimator: of the curvature (``hessian_trace``, ``mask_curvature``): see :data:`curvepress.curvature.ESTIMATORS`.
        precision: of its passes: full, bfloat16 or float16.
        probes: random vectors a batch, for estimators by random probes.
        temperature: of the output curvature (``mask_curvature``).
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
    stop = Stop(samples=samples, seconds=seconds, reliability=reliability)
    tell, kept = progress or (lambda _: None), {} if done is None else done
    task = Task(loss, batches, stop, seed, estimator, precision, probes, temperature, tell, kept)
    training = model.training
    model.eval()
    try:
        return METHODS[method](model, structure, task)
    finally:
        model.train(training)


def hessian_trace(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Relative Hessian trace ``tr(H_c) / p_c * |w_c|^2 / 2``, summed over the weights that make the channel.

    Source: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022.  ``p_c`` counts the channel's weights in
    that tensor.  The trace is estimated by :func:`curvepress.curvature.estimate`.
    """
    weights = _weights(model, structure)
    makers = {g.name: [m for m in g.producers() if m.tensor in weights] for g in structure.free}
    factors = {g: [_half_mean_square(m, weights[m.tensor]) for m in members] for g, members in makers.items()}
    measures = {
        f"{g} {i}": curvature.Trace((part_of(m, weights[m.tensor]),), len(m.rows)) for g, own in makers.items() for i, m in enumerate(own)
    }

    def decide(sample: Sample) -> Sample:
        return {g: sum((f * sample[f"{g} {i}"] for i, f in enumerate(own)), np.zeros(len(own[0]))) for g, own in factors.items()}

    return _estimated(model, measures, decide, task, "hessian_trace", temperature=1.0)


def mask_curvature(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Curvature along the channel's own removal, ``d' G d / 2``: ``d`` takes every reading of the channel to zero.

    All weights that read the channel move together, so the coupling between them counts, and for a single reader the model's
    outputs are followed exactly to first order in the channel.  A channel that no weight reads is taken by the weights that
    make it.  At a ``task.temperature`` above 1 the output curvature is that of softened probabilities, which lets every example
    count and not only the few that a trained model is unsure of; the values are then no rise of the loss but still in its order.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    measures = {g.name: Direction(tuple(part_of(m, weights[m.tensor]) for m in _readers(g, weights)), g.size) for g in structure.free}
    halved = lambda sample: {g: v / 2 for g, v in sample.items()}  # noqa: E731
    return _estimated(model, measures, halved, task, "mask_curvature", temperature=task.temperature)


def _estimated(
    model: nn.Module,
    measures: Mapping[str, curvature.Measure],
    decide: Callable[[Sample], Sample],
    task: Task,
    method: str,
    *,
    temperature: float,
) -> Scores:
    found = curvature.estimate(
        model,
        task.loss,
        task.batches,
        measures,
        estimator=task.estimator,
        precision=task.precision,
        temperature=temperature,
        probes=task.probes,
        seed=task.seed,
        stop=task.stop,
        decide=decide,
        done=task.done,
        progress=task.progress,
    )
    if found.samples < 2:
        raise ValueError(f"{method} needs at least 2 calibration batches for its error bars, got 1; give more or smaller ones")
    return Scores(found.mean, found.stderr, method, LOSS_UNIT, found.samples, task.seed, "; ".join((str(found), *found.notes)))


def taylor(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """First-order Taylor: the mean over batches of ``|g_c . w_c|`` over the weights that make the channel.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8 (without the square).
    """
    weights = _weights(model, structure)

    def sample(batch: Batch) -> Sample:
        slopes = _gradient(model, task.loss, batch, weights)
        moved = {n: slopes[n] * w for n, w in weights.items()}
        return {g.name: np.abs(sum(per_channel(m, moved[m.tensor]) for m in g.producers() if m.tensor in weights)) for g in structure.free}

    return _averaged(sample, task, "taylor", LOSS_UNIT)


def nvit(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """NViT's squared Taylor: the mean over batches of ``(sum of g * w)^2`` over the weights that make the channel.

    Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023, eq. 7, for the gradient ``g`` of
    the batch's mean loss.  Its latency term is :func:`curvepress.planner.with_latency`.  Only ranks.  The released code also divides
    the sums by constants that are not in the paper (12 for embeddings and heads, 2 for the widths of heads), and adds the readers of
    embeddings; neither is done here.
    """
    weights = _weights(model, structure)

    def sample(batch: Batch) -> Sample:
        slopes = _gradient(model, task.loss, batch, weights)
        moved = {n: slopes[n] * w for n, w in weights.items()}
        made = {g.name: [per_channel(m, moved[m.tensor]) for m in g.producers() if m.tensor in weights] for g in structure.free}
        return {g: np.square(np.sum(parts, axis=0)) for g, parts in made.items()}

    return _averaged(sample, task, "nvit", RELATIVE_UNIT)


def gate_gradient(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """The mean over examples of ``|dL_n/dg_c|``, ``g`` a gate on the channel (see :mod:`curvepress.gates`).

    Source: Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019, eq. 2, for any channel.
    """
    sample = lambda batch: {  # noqa: E731
        g: np.asarray(s.abs().mean(0).cpu()) for g, s in gate_slopes(model, structure, task.loss, batch).items()
    }
    return _averaged(sample, task, "gate_gradient", LOSS_UNIT)


def michel(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """:func:`gate_gradient`, each group (the heads of a layer) divided by its L2 norm, as Michel et al. do before ranking all layers."""
    found = gate_gradient(model, structure, task)
    norms = {g: float(np.linalg.norm(v)) or 1.0 for g, v in found.values.items()}
    values, errors = ({g: v / norms[g] for g, v in part.items()} for part in (found.values, found.stderr))
    return Scores(values, errors, "michel", RELATIVE_UNIT, found.samples, task.seed)


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


_ALL = (mask_curvature, hessian_trace, taylor, nvit, gate_gradient, michel, magnitude, random)
METHODS: Mapping[str, Callable[[nn.Module, Structure, Task], Scores]] = {f.__name__: f for f in _ALL}
SHARED = (hessian_trace.__name__, mask_curvature.__name__)
"""Methods whose samples several processes can share out."""


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


def part_of(member: Member, weight: Tensor) -> Part:
    """The elements of ``weight`` under the number of the channel that owns them.

    Raises:
        ValueError: if two channels own the same element.
    """
    labels = np.full(weight.shape[member.dim], -1)
    labels[member.rows.ravel()] = np.repeat(np.arange(len(member.rows)), member.rows.shape[1])
    return curvature.along(member.tensor, weight.shape, member.dim, labels)


def _readers(group: Group, weights: Mapping[str, Tensor]) -> list[Member]:
    readers = [m for m in group.members if m.role == "in" and m.tensor in weights]
    return readers or [m for m in group.producers() if m.tensor in weights]


def _gradient(model: nn.Module, loss: Loss, batch: Batch, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    with curvature.only(model, list(weights)):
        slopes = torch.autograd.grad(batch_loss(model, loss, batch), [own[n] for n in weights], allow_unused=True)
    return {n: torch.zeros_like(w) if s is None else s for (n, w), s in zip(weights.items(), slopes, strict=True)}


def _half_mean_square(member: Member, weight: Tensor) -> np.ndarray:
    return per_channel(member, weight.square()) / (2 * per_channel(member, torch.ones_like(weight)))


def _averaged(sample: Callable[[Batch], Sample], task: Task, method: str, unit: str) -> Scores:
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


def _exact(values: dict[str, np.ndarray], method: str, seed: int) -> Scores:
    return Scores(values, {g: np.zeros_like(v) for g, v in values.items()}, method, RELATIVE_UNIT, 0, seed)
