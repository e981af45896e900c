"""The table of operator rules: what each ATen operator does to labelled dimensions.

A rule takes the ledger, the operator's bound arguments and its result, and returns the dimensions of the result (of each
result, where there are several).  ``@rule("name", ...)`` enters it in the table.  An operator that is not in the table
freezes everything it touches and says so: see :func:`unknown`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .algebra import joined, merged
from .labelling import Dim, Dims, Ledger, blank

Arguments = dict[str, Any]
Rule = Callable[[Ledger, Arguments, Any], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table under these operator names."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def observe(ledger: Ledger, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
    """Let the rule of ``func`` label its result."""
    results = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)]
    if not results:
        return
    bound = _bind(func, args, kwargs)
    dims = _rule_of(func)(ledger, bound, result)
    labelled = [dims] if dims and isinstance(dims[0], Dim) else dims
    for n, tensor in enumerate(results):
        ledger.put(tensor, labelled[n] if n < len(labelled) and len(labelled[n]) == tensor.ndim else blank(tensor.shape))


def _bind(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    schema = func._schema.arguments
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**bound, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs, "op": str(func), "name": _name(func)}


def _name(func: Any) -> str:
    name = func._schema.name.split("::")[-1]
    return name.rstrip("_") if not name.startswith("__") else name


def _rule_of(func: Any) -> Rule:
    name = _name(func)
    if name in RULES:
        return RULES[name]
    if torch.Tag.pointwise in func.tags or name in POINTWISE:
        return pointwise
    if re.search(r"pool[123]d|upsample", name):
        return spatial
    return unknown


def unknown(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """No rule: everything the operator touches is frozen, with the operator's name as the reason."""
    for tensor in _tensors(a):
        ledger.freeze(ledger.of(tensor), f"no rule for {a['op']}")
    return []


def _tensors(a: Arguments) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(list(a.values())) if isinstance(t, Tensor)]


# --- elementwise ---------------------------------------------------------------------------------------------------------------------

POINTWISE = {"masked_fill", "where", "dropout", "native_dropout", "feature_dropout", "copy", "_prelu_kernel", "clone", "_to_copy",
             "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "to", "type_as", "rsub", "clamp"}  # fmt: skip


def pointwise(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Dimensions that meet elementwise, aligned from the right, are one."""
    shape = torch.utils._pytree.tree_leaves(out)[0].shape
    return broadcast(ledger, [ledger.of(t) for t in _tensors(a)], shape, a["op"])


def broadcast(ledger: Ledger, operands: Sequence[Dims], shape: Sequence[int], op: str) -> list[Dim]:
    """The dimensions of ``operands`` broadcast to ``shape``."""
    result = blank(shape)
    for n, size in enumerate(shape):
        back = n - len(shape)
        meeting = [dims[back] for dims in operands if len(dims) >= -back and len(dims[back]) == size]
        for dim in meeting:
            ledger.role(dim, "along")
        if meeting:
            result[n] = _unite(ledger, meeting, f"meets a dimension of fixed size in {op}")
    return result


def _unite(ledger: Ledger, dims: Sequence[Dim], why: str) -> Dim:
    first, *rest = dims
    for dim in rest:
        first = ledger.same(first, dim, why)
    return Dim(first.labels)


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli")
def like(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A new tensor of the same shape as another."""
    return [Dim(d.labels) for d in ledger.of(a["self"])]


@rule("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided", "arange", "full", "zeros", "ones", "empty", "scalar_tensor",
      "empty_strided", "rand", "randn", "eye", "linspace")  # fmt: skip
def factory(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A constant of the user's own size."""
    return blank(out.shape)


# --- weights -------------------------------------------------------------------------------------------------------------------------


@rule("convolution", "_convolution")
def convolution(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Convolutions: plain, grouped, depthwise and transposed."""
    x, w, groups, op = ledger.of(a["input"]), ledger.of(a["weight"]), a["groups"], a["op"]
    made, read = (1, 0) if a["transposed"] else (0, 1)
    ledger.freeze([*x[2:], *w[2:]], f"a spatial dimension of {op}")
    ledger.role(w[made], "out")
    channels = w[made] if groups == 1 else None
    if groups == 1:
        ledger.role(w[read], "in")
        ledger.same(x[1], w[read], f"reads a dimension of fixed size in {op}")
    elif a["transposed"]:
        channels = _grouped_transposed(ledger, x[1], w, groups, op)
    else:
        channels = _grouped(ledger, x[1], w, groups, op)
    _companion(ledger, channels, a["bias"], op)
    positions = a["input"] if a["transposed"] else out
    ledger.work(w, [], positions.shape[0] * prod(positions.shape[2:]), a["name"])
    return [Dim(x[0].labels), Dim(channels.labels), *blank(out.shape[2:])]


def _grouped(ledger: Ledger, x: Dim, w: Dims, groups: int, op: str) -> Dim:
    sizes = len(x) // groups, len(w[0]) // groups
    (outer, inner), (made, _) = ledger.split(x, (groups, sizes[0])), ledger.split(w[0], (groups, sizes[1]))
    ledger.same(outer, made, f"reads a dimension of fixed size in {op}")
    if sizes[0] > 1:
        ledger.role(w[1], "in")
        ledger.same(inner, w[1], f"reads a dimension of fixed size in {op}")
    return w[0]


def _grouped_transposed(ledger: Ledger, x: Dim, w: Dims, groups: int, op: str) -> Dim:
    ledger.role(w[0], "in")
    ledger.same(x, w[0], f"reads a dimension of fixed size in {op}")
    outer, _ = ledger.split(w[0], (groups, len(x) // groups))
    return Dim(merged([outer.labels, w[1].labels]))


def _companion(ledger: Ledger, channels: Dim, tensor: Tensor | None, op: str) -> None:
    """A tensor that has one entry a channel: a bias, the scale of a norm, a running mean."""
    if tensor is not None:
        (own,) = ledger.of(tensor)
        ledger.role(own, "along")
        ledger.same(channels, own, f"meets a dimension of fixed size in {op}")


def _contract(ledger: Ledger, x: Dims, y: Dims, op: str) -> None:
    """``x[..., k] @ y[..., k, m]``: the contracted dimensions are one, and weights learn what they do."""
    for weight, read, made in ((y, -2, -1), (x, -1, -2)):
        ledger.role(weight[read], "in")
        ledger.role(weight[made], "out")
    ledger.same(x[-1], y[-2], f"reads a dimension of fixed size in {op}")


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Matrix products, batched or not, with an addend or not."""
    keys = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "bmm": ("self", "mat2"), "baddbmm": ("batch1", "batch2")}[a["name"]]
    x, y = (ledger.of(a[k]) for k in keys)
    _contract(ledger, x, y, a["op"])
    batch = [_unite(ledger, (x[0], y[0]), f"meets a dimension of fixed size in {a['op']}")] if len(x) == 3 else []
    result = [*batch, Dim(x[-2].labels), Dim(y[-1].labels)]
    _count(ledger, x, y, a["name"])
    if "add" in a["name"]:
        return broadcast(ledger, [ledger.of(a["self"]), result], out.shape, a["op"])
    return result


def _count(ledger: Ledger, x: Dims, y: Dims, op: str) -> None:
    if any(d.origin for d in x) and not any(d.origin for d in y):
        ledger.work(x, [], len(y[-1]), op)
    elif any(d.origin for d in y):
        ledger.work(y, [], prod(map(len, x[:-1])), op)
    else:
        ledger.work(x, y[-1:], 1, op)


@rule("linear")
def linear(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """``x[..., i] w[o, i]``."""
    x, w = ledger.of(a["input"]), ledger.of(a["weight"])
    _contract(ledger, x if len(x) > 1 else [*blank([1]), *x], w[::-1], a["op"])
    _companion(ledger, w[0], a["bias"], a["op"])
    ledger.work(w, [], prod(map(len, x[:-1])), a["name"])
    return [*(Dim(d.labels) for d in x[:-1]), Dim(w[0].labels)]


@rule("embedding")
def embedding(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Rows of a table; the table's entries are named by the data and stay."""
    table = ledger.of(a["weight"])
    ledger.freeze([table[0], *ledger.of(a["indices"])], f"looked up by index in {a['op']}")
    ledger.role(table[0], "along")
    ledger.role(table[1], "out")
    return [*blank(a["indices"].shape), Dim(table[1].labels)]


_ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable",
              "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention")  # fmt: skip


@rule(*_ATTENTION)
def attention(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Scaled dot-product attention over ``[batch, heads, positions, width]``."""
    q, k, v = (ledger.of(a[n]) for n in ("query", "key", "value"))
    why = f"meets a dimension of fixed size in {a['op']}"
    ledger.same(q[-1], k[-1], why)
    ledger.same(k[-2], v[-2], why)
    lead = [_unite(ledger, dims, why) for dims in zip(q[:-2], k[:-2], v[:-2], strict=True)]
    ledger.freeze([q[-2], k[-2]], f"positions of {a['op']}")
    mask = a.get("attn_mask", a.get("attn_bias"))
    if mask is not None:
        broadcast(ledger, [[*lead, q[-2], k[-2]], ledger.of(mask)], (*map(len, lead), len(q[-2]), len(k[-2])), a["op"])
    for width in (q[-1], v[-1]):
        ledger.work([*lead, width], [q[-2], k[-2]], 1, "attention")
    return [*lead, Dim(q[-2].labels), Dim(v[-1].labels)]


# --- norms, reductions, softmax --------------------------------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
      "batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def batch_norm(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Batch normalisation: every channel by itself."""
    x = ledger.of(a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        _companion(ledger, x[1], a.get(name), a["op"])
    return [Dim(d.labels) for d in x]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Layer normalisation: what is left is normalised by itself, so cutting changes its statistics."""
    x, count = ledger.of(a["input"]), len(a["normalized_shape"])
    if a.get("weight") is None:
        ledger.freeze(x[-count:], f"normalised without weights in {a['op']}")
    for tensor in (a.get("weight"), a.get("bias")):
        if tensor is not None:
            broadcast(ledger, [x, ledger.of(tensor)], [len(d) for d in x], a["op"])
    return [Dim(d.labels) for d in x]


@rule("native_group_norm")
def group_norm(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Group normalisation: its groups stay equally wide."""
    x = ledger.of(a["input"])
    ledger.split(x[1], (a["group"], len(x[1]) // a["group"]))
    if a["weight"] is None:
        ledger.freeze(x[1:2], f"normalised without weights in {a['op']}")
    for name in ("weight", "bias"):
        _companion(ledger, x[1], a[name], a["op"])
    return [Dim(d.labels) for d in x]


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "argmax", "argmin",
      "logsumexp", "linalg_vector_norm", "norm")  # fmt: skip
def reduction(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Reductions; over channels they would change with what is cut, so those are frozen."""
    x, result = ledger.of(a["self"]), torch.utils._pytree.tree_leaves(out)[0]
    if "other" in a:
        return pointwise(ledger, a, out)
    dims = a.get("dim")
    over = {d % max(len(x), 1) for d in ([dims] if isinstance(dims, int) else dims or range(len(x)))}
    ledger.freeze([d for n, d in enumerate(x) if n in over], f"{a['op']} reduces over it")
    keep = len(x) == result.ndim
    dims = [Dim(d.labels) if n not in over else blank([1])[0] for n, d in enumerate(x) if keep or n not in over]
    return [dims] * len(torch.utils._pytree.tree_leaves(out))


@rule("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax")
def softmax(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Softmax couples what it runs over."""
    x = ledger.of(a["self"])
    ledger.freeze([x[a["dim"]]], f"{a['op']} runs over it")
    return [Dim(d.labels) for d in x]


def spatial(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Pooling and resampling: every channel by itself; spatial dimensions are never cut."""
    x = ledger.of(a["self"] if "self" in a else a["input"])
    count = int(re.search(r"([123])d", a["name"])[1])
    ledger.freeze(x[-count:], f"a spatial dimension of {a['op']}")
    results = torch.utils._pytree.tree_leaves(out)
    return [[*(Dim(d.labels) for d in x[:-count]), *blank(r.shape[-count:])] for r in results]


# --- moving and reshaping --------------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A reshape: dimensions that merge unite their labels, and one that splits becomes a box of heads or groups."""
    x, shape, result = ledger.of(a["self"]), list(out.shape), []
    for old, new in _blocks([len(d) for d in x], shape):
        if len(old) == 1 and len(new) == 1:
            result.append(x[old[0]])
        elif new:
            wide = [n for n in old if len(x[n]) > 1]
            flat = x[wide[0]] if len(wide) == 1 else Dim(merged([x[n].labels for n in old]))
            result += ledger.split(flat, [shape[n] for n in new])
    return result


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
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
    over = {d % len(x) for d in ([dims] if isinstance(dims, int) else dims if dims is not None else range(len(x)))}
    return [d for n, d in enumerate(x) if n not in over or len(d) != 1]


@rule("expand")
def expand(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Dimensions of size one repeated."""
    x = [*blank(out.shape[: out.ndim - a["self"].ndim]), *ledger.of(a["self"])]
    return [d if len(d) == n else blank([n])[0] for d, n in zip(x, out.shape, strict=True)]


@rule("repeat")
def repeat(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Tiled copies: an index of the source goes with all its copies."""
    x = [*blank([1] * (out.ndim - a["self"].ndim)), *ledger.of(a["self"])]
    return [Dim(joined([d.labels] * n)) if n else blank([0])[0] for d, n in zip(x, a["repeats"], strict=True)]


@rule("slice")
def slice_(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A range of one dimension."""
    x, dim = list(ledger.of(a["self"])), a["dim"] % a["self"].ndim
    x[dim] = Dim(x[dim].labels[slice(a["start"], a["end"], a["step"])]) if len(x[dim]) != out.shape[dim] else x[dim]
    return x


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "split_copy", "split_with_sizes_copy")
def split(ledger: Ledger, a: Arguments, out: Sequence[Tensor]) -> list[Dims]:
    """Consecutive ranges of one dimension."""
    x, dim, results, start = list(ledger.of(a["self"])), a["dim"] % a["self"].ndim, [], 0
    for part in out:
        stop = start + part.shape[dim]
        results.append([*x[:dim], Dim(x[dim].labels[start:stop]), *x[dim + 1 :]])
        start = stop
    return results


@rule("select", "unbind")
def select(ledger: Ledger, a: Arguments, out: Any) -> list[Dims]:
    """One index, or each index, of a dimension that is thereby fixed."""
    x, dim = ledger.of(a["self"]), a["dim"] % a["self"].ndim
    ledger.freeze([x[dim]], f"indexed by a constant in {a['op']}")
    rest = [d for n, d in enumerate(x) if n != dim]
    return [rest] * len(torch.utils._pytree.tree_leaves(out))


@rule("cat")
def cat(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Tensors laid end to end along one dimension."""
    parts = [ledger.of(t) for t in a["tensors"] if t.numel() or t.ndim == out.ndim]
    dim, why = a["dim"] % out.ndim, f"meets a dimension of fixed size in {a['op']}"
    columns = list(zip(*parts, strict=True))
    return [Dim(joined([d.labels for d in c])) if n == dim else _unite(ledger, c, why) for n, c in enumerate(columns)]


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
    """Indices chosen by data; the dimensions they are chosen from are fixed."""
    x, where = ledger.of(a["self"]), a.get("indices", a.get("index"))
    chosen = [n for n, i in enumerate(where) if i is not None] if isinstance(where, (list, tuple)) else [a["dim"] % len(x)]
    together = chosen == list(range(chosen[0], chosen[-1] + 1))
    if a["name"] == "gather" or not together or any(i.dtype == torch.bool for i in where if i is not None and i.ndim):
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


@rule("roll", "flip", "rot90")
def reorder(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """A fixed permutation of indices."""
    x = ledger.of(a["self"])
    over = {d % len(x) for d in a.get("dims") or range(len(x))}
    ledger.freeze([x[n] for n in over], f"permuted by {a['op']}")
    return [Dim(d.labels) for d in x]
