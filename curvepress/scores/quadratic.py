"""Prices by the curvature of the loss: quadratic forms along what the removal of a channel would move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from .. import curvature
from ..curvature import Curvature, Direction, Measure, Sample, average
from ..objective import Batch, batch_size
from ..structure import Group, Member, Structure
from .data import LOSS_UNIT, Scores, Task, gradient, part_of, per_channel, readers


def hessian_trace(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Relative Hessian trace ``tr(H_c) / p_c * |w_c|^2 / 2``, summed over the weights that make the channel.

    Source: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022.  ``p_c`` counts the channel's weights in
    that tensor.  The trace is estimated by :func:`curvepress.curvature.estimate`.
    """
    weights = made_by(model, structure)
    makers = {g.name: [m for m in g.producers() if m.tensor in weights] for g in structure.free}
    factors = {g: [half_mean_square(m, weights[m.tensor]) for m in members] for g, members in makers.items()}
    measures = {
        f"{g} {i}": curvature.Trace((part_of(m, weights[m.tensor]),), len(m.rows)) for g, own in makers.items() for i, m in enumerate(own)
    }

    def decide(sample: Sample) -> Sample:
        return {g: sum((f * sample[f"{g} {i}"] for i, f in enumerate(own)), np.zeros(len(own[0]))) for g, own in factors.items()}

    return _scores(estimated(model, measures, decide, task, "hessian_trace", temperature=1.0), task, "hessian_trace")


def mask_curvature(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Curvature along the channel's own removal, ``d' G d / 2``: ``d`` takes every reading of the channel to zero.

    All weights that read the channel move together, so the coupling between them counts, and for a single reader the model's
    outputs are followed exactly to first order in the channel.  A channel that no weight reads is taken by the weights that
    make it.  At a ``task.temperature`` above 1 the output curvature is that of softened probabilities, which lets every example
    count and not only the few that a trained model is unsure of; the values are then no rise of the loss but still in its order.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    measures = {g.name: removal(g, weights) for g in structure.free}
    found = estimated(model, measures, _halved, task, "mask_curvature", temperature=task.temperature)
    return _scores(found, task, "mask_curvature")


def diagonal(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Sum of ``C_ii w_i^2 / 2`` over the weights that read the channel: each weight by its own curvature, without coupling.

    Source: LeCun, Denker & Solla, "Optimal brain damage", NIPS 1989, eq. 5, summed over the channel.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    own = {g.name: readers(g, weights) for g in structure.free}
    measures = {n: curvature.elements(n, weights[n]) for n in sorted({m.tensor for ms in own.values() for m in ms})}

    def decide(sample: Sample) -> Sample:
        moved = {n: torch.as_tensor(sample[n]).reshape(weights[n].shape) * weights[n].double().cpu().square() / 2 for n in measures}
        return {g: np.asarray(sum(per_channel(m, moved[m.tensor]) for m in ms)) for g, ms in own.items()}

    return _scores(estimated(model, measures, decide, task, "diagonal", temperature=task.temperature), task, "diagonal")


def second_order(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """``g' d + d' G d / 2`` along the channel's removal: :func:`mask_curvature` with the slope, for models that are not at a minimum.

    Values may be negative: where the removal is predicted to lower the loss.  Standard errors take slope and curvature, which come of the
    same batches, as independent.  Source: LeCun, Denker & Solla, "Optimal brain damage", NIPS 1989, eq. 1.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    own = {g.name: readers(g, weights) for g in structure.free}
    watched = {m.tensor: weights[m.tensor] for ms in own.values() for m in ms}
    slopes: list[Sample] = []
    sizes: list[int] = []

    def passing() -> Iterator[Batch]:
        for batch in task.batches:
            slope = gradient(model, task.loss, batch, watched)
            moved = {n: -slope[n] * w for n, w in watched.items()}
            slopes.append({g: np.asarray(sum(per_channel(m, moved[m.tensor]) for m in ms)) for g, ms in own.items()})
            sizes.append(batch_size(batch))
            yield batch

    curved = mask_curvature(model, structure, replace(task, batches=passing()))
    means = {g: average(np.stack([s[g] for s in slopes]), np.array(sizes)) for g in own}
    values = {g: means[g].mean + curved.values[g] for g in own}
    errors = {g: np.hypot(means[g].stderr, curved.stderr[g]) for g in own}
    return replace(curved, values=values, stderr=errors, method="second_order")


def _halved(sample: Sample) -> Sample:
    return {g: v / 2 for g, v in sample.items()}


def removal(group: Group, weights: Mapping[str, Tensor]) -> Direction:
    """The direction in which each channel's readings go to zero."""
    return Direction(tuple(part_of(m, weights[m.tensor]) for m in readers(group, weights)), group.size)


def estimated(
    model: nn.Module, measures: Mapping[str, Measure], decide: Callable[[Sample], Sample], task: Task, method: str, *, temperature: float
) -> Curvature:
    """The curvature that ``task`` asks for, from two batches or more."""
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
    return found


def _scores(found: Curvature, task: Task, method: str) -> Scores:
    return Scores(found.mean, found.stderr, method, LOSS_UNIT, found.samples, task.seed, "; ".join((str(found), *found.notes)))


def half_mean_square(member: Member, weight: Tensor) -> np.ndarray:
    """``|w_c|^2 / (2 p_c)`` of every channel: what makes its price of the trace of its curvature."""
    return per_channel(member, weight.square()) / (2 * per_channel(member, torch.ones_like(weight)))


def made_by(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """The weights that make the channels that may go."""
    wanted = {m.tensor for g in structure.free for m in g.producers()}
    return {n: p.detach() for n, p in model.named_parameters() if n in wanted}
