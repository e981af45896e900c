"""What an operator does when it is met: its rule, or, for a stack that is only taken apart again, what its pieces are.

One projection of queries, keys and values is often seen as a box ``[3, heads, width]`` that is moved about and then indexed.  Taken as a
box it would hold the three equally wide.  So nothing is imposed where a dimension is split, until somebody reads the box itself;
an index along its first factor is a range of the dimension that was split, with labels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..labelling import Dim, Ledger, blank
from .shapes import blocks
from .table import DECIDING, Arguments, Labelled, Rule, bound, name_of, rule_of, tensors_in

SPLITTING = ("view", "_unsafe_view", "reshape", "_reshape_alias")
TAKING = ("select", "unbind")


def observe(ledger: Ledger, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Let the rule of ``func`` label its result."""
    results, name = tensors_in(result), name_of(func)
    given = tensors_in([args, kwargs])
    ledger.touch(given)
    ledger.step(given, results, plain_sum=name == "add" and not kwargs and all(t.shape == results[0].shape for t in given))
    ledger.decided_by_data |= name in DECIDING
    if not results:
        return
    a = {**bound(func, args, kwargs), "op": str(func), "name": name}
    if not _as_a_stack(ledger, func, a, result):
        _put(ledger, results, rule_of(func, name)(ledger, a, result))


def _put(ledger: Ledger, results: Sequence[Tensor], dims: Labelled) -> None:
    labelled: Sequence[Any] = [dims] if dims and isinstance(dims[0], Dim) else dims
    for n, tensor in enumerate(results):
        known = n < len(labelled) and len(labelled[n]) == tensor.ndim
        ledger.put(tensor, labelled[n] if known else blank(tensor.shape))


@dataclass(frozen=True)
class Split:
    """Dimension ``dim`` of a tensor becomes a box: dimension ``at`` of the result counts its pieces, each a range of ``size``."""

    dim: int
    at: int
    count: int
    size: int


@dataclass(frozen=True)
class Stack:
    """A box that nobody has read: what it is a view of, and the operators since, with what each of them made."""

    source: Tensor
    split: Split
    at: int
    steps: tuple[tuple[Rule, Arguments, Tensor], ...]


def first_split(old: Sequence[int], new: Sequence[int]) -> Split | None:
    """The one dimension of shape ``old`` that becomes a box of two factors or more in ``new``, where all others stay."""
    pairs = [(o, n) for o, n in blocks(old, new) if len(n) != 1 or len(o) != 1]
    found = [(o[0], [k for k in n if new[k] > 1]) for o, n in pairs if len(o) == 1 and n]
    if len(pairs) != 1 or not found or len(found[0][1]) < 2:
        return None
    dim, wide = found[0]
    return Split(dim, wide[0], new[wide[0]], old[dim] // new[wide[0]])


def _as_a_stack(ledger: Ledger, func: Any, a: Arguments, result: Any) -> bool:
    """Whether the operator opened, moved or took apart a stack, so that no rule has to speak yet."""
    x, name = a.get("self"), a["name"]
    if not isinstance(x, Tensor) or result is x:
        return False
    stack: Stack | None = ledger.waiting(x)
    if name in SPLITTING:
        split = first_split(x.shape, result.shape)
        if split is None or not ledger.of(x)[split.dim].labelled:
            return False
        stack = Stack(x, split, split.at, ())
    elif stack is None:
        return False
    elif name in TAKING and a["dim"] % x.ndim == stack.at:
        for n, piece in enumerate(tensors_in(result)):
            ledger.put(piece, _piece(ledger, stack, a.get("index", n) % stack.split.count))
        return True
    elif (at := moved(a, x.shape, stack.at)) is not None:
        stack = replace(stack, at=at)
    else:
        return False
    rule = rule_of(func, name)
    ledger.wait(result, replace(stack, steps=(*stack.steps, (rule, a, result))), lambda: rule(ledger, a, result))
    return True


def _piece(ledger: Ledger, stack: Stack, n: int) -> list[Dim]:
    """The dimensions of one piece: the same steps on a range of what was split."""
    dim, size, at, dims = stack.split.dim, stack.split.size, stack.split.at, list(ledger.of(stack.source))
    dims[dim] = dims[dim].part(dims[dim].labels[n * size : (n + 1) * size])
    piece = torch.empty([len(d) for d in dims], device="meta")
    for rule, a, real in stack.steps:
        ledger.put(piece, dims)
        now = at if a["name"] in SPLITTING else moved(a, a["self"].shape, at)
        made = torch.empty([1 if k == now else length for k, length in enumerate(real.shape)], device="meta")
        at, dims = now or 0, list(rule(ledger, {**a, "self": piece}, made))  # type: ignore[arg-type]
        ledger.piece(real, dims)
        piece = made
    return [d for k, d in enumerate(dims) if k != at]


def moved(a: Arguments, shape: Sequence[int], at: int) -> int | None:
    """Where dimension ``at`` of a tensor of this shape comes to lie under an operator that only moves dimensions; None for any other."""
    return MOVES[a["name"]](a, shape, at) if a["name"] in MOVES else None


def _permuted(a: Arguments, shape: Sequence[int], at: int) -> int:
    return [d % len(shape) for d in a["dims"]].index(at)


def _transposed(a: Arguments, shape: Sequence[int], at: int) -> int:
    i, j = a["dim0"] % len(shape), a["dim1"] % len(shape)
    return j if at == i else i if at == j else at


def _unsqueezed(a: Arguments, shape: Sequence[int], at: int) -> int:
    return at + (a["dim"] % (len(shape) + 1) <= at)


def _squeezed(a: Arguments, shape: Sequence[int], at: int) -> int | None:
    if (dims := a.get("dim")) is None:
        return None  # of a piece it would drop one dimension more
    return at - sum(d % len(shape) < at and shape[d] == 1 for d in ([dims] if isinstance(dims, int) else dims))


def _sliced(a: Arguments, shape: Sequence[int], at: int) -> int | None:
    whole = not a["start"] and (a["end"] is None or (isinstance(a["end"], int) and a["end"] >= shape[at])) and a["step"] == 1
    return at if whole or a["dim"] % len(shape) != at else None


def _kept(a: Arguments, shape: Sequence[int], at: int) -> int:
    return at


MOVES: Mapping[str, Callable[[Arguments, Sequence[int], int], int | None]] = {
    "permute": _permuted,
    "transpose": _transposed,
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "slice": _sliced,
    **dict.fromkeys(("clone", "contiguous", "alias", "detach"), _kept),
}
