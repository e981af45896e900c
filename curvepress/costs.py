"""What a plan costs: parameters, bytes, multiply-accumulates, bit operations and latency, computed without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from .bitplan import FLOAT, SCALE, ZERO_POINT, BitPlan
from .latency import Table, model_seconds
from .plan import Plan, dropped, tensors_after
from .structure import TensorSpec

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "int64": 8, "int32": 4,
    "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
STORED = ("parameter", "buffer")


@dataclass(frozen=True)
class Cost:
    """``params`` counts parameters, ``bytes`` the tensors stored on disk, ``macs`` multiply-accumulates per example.

    ``bops`` are bit operations per example: multiply-accumulates times the bits of both factors, 32 for what is in float.  With
    bits, ``bytes`` are those of the content of the packed file: levels, scales and zero points, and what stays in float.
    ``latency`` is the predicted seconds for a batch, in float, where a table of measured times was given.
    """

    params: int
    bytes: int
    macs: int
    bops: int = 0
    latency: float | None = None

    def known(self) -> dict[str, float]:
        """The costs that are known, by name."""
        return {k: v for k, v in vars(self).items() if v is not None}


def written(name: str, value: float) -> str:
    """A cost for people to read: latency in milliseconds."""
    return f"{value * 1000:.3g} ms" if name == "latency" else f"{value:,}"


def cost(plan: Plan, table: Table | None = None) -> Cost:
    """The cost of the model that ``apply`` will return for ``plan``, quantized if the plan has bits; its latency by a ``table`` of it.

    Raises:
        ValueError: if the table is for another model.
    """
    tensors = tensors_after(plan)
    macs = sum(prod(t.shape) * t.positions for t in tensors.values())
    return Cost(
        latency=None if table is None else model_seconds(tensors, table.without(dropped(plan))),
        params=sum(prod(t.shape) for t in tensors.values() if t.kind == "parameter"),
        bytes=_float_bytes(tensors) if plan.bits is None else _packed_bytes(tensors, plan.bits),
        macs=macs,
        bops=FLOAT**2 * macs - (0 if plan.bits is None else _saved_bops(tensors, plan.bits)),
    )


def _float_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(prod(t.shape) * ITEM_BYTES[t.dtype] for t in tensors.values() if t.kind in STORED)


def _packed_bytes(tensors: Mapping[str, TensorSpec], bits: BitPlan) -> int:
    wiring = bits.wiring
    packed = {n: b for n, b in bits.weights.items() if b and n in tensors}
    plain = _float_bytes({n: t for n, t in tensors.items() if n not in packed and n not in wiring.gone})
    levels = sum((prod(tensors[n].shape) * b + 7) // 8 + SCALE * tensors[n].shape[wiring.axes[n]] for n, b in packed.items())
    biases = sum(tensors[w].shape[wiring.axes[w]] * ITEM_BYTES[tensors[w].dtype] for w in wiring.biases.values() if w in tensors)
    return plain + levels + biases + wiring.constants + (SCALE + ZERO_POINT) * len(bits.grids())


def _saved_bops(tensors: Mapping[str, TensorSpec], bits: BitPlan) -> int:
    return sum(
        prod(tensors[p.tensor].shape) * p.positions * (FLOAT**2 - bits.of(p.factors[0]) * bits.of(p.factors[1]))
        for p in bits.wiring.products
        if p.tensor in tensors
    )
