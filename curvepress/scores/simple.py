"""Scores that need no curvature: measured, first-order Taylor, magnitude, random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..curvature import Sample
from ..objective import Batch, Loss, arguments, batch_loss, checked_loss
from ..structure import Member, Structure
from .data import LOSS_UNIT, Scores, Task, averaged, exact, gradient, per_channel, readers
from .quadratic import made_by


def measured(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """The rise of the loss when the channel's readings are set to zero, measured: the truth about single removals before repair.

    One forward pass for each channel and batch, so it is for small models, and to judge the predictions by.  It is what the pruned model
    computes, but for norms over the channels themselves, which run over those that are left there.
    """
    weights = dict(model.named_parameters())
    own = {g.name: readers(g, weights) for g in structure.free}

    def sample(batch: Batch) -> Sample:
        with torch.no_grad():
            before = batch_loss(model, task.loss, batch)
            found = {g: [_without(model, weights, ms, c, task.loss, batch) for c in range(len(ms[0].rows))] for g, ms in own.items()}
        return {g: np.array([float(after - before) for after in rows]) for g, rows in found.items()}

    return averaged(sample, task, "measured", LOSS_UNIT)


def _without(model: nn.Module, weights: Mapping[str, Tensor], members: Sequence[Member], channel: int, loss: Loss, batch: Batch) -> Tensor:
    """The loss of the model that does not read a channel."""
    moved = dict(weights)
    for m in members:
        rows = torch.as_tensor(m.rows[channel], device=weights[m.tensor].device)
        moved[m.tensor] = moved[m.tensor].index_fill(m.dim, rows, 0)
    positional, named = arguments(batch[0])
    return checked_loss(loss, functional_call(model, moved, positional, named), batch[1])


def taylor(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """First-order Taylor: the mean over batches of ``|g_c . w_c|`` over the weights that make the channel.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq. 8 (without the square).
    """
    weights = made_by(model, structure)

    def sample(batch: Batch) -> Sample:
        slopes = gradient(model, task.loss, batch, weights)
        moved = {n: slopes[n] * w for n, w in weights.items()}
        return {g.name: np.abs(sum(per_channel(m, moved[m.tensor]) for m in g.producers() if m.tensor in weights)) for g in structure.free}

    return averaged(sample, task, "taylor", LOSS_UNIT)


def magnitude(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Group L2 norm over all members, relative to the mean of its group (Fang et al., DepGraph, CVPR 2023, section 3.3)."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    squares = {n: w.square() for n, w in weights.items()}
    norms = {g.name: np.sqrt(sum(per_channel(m, squares[m.tensor]) for m in g.members if m.tensor in squares)) for g in structure.free}
    return exact({n: v / (v.mean() or 1.0) for n, v in norms.items()}, "magnitude", task.seed)


def random(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """Uniform random scores: the control that every other method must beat."""
    generator = np.random.default_rng(task.seed)
    return exact({g.name: generator.random(g.size) for g in structure.free}, "random", task.seed)
