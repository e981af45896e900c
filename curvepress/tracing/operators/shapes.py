"""Operators that move, reshape, join and cut tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..algebra import joined, merged
from ..labelling import Dim, Dims, Ledger, blank
from .elementwise import broadcast, unite
from .table import Arguments, rule, tensors_in, unknown


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A reshape: dimensions that merge unite their labels, and one that splits becomes a box of heads or groups."""
    x, shape, result = ledger.of(a["self"]), list(out.shape), []
    for old, new in blocks([len(d) for d in x], shape):
        if len(old) == 1 and len(new) == 1:
            result.append(x[old[0]])
        elif new:
            wide = [n for n in old if len(x[n]) > 1]
            flat = x[wide[0]] if len(wide) == 1 else Dim(merged([x[n].labels for n in old]))
            result += ledger.split(flat, [shape[n] for n in new])
    return result


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of both shapes that hold equally many elements, in order."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = i + (i < len(old)), j + (j < len(new))
        while prod(old[i:a]) != prod(new[j:b]):
            a, b = (a + 1, b) if prod(old[i:a]) < prod(new[j:b]) else (a, b + 1)
        blocks.append((list(range(i, a)), list(range(j, b))))
        i, j = a, b
    return blocks


@rule("permute", "transpose", "t", "numpy_T", "swapaxes")
def permute(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Dimensions in another order."""
    x = list(ledger.of(a["self"]))
    if "dims" in a:
        return [x[d] for d in a["dims"]]
    if "dim0" in a:
        i, j = a["dim0"], a["dim1"]
        x[i], x[j] = x[j], x[i]
        return x
    return x[::-1]


@rule("unsqueeze")
def unsqueeze(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A new dimension of size one."""
    x = list(ledger.of(a["self"]))
    x.insert(a["dim"] % out.ndim, blank([1])[0])
    return x


@rule("squeeze")
def squeeze(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Dimensions of size one dropped."""
    x, dims = ledger.of(a["self"]), a.get("dim")
    every: Any = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    over = {d % len(x) for d in every}
    return [d for n, d in enumerate(x) if n not in over or len(d) != 1]


@rule("expand")
def expand(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Dimensions of size one repeated."""
    x = [*blank([1] * (out.ndim - a["self"].ndim)), *ledger.of(a["self"])]
    return [d if len(d) == n else ledger.elastic([n])[0] for d, n in zip(x, out.shape, strict=True)]


@rule("repeat")
def repeat(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Tiled copies: an index of the source goes with all its copies."""
    x = [*blank([1] * (out.ndim - a["self"].ndim)), *ledger.of(a["self"])]
    return [Dim(joined([d.labels] * n)) if n else blank([0])[0] for d, n in zip(x, a["repeats"], strict=True)]


@rule("slice")
def slice_(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A range of one dimension."""
    x, dim = list(ledger.of(a["self"])), a["dim"] % a["self"].ndim
    x[dim] = x[dim].part(x[dim].labels[slice(a["start"], a["end"], a["step"])]) if len(x[dim]) != out.shape[dim] else x[dim]
    return x


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "split_copy", "split_with_sizes_copy")
def split(ledger: Ledger, a: Arguments, out: Sequence[Tensor]) -> Sequence[Dims]:
    """Consecutive ranges of one dimension."""
    x, dim, results, start = list(ledger.of(a["self"])), a["dim"] % a["self"].ndim, [], 0
    for part in out:
        stop = start + part.shape[dim]
        results.append([*x[:dim], x[dim].part(x[dim].labels[start:stop]), *x[dim + 1 :]])
        start = stop
    return results


@rule("select", "unbind")
def select(ledger: Ledger, a: Arguments, out: Any) -> Sequence[Dims]:
    """One index, or each index, of a dimension that is thereby fixed."""
    x, dim = ledger.of(a["self"]), a["dim"] % a["self"].ndim
    ledger.freeze([x[dim]], f"indexed by a constant in {a['op']}")
    rest = [d for n, d in enumerate(x) if n != dim]
    return [rest] * len(tensors_in(out))


@rule("cat")
def cat(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Tensors laid end to end along one dimension."""
    parts = [ledger.of(t) for t in a["tensors"] if t.numel() or t.ndim == out.ndim]
    dim, why = a["dim"] % out.ndim, f"meets a dimension of fixed size in {a['op']}"
    columns = list(zip(*parts, strict=True))
    return [Dim(joined([d.labels for d in c])) if n == dim else unite(ledger, c, why) for n, c in enumerate(columns)]


@rule("stack")
def stack(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Tensors side by side along a new dimension."""
    shape = list(out.shape)
    size = shape.pop(a["dim"] % out.ndim)
    x = broadcast(ledger, [ledger.of(t) for t in a["tensors"]], shape, a["op"])
    x.insert(a["dim"] % out.ndim, blank([size])[0])
    return x


@rule("constant_pad_nd")
def pad(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Zeros around a tensor: padded channels are channels, free to go with those they are added to."""
    x = list(ledger.of(a["self"]))
    if a["value"]:
        ledger.freeze(x, f"padded with {a['value']} in {a['op']}")
    for n, (left, right) in enumerate(zip(a["pad"][::2], a["pad"][1::2], strict=True)):
        dim = len(x) - 1 - n
        if min(left, right) < 0 or not x[dim].labelled:
            ledger.freeze([x[dim]], f"cropped in {a['op']}")
            x[dim] = blank([out.shape[dim]])[0]
        elif left or right:
            x[dim] = Dim(joined([ledger.atoms.new(left), x[dim].labels, ledger.atoms.new(right)]))
    return x


@rule("index", "index_select", "gather", "_unsafe_index")
def index(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Indices chosen by data or by a mask; the dimensions they are chosen from are fixed."""
    x, where = ledger.of(a["self"]), a["indices"] if "indices" in a else a["index"]
    chosen = [n for n, i in enumerate(where) if i is not None] if isinstance(where, (list, tuple)) else [a["dim"] % len(x)]
    masks = [i for i in where if i is not None and i.ndim and i.dtype == torch.bool]
    if len(masks) == len(chosen) == 1:
        chosen = list(range(chosen[0], chosen[0] + masks.pop().ndim))
    if a["name"] == "gather" or masks or chosen != list(range(chosen[0], chosen[-1] + 1)):
        return unknown(ledger, a, out)
    ledger.freeze([x[n] for n in chosen], f"indexed by data in {a['op']}")
    before, behind = x[: chosen[0]], x[chosen[-1] + 1 :]
    return [*before, *blank(out.shape[len(before) : out.ndim - len(behind)]), *behind]


@rule("native_channel_shuffle", "channel_shuffle")
def channel_shuffle(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Channels seen as a box ``[groups, rest]`` and read the other way round."""
    x = list(ledger.of(a["self"]))
    outer, inner = ledger.split(x[1], (a["groups"], len(x[1]) // a["groups"]))
    x[1] = Dim(merged([inner.labels, outer.labels]))
    return x


@rule("pixel_shuffle")
def pixel_shuffle(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Blocks of channels become pixels; whole blocks can go."""
    x, r = ledger.of(a["self"]), a["upscale_factor"]
    channels, inner = ledger.split(x[-3], (out.shape[-3], r * r))
    ledger.freeze([inner], f"becomes pixels in {a['op']}")
    return [*x[:-3], channels, *blank(out.shape[-2:])]


@rule("pixel_unshuffle")
def pixel_unshuffle(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Pixels become blocks of channels, which go together."""
    x, r = ledger.of(a["self"]), a["downscale_factor"]
    return [*x[:-3], Dim(merged([x[-3].labels, blank([r * r])[0].labels])), *blank(out.shape[-2:])]


@rule("glu")
def glu(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """One half of a dimension gates the other: an index goes with its gate."""
    x, dim = list(ledger.of(a["self"])), a["dim"] % a["self"].ndim
    halves = [Dim(part) for part in np.split(x[dim].labels, 2)]
    x[dim] = unite(ledger, halves, f"meets a dimension of fixed size in {a['op']}")
    return x


@rule("as_strided")
def as_strided(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Other strides; with the same shape the tensor is only laid out anew."""
    same = a["self"].shape == out.shape and not a["storage_offset"]
    return [Dim(d.labels) for d in ledger.of(a["self"])] if same else unknown(ledger, a, out)


@rule("index_add", "index_copy")
def index_add(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Rows added or written at places chosen by data."""
    x, source, dim = ledger.of(a["self"]), ledger.of(a["source"]), a["dim"] % a["self"].ndim
    ledger.freeze([x[dim], source[dim]], f"indexed by data in {a['op']}")
    why = f"meets a dimension of fixed size in {a['op']}"
    return [unite(ledger, pair, why) if n != dim else blank([len(x[dim])])[0] for n, pair in enumerate(zip(x, source, strict=True))]


@rule("roll", "flip", "rot90")
def reorder(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A fixed permutation of indices."""
    x = ledger.of(a["self"])
    over = {d % len(x) for d in a.get("dims") or range(len(x))}
    ledger.freeze([x[n] for n in over], f"permuted by {a['op']}")
    return [Dim(d.labels) for d in x]
