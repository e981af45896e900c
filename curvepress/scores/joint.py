"""What a whole plan is predicted to cost, its removals taken together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import curvature
from ..curvature import Direction, Part
from ..objective import Batches, Loss
from ..plan import Plan, lost
from .data import readers


def joint_rise(
    model: nn.Module, loss: Loss, batches: Batches, plan: Plan, *, moves: Mapping[str, Tensor] | None = None, **options: Any
) -> tuple[float, float]:
    """Predicted rise of the loss when all that ``plan`` removes is no longer read, and its standard error over the batches.

    ``d' G d / 2`` for the displacement ``d`` of all weights at once, with the Gauss-Newton matrix ``G`` of the loss: unlike a sum of
    prices it has the interactions between channels, within a group and across layers, as far as the outputs are linear in ``d``.
    ``moves`` gives displacements of whole tensors instead, such as what a repair made of them, and ``options`` are those of
    :func:`curvepress.curvature.estimate`.

    Raises:
        ValueError: if nothing moves, the plan leaves out branches, there are fewer than two batches, or the curvature cannot be had.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    if plan.skip and moves is None:
        raise ValueError(f"joint_rise prices channels, and the plan leaves out the branch {plan.skip[0]!r}; measure that, or give moves")
    parts = tuple(Part(n, np.zeros((), dtype=int)) for n in moves) if moves is not None else tuple(_unread(plan, weights))
    if not parts:
        raise ValueError("the plan removes nothing and no moves were given, so there is no rise to predict; give a plan that cuts channels")
    found = curvature.estimate(model, loss, batches, {"plan": Direction(parts, 1, dict(moves or {}))}, **options)
    if found.samples < 2:
        raise ValueError("joint_rise needs at least 2 batches for its error bar, got 1; give more or smaller ones")
    return float(found.mean["plan"][0]) / 2, float(found.stderr["plan"][0]) / 2


def _unread(plan: Plan, weights: Mapping[str, Tensor]) -> list[Part]:
    """The elements that read what the plan removes, tensor by tensor."""
    labels: dict[str, np.ndarray] = {}
    for group in plan.structure.groups:
        for m in readers(group, weights) if group.name in plan.keep else ():
            own = labels.setdefault(m.tensor, np.full(tuple(weights[m.tensor].shape), -1))
            own[(slice(None),) * m.dim + (m.rows[lost(plan, group)].ravel(),)] = 0
    return [Part(n, own) for n, own in labels.items()]
