"""What reads lost channels refitted by least squares, each weight by itself: what prices after repair predict."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import islice

import torch
from torch import nn

from curvepress.objective import Batches
from curvepress.plan import Plan, lost
from curvepress.scores.data import readers
from curvepress.scores.elimination import damped
from curvepress.scores.grams import Gram, add_grams
from curvepress.structure import Site

RIDGE = 1e-4


def grams(model: nn.Module, batches: Batches, count: int) -> dict[str, Gram]:
    """Gram matrices of the inputs of all weights, over the first ``count`` batches."""
    found: dict[str, Gram] = {}
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    for number, batch in enumerate(islice(batches, count)):
        add_grams(model, batch, names, found, seed=number)
    return found


def refitted(model: nn.Module, plan: Plan, moments: Mapping[str, Gram]) -> nn.Module:
    """The model, not yet cut, whose weights leave what the plan removes unread and make up for it with the other inputs.

    Those without an entry in ``moments`` do not make up for it; where nothing reads a group, what makes it is zero.
    """
    full = deepcopy(model)
    own = dict(full.named_parameters())
    for (name, dim), gone in _unread(plan, own).items():
        if dim == 1 and name in moments:
            stay = torch.ones(own[name].shape[1], dtype=torch.bool).index_fill_(0, gone, False).nonzero().flatten()
            _refit(own[name], own.get(name.removesuffix("weight") + "bias"), stay, moments[name])
        else:
            own[name].data.index_fill_(dim, gone, 0)
    return full


def _unread(plan: Plan, own: Mapping[str, torch.Tensor]) -> dict[Site, torch.Tensor]:
    """What is lost of every dimension that reads a group."""
    found: dict[Site, list[torch.Tensor]] = {}
    for group in (g for g in plan.structure.groups if g.name in plan.keep):
        for m in readers(group, own):
            found.setdefault((m.tensor, m.dim), []).append(torch.as_tensor(m.rows[lost(plan, group)]).flatten())
    return {site: torch.cat(rows) for site, rows in found.items()}


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
