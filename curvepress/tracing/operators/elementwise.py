"""Operators that work element by element, and new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..labelling import Dim, Dims, Ledger, blank
from .table import Arguments, family, rule, tensors_in

POINTWISE = {"masked_fill", "where", "dropout", "native_dropout", "feature_dropout", "copy", "_prelu_kernel", "clone", "_to_copy",
             "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "to", "type_as", "rsub", "clamp",
             "hardswish", "log_sigmoid_forward", "rrelu_with_noise"}  # fmt: skip


@family(lambda func, name: torch.Tag.pointwise in func.tags or name in POINTWISE)
def pointwise(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Dimensions that meet elementwise, aligned from the right, are one."""
    operands = [ledger.of(t) for t in tensors_in(list(a.values()))]
    return broadcast(ledger, operands, tensors_in(out)[0].shape, a["op"])


def broadcast(ledger: Ledger, operands: Sequence[Dims], shape: Sequence[int], op: str) -> list[Dim]:
    """The dimensions of ``operands`` broadcast to ``shape``."""
    result = blank(shape)
    for n, size in enumerate(shape):
        back = n - len(shape)
        meeting = [dims[back] for dims in operands if len(dims) >= -back and len(dims[back]) == size]
        for dim in meeting:
            ledger.role(dim, "along")
        if meeting:
            result[n] = unite(ledger, meeting, f"meets a dimension of fixed size in {op}")
    return result


def unite(ledger: Ledger, dims: Sequence[Dim], why: str) -> Dim:
    """One dimension out of several that meet; ``why`` is the reason where that freezes them."""
    first, *rest = dims
    for dim in rest:
        first = ledger.same(first, dim, why)
    return Dim(first.labels)


def companion(ledger: Ledger, channels: Dim, tensor: Tensor | None, op: str) -> None:
    """A tensor that has one entry a channel: a bias, the scale of a norm, a running mean."""
    if tensor is not None:
        (own,) = ledger.of(tensor)
        ledger.role(own, "along")
        ledger.same(channels, own, f"meets a dimension of fixed size in {op}")


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli")
def like(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A new tensor of the same shape as another."""
    return [Dim(d.labels) for d in ledger.of(a["self"])]


@rule("new_zeros", "new_ones", "new_full", "full", "zeros", "ones")
def filled(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A constant of the user's own size, the same everywhere: what it meets may be cut if the size follows."""
    return ledger.elastic(out.shape)


@rule("new_empty", "new_empty_strided", "arange", "empty", "scalar_tensor", "empty_strided", "rand", "randn", "eye", "linspace")
def factory(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A constant of the user's own size, whose entries may differ."""
    return blank(out.shape)
