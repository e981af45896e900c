"""Putting a plan's implants into a model: layers replaced, and channels that pointwise implants move taken along everywhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..implants import Implant, moves
from ..plan import Plan, edits
from ..tracing.watching import model_tensors
from .layers import low_rank, pointwise, refusal
from .truncation import Truncation, centre


@dataclass(frozen=True, eq=False)
class Moments:
    """What data say of a layer: ``gram`` ``[inputs, inputs]`` of what its filters see, ``curvature`` ``[out, out]`` of the loss."""

    gram: Tensor | None = None
    curvature: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Implanted:
    """A model with implants, not yet pruned, and ``reference``: the original whose weights are those the implants amount to."""

    model: nn.Module
    reference: nn.Module


def implant(model: nn.Module, plan: Plan, moments: Mapping[str, Moments] | None = None) -> Implanted:
    """Copies of ``model`` with the plan's implants, by truncation of what pruning leaves of the weights; see :mod:`.truncation`.

    Args:
        moments: by weight; without them the smallest error is that of the weight itself, and 1x1 filters are the centres.

    Raises:
        ValueError: if the layer of an implant is of another kind, has hooks or groups, or shares its weight.
    """
    layers = {name: _layer(model, name) for name in plan.implants}
    new, reference = copy.deepcopy(model), copy.deepcopy(model)
    moved, own = moves(plan.structure, plan.implants), model_tensors(new)
    with torch.no_grad():
        for (name, dim), source in moved.items():
            if name in own and name not in layers:
                own[name].copy_(own[name].index_select(dim, _index(source, own[name])))
        for name, layer in layers.items():
            found = _parts(layer.weight, plan, name, (moments or {}).get(name, Moments()))
            parent, _, key = name.removesuffix(".weight").rpartition(".")
            setattr(
                new.get_submodule(parent),
                key,
                _made(new.get_submodule(name.removesuffix(".weight")), plan.implants[name], found, name, moved),
            )
            reference.get_parameter(name).copy_(found.dense)
    return Implanted(new, reference)


def trouble_with(model: nn.Module, name: str) -> str:
    """Why the layer of a weight can have no implant; empty if it can."""
    same = [n for n, p in model.named_parameters(remove_duplicate=False) if p is model.get_parameter(name) and n != name]
    return f"it is tied to {', '.join(same)}" if same else refusal(model.get_submodule(name.removesuffix(".weight")))


def _layer(model: nn.Module, name: str) -> Any:
    if why := trouble_with(model, name):
        raise ValueError(f"implants[{name!r}]: this weight cannot be replaced: {why}; take the implant out of the plan")
    return model.get_submodule(name.removesuffix(".weight"))


@dataclass(frozen=True, eq=False)
class _Parts:
    """Down and up, or the whole filters and the 1x1 ones ``[out, in]``, and the ``dense`` weight they amount to."""

    first: Tensor
    second: Tensor
    dense: Tensor


def _parts(weight: Tensor, plan: Plan, name: str, moments: Moments) -> _Parts:
    implant, masked, cut = plan.implants[name], weight.detach().clone(), edits(plan)
    read = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    made = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
    for dim, present in ((0, made), (1, read)):
        if (name, dim) in cut:
            gone = _index(np.setdiff1d(np.arange(weight.shape[dim]), cut[name, dim]), weight)
            masked.index_fill_(dim, gone, 0)
            present[gone] = 0
    read = read.repeat_interleave(prod(weight.shape[2:]))
    gram = None if moments.gram is None else moments.gram.to(read) * read[:, None] * read
    curvature = None if moments.curvature is None else moments.curvature.to(made) * made[:, None] * made
    if implant.kind == "low_rank":
        up, down = Truncation(masked.flatten(1), gram, curvature).factors(implant.rank)
        return _Parts(down, up, (up @ down).view_as(weight))
    chosen, dense = torch.tensor(sorted(implant.channels), device=weight.device), masked.clone()
    point = masked.new_zeros(weight.shape[:2]).index_copy(0, chosen, centre(masked[chosen], gram).to(masked))
    embedded = torch.zeros_like(masked).flatten(2)
    embedded[..., embedded.shape[-1] // 2] = point
    dense[chosen] = embedded.view_as(masked)[chosen]
    return _Parts(masked, point, dense)


def _made(layer: nn.Module, implant: Implant, parts: _Parts, name: str, moved: Mapping[tuple[str, int], np.ndarray]) -> nn.Module:
    """The new layer, its channels where the plan moves them."""
    rows, columns = (_index(moved[name, d], parts.dense) if (name, d) in moved else slice(None) for d in (0, 1))
    if implant.kind == "low_rank":
        down = parts.first.reshape(implant.rank, *parts.dense.shape[1:])[:, columns]
        return low_rank(layer, parts.second[rows], down)
    border = len(parts.dense) - len(implant.channels)
    full, point = parts.first[rows][:, columns], parts.second[rows][:, columns]
    return pointwise(layer, full[:border], point[border:])


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(rows, device=like.device)
