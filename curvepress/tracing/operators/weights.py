"""Operators with weights: convolutions, matrix products, embeddings; and attention."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from ..algebra import CONVOLVED, QUERY_KEY, TABLE, VALUE, merged
from ..labelling import Dim, Dims, Ledger, blank
from .elementwise import broadcast, companion, unite
from .table import Arguments, rule


@rule("convolution", "_convolution")
def convolution(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Convolutions: plain, grouped, depthwise and transposed."""
    x, w, groups, op = ledger.of(a["input"]), ledger.of(a["weight"]), a["groups"], a["op"]
    made, read = (1, 0) if a["transposed"] else (0, 1)
    ledger.freeze([*x[2:], *w[2:]], f"a spatial dimension of {op}")
    ledger.role(w[made], "out")
    ledger.mark(w[made], CONVOLVED)
    for dim in w[2:]:
        ledger.role(dim, "kernel")
    if groups == 1:
        channels = w[made]
        ledger.role(w[read], "in")
        ledger.same(x[1], w[read], f"reads a dimension of fixed size in {op}")
    else:
        channels = (_grouped_transposed if a["transposed"] else _grouped)(ledger, x[1], w, groups, op)
    companion(ledger, channels, a["bias"], op)
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
    if len(x) == 3 and not any(d.origin for d in (*x, *y)):
        carries = not ledger.atoms.live(x[-1].labels) and ledger.atoms.live(y[-1].labels)
        ledger.mark(*((y[-1], VALUE) if carries else (x[-1], QUERY_KEY)))
    batch = [unite(ledger, (x[0], y[0]), f"meets a dimension of fixed size in {a['op']}")] if len(x) == 3 else []
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
    companion(ledger, w[0], a["bias"], a["op"])
    ledger.work(w, [], prod(map(len, x[:-1])), a["name"])
    return [*(Dim(d.labels) for d in x[:-1]), Dim(w[0].labels)]


@rule("embedding")
def embedding(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Rows of a table; the table's entries are named by the data and stay."""
    table = ledger.of(a["weight"])
    ledger.freeze([table[0], *ledger.of(a["indices"])], f"looked up by index in {a['op']}")
    ledger.role(table[0], "along")
    ledger.role(table[1], "out")
    ledger.mark(table[1], TABLE)
    return [*blank(a["indices"].shape), Dim(table[1].labels)]


_ATTENTION = tuple(
    f"_scaled_dot_product_{kind}"
    for kind in ("flash_attention_for_cpu", "fused_attention_overrideable", "efficient_attention", "flash_attention", "cudnn_attention")
)


@rule(*_ATTENTION)
def attention(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Scaled dot-product attention over ``[batch, heads, positions, width]``."""
    q, k, v = (ledger.of(a[n]) for n in ("query", "key", "value"))
    why = f"meets a dimension of fixed size in {a['op']}"
    ledger.same(q[-1], k[-1], why)
    ledger.same(k[-2], v[-2], why)
    ledger.mark(q[-1], QUERY_KEY)
    ledger.mark(v[-1], VALUE)
    lead = [unite(ledger, dims, why) for dims in zip(q[:-2], k[:-2], v[:-2], strict=True)]
    ledger.freeze([q[-2], k[-2]], f"positions of {a['op']}")
    mask = a.get("attn_mask", a.get("attn_bias"))
    if mask is not None:
        broadcast(ledger, [[*lead, q[-2], k[-2]], ledger.of(mask)], (*map(len, lead), len(q[-2]), len(k[-2])), a["op"])
    for width in (q[-1], v[-1]):
        ledger.work([*lead, width], [q[-2], k[-2]], 1, "attention")
    return [*lead, Dim(q[-2].labels), Dim(v[-1].labels)]
