"""Scores from slopes of the loss, for comparison with those from its curvature."""

from __future__ import annotations

import numpy as np
from torch import nn

from ..curvature import Sample
from ..objective import Batch
from ..structure import Structure
from .data import LOSS_UNIT, RELATIVE_UNIT, Scores, Task, averaged, gradient, per_channel
from .gates import gate_slopes
from .quadratic import made_by


def nvit(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """NViT's squared Taylor: the mean over batches of ``(sum of g * w)^2`` over the weights that make the channel.

    Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023, eq. 7, for the gradient ``g`` of
    the batch's mean loss.  Its latency term is ``planner.channels.with_latency``.  Only ranks.  The released code also divides the sums by
    constants that are not in the paper (12 for embeddings and heads, 2 for the widths of heads), and adds the readers of embeddings;
    neither is done here.
    """
    weights = made_by(model, structure)

    def sample(batch: Batch) -> Sample:
        slopes = gradient(model, task.loss, batch, weights)
        moved = {n: slopes[n] * w for n, w in weights.items()}
        made = {g.name: [per_channel(m, moved[m.tensor]) for m in g.producers() if m.tensor in weights] for g in structure.free}
        return {g: np.square(np.sum(parts, axis=0)) for g, parts in made.items()}

    return averaged(sample, task, "nvit", RELATIVE_UNIT)


def gate_gradient(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """The mean over examples of ``|dL_n/dg_c|``, ``g`` a gate on the channel (see :mod:`curvepress.scores.gates`).

    Source: Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", NeurIPS 2019, eq. 2, for any channel.
    """
    sample = lambda batch: {  # noqa: E731
        g: np.asarray(s.abs().mean(0).cpu()) for g, s in gate_slopes(model, structure, task.loss, batch).items()
    }
    return averaged(sample, task, "gate_gradient", LOSS_UNIT)


def michel(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """:func:`gate_gradient`, each group (the heads of a layer) divided by its L2 norm, as Michel et al. do before ranking all layers."""
    found = gate_gradient(model, structure, task)
    norms = {g: float(np.linalg.norm(v)) or 1.0 for g, v in found.values.items()}
    values, errors = ({g: v / norms[g] for g, v in part.items()} for part in (found.values, found.stderr))
    return Scores(values, errors, "michel", RELATIVE_UNIT, found.samples, task.seed)
