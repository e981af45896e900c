"""What the loss of each example says of each channel: its slope with respect to a gate, a factor of one, on the channel.

Gates sit where layers read the channel.  A channel that no layer reads (queries and keys meet each other) is gated where the first
layer makes it, so that a product of two gated factors does not count twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import Batch, Loss, batch_loss, batch_size
from ..structure import Group, Member, Structure

LINEAR: Mapping[str, tuple[int, int]] = {"Linear": (1, -1), "Conv1d": (1, 1), "Conv2d": (1, 1), "Conv3d": (1, 1), "Conv1D": (0, -1)}
"""By type of layer: the dimension of its weight along its inputs, and the dimension of its inputs and outputs that holds channels."""


def gate_slopes(model: nn.Module, structure: Structure, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """``dL_n/dg_c`` for every example ``n`` and channel ``c`` of each free group: float64 ``[examples, channels]``.

    ``L_n`` is the loss of the example, of which ``loss`` is the mean.  One forward and one backward pass in the mode the model is in.

    Raises:
        ValueError: if a channel is read by something else than a linear layer or an ungrouped convolution over the batch.
    """
    count = batch_size(batch)
    like = next(p for p in model.parameters() if p.is_floating_point())
    gates = {g.name: like.new_ones(count, g.size).requires_grad_() for g in structure.free}
    with ExitStack() as hooks:
        for group in structure.free:
            for layer, member, reads in _places(model, group):
                _hook(hooks, layer, partial(_gated, gates[group.name], member, LINEAR[type(layer).__name__][1]), reads)
        value = batch_loss(model, loss, batch)
        slopes = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
    found = zip(gates.items(), slopes, strict=True)
    return {n: torch.zeros_like(g, dtype=torch.float64) if s is None else s.detach().double() * count for (n, g), s in found}


def _places(model: nn.Module, group: Group) -> list[tuple[nn.Module, Member, bool]]:
    """Where a group is gated: layers, their weights' members, and whether it is their input (or their output)."""
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    readers = [m for m in group.members if m.role == "in" and m.tensor in weights]
    makers = [m for m in group.producers() if m.tensor in weights]
    if not readers and not makers:
        raise ValueError(f"group {group.name!r} is neither read nor made by a weight, so nothing can be gated; choose another score")
    return [_place(model, m, bool(readers)) for m in readers or makers[:1]]


def _place(model: nn.Module, member: Member, reads: bool) -> tuple[nn.Module, Member, bool]:
    layer = model.get_submodule(member.tensor.rpartition(".")[0])
    kind = type(layer).__name__
    inputs = LINEAR.get(kind, (-1, 0))[0]
    if member.dim != (inputs if reads else 1 - inputs) or getattr(layer, "groups", 1) != 1 or not member.tensor.endswith("weight"):
        raise ValueError(
            f"{member.tensor} of a {kind} cannot be gated: this score is for linear layers and ungrouped convolutions; choose another"
        )
    return layer, member, reads


def _hook(hooks: ExitStack, layer: nn.Module, gated: Any, reads: bool) -> None:
    if reads:
        hooks.enter_context(_Removed(layer.register_forward_pre_hook(lambda module, given: (gated(given[0], module), *given[1:]))))
    else:
        hooks.enter_context(_Removed(layer.register_forward_hook(lambda module, given, made: gated(made, module))))


class _Removed:
    """A hook for as long as a ``with`` block lasts."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _gated(gate: Tensor, member: Member, dim: int, x: Tensor, layer: nn.Module) -> Tensor:
    """``x`` with the channels of ``member`` in dimension ``dim`` times their gates, and all others as they are."""
    if len(x) != len(gate):
        raise ValueError(f"a {type(layer).__name__} reads {len(x)} rows for {len(gate)} examples: they have no gates of their own here")
    labels = torch.full((x.shape[dim],), gate.shape[1])
    labels[torch.as_tensor(member.rows).flatten()] = torch.arange(len(member.rows)).repeat_interleave(member.rows.shape[1])
    factors = torch.cat([gate, gate.new_ones(len(gate), 1)], 1)[:, labels.to(gate.device)]
    shape = [len(x), *[1] * (x.ndim - 1)]
    shape[dim] = x.shape[dim]
    return x * factors.view(shape)
