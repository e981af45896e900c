"""What a plan costs: parameters, bytes and multiply-accumulates, computed without the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .plan import Plan, tensors_after

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "int64": 8, "int32": 4,
    "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """``params`` counts parameters, ``bytes`` the tensors stored on disk, ``macs`` multiply-accumulates per example."""

    params: int
    bytes: int
    macs: int


def cost(plan: Plan) -> Cost:
    """The cost of the model that ``apply`` will return for ``plan``."""
    tensors = tensors_after(plan).values()
    return Cost(
        params=sum(prod(t.shape) for t in tensors if t.kind == "parameter"),
        bytes=sum(prod(t.shape) * ITEM_BYTES[t.dtype] for t in tensors if t.kind in ("parameter", "buffer")),
        macs=sum(prod(t.shape) * t.positions for t in tensors),
    )
