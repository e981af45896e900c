"""Which residual branches a model can do without: measured, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..costs import Cost, cost
from ..objective import Batch, Loss, batch_loss
from ..plan import Plan, after
from ..scores import Scores
from ..structure import Group, Member, Structure
from ..surgery.masking import Skipping, left_over
from ..tracing.watching import Trace, quiet_evaluation, run, watch
from ..training.batchnorm import Untouched
from .channels import Budget, unreachable


@dataclass(frozen=True)
class Removal:
    """A branch that was left out after those before it: how much the loss rose in all, and the standard error of that."""

    name: str
    rise: float
    stderr: float


def shorten(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Batch],
    structure: Structure,
    budget: Budget | int,
    *,
    example: Sequence[object],
    progress: Callable[[int], None] = lambda measured: None,
) -> tuple[Removal, ...]:
    """Leave out branches until the budget is met, or so many, each time the one without which the loss on the batches rises least.

    Norms over batches take their statistics from each batch, as they would be after they are estimated anew.

    Returns:
        The branches in the order in which they went.

    Raises:
        ValueError: if the model has fewer residual branches, or the budget is not met without all of them.
    """
    if isinstance(budget, int) and not 0 <= budget <= len(structure.branches):
        raise ValueError(f"this model has {len(structure.branches)} residual branches that can be left out; got {budget}")
    whole, found = cost(Plan(structure)), watch(model, lambda: run(model, example), example)
    measured = 0

    def rises(*names: str) -> np.ndarray:
        nonlocal measured
        progress(measured := measured + 1)
        return _losses(model, loss, batches, found, names) - before

    before = _losses(model, loss, batches, found, ())
    gone: list[Removal] = []
    stale = {b.name: -np.inf for b in structure.branches}

    def enough(now: Cost) -> bool:
        return len(gone) >= budget if isinstance(budget, int) else budget(now, whole)

    while not enough(now := cost(Plan(structure, skip=tuple(r.name for r in gone)))):
        names = tuple(r.name for r in gone)
        stale = {n: v for n, v in stale.items() if cost(Plan(structure, skip=(*names, n))) != now}
        if not stale:
            raise ValueError(
                f"only {len(gone)} branches can be left out; the others are inside them"
                if isinstance(budget, int)
                else unreachable(now, whole, budget, "leave out channels as well")
            )
        best, rise = _least(stale, partial(rises, *names), gone[-1].rise if gone else 0.0)
        gone.append(Removal(best, float(rise.mean()), float(rise.std(ddof=1) / len(rise) ** 0.5)))
    return tuple(gone)


def around(structure: Structure, scores: Scores, skip: Sequence[str], choose: Callable[[Structure, Scores], Plan]) -> Plan:
    """The plan for what is left without these branches that ``choose`` makes of it and its scores, as a plan for all of the structure."""
    short = after(Plan(structure, skip=tuple(skip)))
    owner = {_place(g, m): g.name for g in structure.groups for m in g.members}
    names = {g.name: owner[_place(g, g.members[0])] for g in short.groups}
    values, stderr = ({new: part[old] for new, old in names.items() if old in part} for part in (scores.values, scores.stderr))
    plan = choose(short, replace(scores, values=values, stderr=stderr))
    return Plan(structure, {names[g]: channels for g, channels in plan.keep.items()}, tuple(skip), plan.implants, plan.bits)


def _place(group: Group, member: Member) -> tuple[str, int, int]:
    return member.tensor, member.dim, int(member.rows[0, 0])


def _least(stale: dict[str, float], rises: Callable[[str], np.ndarray], so_far: float) -> tuple[str, np.ndarray]:
    """The branch whose going costs least now.  What it cost earlier is taken for a bound (Minoux 1978): those that cost more then
    are not measured again."""
    fresh: dict[str, np.ndarray] = {}
    while (best := min(stale, key=lambda name: stale[name])) not in fresh:
        fresh[best] = rises(best)
        stale[best] = float(fresh[best].mean()) - so_far
    return best, fresh[best]


def _losses(model: nn.Module, loss: Loss, batches: Sequence[Batch], found: Trace, skip: Collection[str]) -> np.ndarray:
    """The mean loss of every batch without these branches."""
    left = left_over(found, skip)
    with quiet_evaluation(model), Untouched(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        values = []
        for batch in batches:
            with Skipping(left):
                values.append(batch_loss(model, loss, batch).item())
    return np.array(values)
