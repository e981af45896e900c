"""What reads lost channels refitted by least squares, each weight by itself: what prices after repair predict."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import islice

import torch
from torch import nn

from curvepress.objective import Batches
from curvepress.plan import Plan, edits
from curvepress.scores.elimination import damped
from curvepress.scores.grams import Gram, add_grams

RIDGE = 1e-4


def grams(model: nn.Module, batches: Batches, count: int) -> dict[str, Gram]:
    """Gram matrices of the inputs of all weights, over the first ``count`` batches."""
    found: dict[str, Gram] = {}
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    for number, batch in enumerate(islice(batches, count)):
        add_grams(model, batch, names, found, seed=number)
    return found


def refitted(model: nn.Module, plan: Plan, moments: Mapping[str, Gram], *, zero: bool = False) -> nn.Module:
    """The model, not yet cut, whose weights leave what the plan removes unread and make up for it with the other inputs.

    With ``zero`` they do not make up for it.
    """
    full, cut = deepcopy(model), edits(plan)
    own = dict(full.named_parameters())
    for name, weight in own.items():
        stays = torch.as_tensor(cut.get((name, 1), ()))
        if (name, 1) in cut and zero:
            gone = torch.ones(weight.shape[1], dtype=torch.bool).index_fill_(0, stays, False)
            weight.data[:, gone] = 0
        elif (name, 1) in cut and name in moments:
            _refit(weight, own.get(name.removesuffix("weight") + "bias"), stays, moments[name])
    return full


@torch.no_grad()
def _refit(weight: nn.Parameter, bias: nn.Parameter | None, stay: torch.Tensor, gram: Gram) -> None:
    old, per = weight.double().flatten(1), weight[0, 0].numel()
    kept = (stay[:, None] * per + torch.arange(per)).flatten()
    moment = damped(gram.second_moment(), RIDGE)
    new = torch.zeros_like(old)
    new[:, kept] = torch.linalg.solve(moment[kept][:, kept], (old @ moment)[:, kept].T).T
    if bias is not None:
        bias += ((old - new) @ (gram.total / gram.count)).to(bias.dtype)
    weight.copy_(new.view_as(weight))
