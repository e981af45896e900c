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
        companion(ledger, x[1], a[name], a["op"])
    return [Dim(d.labels) for d in x]


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "argmax", "argmin",
      "logsumexp", "linalg_vector_norm", "norm")  # fmt: skip
def reduction(ledger: Ledger, a: Arguments, out: Any) -> Labelled:
    """Reductions; over channels they would change with what is cut, so those are frozen."""
    x, result = ledger.of(a["self"]), tensors_in(out)[0]
    if "other" in a:
        return pointwise(ledger, a, out)
    dims = a.get("dim")
    over = {d % max(len(x), 1) for d in ([dims] if isinstance(dims, int) else dims or range(len(x)))}
    ledger.freeze([d for n, d in enumerate(x) if n in over], f"{a['op']} reduces over it")
    keep = len(x) == result.ndim
    dims = [Dim(d.labels) if n not in over else blank([1])[0] for n, d in enumerate(x) if keep or n not in over]
    return [dims] * len(tensors_in(out))


@rule("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax")
def softmax(ledger: Ledger, a: Arguments, out: Tensor) -> Dims:
    """Softmax couples what it runs over."""
    x = ledger.of(a["self"])
    ledger.freeze([x[a["dim"]]], f"{a['op']} runs over it")
    return [Dim(d.labels) for d in x]


SPATIAL = re.compile(r"(?:pool|upsample\w*?)([123])d")


@family(lambda func, name: SPATIAL.search(name) is not None)
def spatial(ledger: Ledger, a: Arguments, out: Any) -> Labelled:
    """Pooling and resampling: every channel by itself; spatial dimensions are never cut."""
    x = ledger.of(a["self"] if "self" in a else a["input"])
    count = int(SPATIAL.search(a["name"])[1])  # type: ignore[index]
    ledger.freeze(x[-count:], f"a spatial dimension of {a['op']}")
    results = tensors_in(out)
    return [[*(Dim(d.labels) for d in x[:-count]), *blank(r.shape[-count:])] for r in results]
