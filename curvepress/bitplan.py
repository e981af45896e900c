"""Bits as a part of a plan: plain data, with what their cost in bytes and in bit operations depends on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FLOAT = 32
"""Bits of what stays in float."""
READ = ".read"
"""Ends the name of what products alone read of a tensor that sums read too."""
SCALE, ZERO_POINT = 4, 1
"""Bytes that a grid takes beside its levels."""


@dataclass(frozen=True)
class Multiplication:
    """A product of two factors, with ``positions`` multiply-accumulates for each element of ``tensor``, a tensor of the structure.

    The factors are names of weights or activations; ``""`` is one that stays in float.
    """

    tensor: str
    positions: int
    factors: tuple[str, str]


@dataclass(frozen=True)
class Wiring:
    """What the tensors of a model become where it is quantized.

    ``products`` are all its multiplications.  ``axes`` is, by weight, the dimension along which it has a scale for each index.
    ``gone`` are tensors that are folded into others and are no longer stored.  ``biases`` are new ones by name, as many elements
    as the weight named there has along its axis.  ``constants`` are bytes that are stored besides and that no plan changes.
    """

    products: tuple[Multiplication, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    constants: int = 0


@dataclass(frozen=True)
class BitPlan:
    """Bits of weights by parameter and of activations by site; None, or no entry, leaves one in float.

    Raises:
        ValueError: if a number of bits is not a whole one from 2 to 8, or a weight has no axis in the wiring.
    """

    weights: Mapping[str, int | None] = field(default_factory=dict)
    activations: Mapping[str, int | None] = field(default_factory=dict)
    wiring: Wiring = field(default_factory=Wiring)

    def __post_init__(self) -> None:
        for name, bits in (*self.weights.items(), *self.activations.items()):
            if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
                raise ValueError(f"bits of {name!r} must be a whole number from 2 to 8, or null for float; got {bits!r}")
        if unknown := sorted(n for n, b in self.weights.items() if b and n not in self.wiring.axes):
            raise ValueError(f"bits for {unknown[0]!r}: no such weight can be quantized; these can: {', '.join(self.wiring.axes)}")

    def of(self, factor: str) -> int:
        """Bits that a factor of a product has when it is multiplied."""
        own = self.weights.get(factor) or self.activations.get(factor) or FLOAT
        whole = self.activations.get(factor.removesuffix(READ)) or FLOAT
        return min(own, whole) if factor.endswith(READ) else own

    def grids(self) -> list[str]:
        """The activations that have a grid of their own: a read has none where the tensor is as narrow."""
        there = [n for n, b in self.activations.items() if b]
        return [n for n in there if not n.endswith(READ) or (self.activations[n] or FLOAT) < self.of(n.removesuffix(READ))]


def check_bits(bits: BitPlan, tensors: Collection[str]) -> None:
    """Refuse bits that are for another model.

    Raises:
        ValueError: naming the first tensor that the model does not have.
    """
    wiring = bits.wiring
    for name in (*wiring.axes, *wiring.gone, *wiring.biases.values(), *(p.tensor for p in wiring.products)):
        if name not in tensors:
            raise ValueError(f"bits: the model has no tensor {name!r}; make the plan again for this model")


def bits_to_dict(bits: BitPlan) -> dict[str, Any]:
    """The bits as JSON-ready data."""
    return asdict(bits)


def bits_from_dict(data: Any) -> BitPlan:
    """What :func:`bits_to_dict` wrote.

    Raises:
        ValueError: if the data is something else.
    """
    try:
        w = data["wiring"]
        products = tuple(Multiplication(p["tensor"], p["positions"], (p["factors"][0], p["factors"][1])) for p in w["products"])
        wiring = Wiring(products, dict(w["axes"]), tuple(w["gone"]), dict(w["biases"]), w["constants"])
        return BitPlan(dict(data["weights"]), dict(data["activations"]), wiring)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the bits of the plan are damaged ({type(error).__name__}: {error}); make the plan again") from None
