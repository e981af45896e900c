"""Norms, reductions, softmax, pooling: operators that look at many elements of each channel, or at many channels."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..labelling import Dim, Dims, Ledger, blank
from .elementwise import broadcast, companion, pointwise
from .table import Arguments, Labelled, family, rule, tensors_in


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm",
      "batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def batch_norm(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Batch normalisation: every channel by itself."""
    x = ledger.of(a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        companion(ledger, x[1], a.get(name), a["op"])
    return [Dim(d.labels) for d in x]


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Layer normalisation: what is left is normalised by itself, so cutting changes its statistics."""
    x = ledger.of(a["input"])
    for tensor in (a.get("weight"), a.get("bias")):
        if tensor is not None:
            broadcast(ledger, [x, ledger.of(tensor)], [len(d) for d in x], a["op"])
    return [Dim(d.labels) for d in x]


@rule("native_group_norm")
def group_norm(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """Group normalisation: its groups stay equally wide."""
    x = ledger.of(a["input"])
    ledger.split(x[1], (a["group"], len(x[1]) // a["group"]))
    for name in ("weight", "bias"):
        companion(ledger, x[1], a[name], a["op"])
    return [Dim(d.labels) for d in x]


@rule("mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm")
def statistic(ledger: Ledger, a: Arguments, out: Any) -> Labelled:
    """Sums and statistics; over channels they are, like those of a norm, taken over the channels that are left."""
    x, over = ledger.of(a["self"]), reduced(a)
    keep = len(x) == tensors_in(out)[0].ndim
    dims = [Dim(d.labels) if n not in over else blank([1])[0] for n, d in enumerate(x) if keep or n not in over]
    return [dims] * len(tensors_in(out))


def reduced(a: Arguments) -> set[int]:
    """The dimensions that a reduction runs over: those given, or all."""
    dims, count = a.get("dim"), a["self"].ndim
    return {d % max(count, 1) for d in ([dims] if isinstance(dims, int) else dims or range(count))}


@rule("amax", "amin", "max", "min", "prod", "any", "all", "argmax", "argmin", "logsumexp")
def extreme(ledger: Ledger, a: Arguments, out: Any) -> Labelled:
    """Reductions whose result zeros would change: what they run over stays."""
    if "other" in a:
        return pointwise(ledger, a, out)
    ledger.freeze([d for n, d in enumerate(ledger.of(a["self"])) if n in reduced(a)], f"{a['op']} reduces over it")
    return statistic(ledger, a, out)


@rule("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax")
def softmax(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Softmax couples what it runs over."""
    x = ledger.of(a["self"])
    ledger.freeze([x[a["dim"]]], f"{a['op']} runs over it")
    return [Dim(d.labels) for d in x]


SPATIAL = re.compile(r"(?:pool|upsample\w*?|(?:reflection|replication)_pad)([123])d")


@family(lambda func, name: SPATIAL.search(name) is not None)
def spatial(ledger: Ledger, a: Arguments, out: Any) -> Labelled:
    """Pooling, resampling and mirrored borders: every channel by itself; spatial dimensions are never cut."""
    x = ledger.of(a["self"] if "self" in a else a["input"])
    count = int(SPATIAL.search(a["name"])[1])  # type: ignore[index]
    ledger.freeze(x[-count:], f"a spatial dimension of {a['op']}")
    results = tensors_in(out)
    return [[*(Dim(d.labels) for d in x[:-count]), *blank(r.shape[-count:])] for r in results]
