"""What a plan costs: parameters, bytes, multiply-accumulates and latency, computed without the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .latency import Table, model_seconds
from .plan import Plan, tensors_after

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "int64": 8, "int32": 4,
    "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """``params`` counts parameters, ``bytes`` the tensors stored on disk, ``macs`` multiply-accumulates per example.

    ``latency`` is the predicted seconds for a batch, where a table of measured times was given.
    """

    params: int
    bytes: int
    macs: int
    latency: float | None = None

    def known(self) -> dict[str, float]:
        """The costs that are known, by name."""
        return {k: v for k, v in vars(self).items() if v is not None}


def written(name: str, value: float) -> str:
    """A cost for people to read: latency in milliseconds."""
    return f"{value * 1000:.3g} ms" if name == "latency" else f"{value:,}"


def cost(plan: Plan, table: Table | None = None) -> Cost:
    """The cost of the model that ``apply`` will return for ``plan``, with its latency by a ``table`` of this model.

    Raises:
        ValueError: if the table is for another model.
    """
    after = tensors_after(plan)
    tensors = after.values()
    return Cost(
        latency=None if table is None else model_seconds(after, table),
        params=sum(prod(t.shape) for t in tensors if t.kind == "parameter"),
        bytes=sum(prod(t.shape) * ITEM_BYTES[t.dtype] for t in tensors if t.kind in ("parameter", "buffer")),
        macs=sum(prod(t.shape) * t.positions for t in tensors),
    )
