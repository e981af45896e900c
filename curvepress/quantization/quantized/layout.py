"""What can be quantized in a model, as data: weights, sites of activations, the products between them; and the bits of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..quantizer import Scheme

Role = Literal["product", "sum"]
VERSION = 1


@dataclass(frozen=True)
class Weight:
    """A parameter that products read.

    ``axis`` counts output channels, ``macs`` are multiply-accumulates per example of all products that read it.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    macs: int

    @property
    def size(self) -> int:
        """Elements."""
        found = 1
        for n in self.shape:
            found *= n
        return found


@dataclass(frozen=True)
class Site:
    """A place where activations are put on a grid: one tensor, or several that a concatenation joins.

    ``role`` is ``product`` where convolutions, linear layers or matrix products read it, otherwise ``sum``.  A tensor that both
    products and sums read has two sites: ``x`` for the tensor itself, of role ``sum``, and ``x.read`` for what products read of it,
    which makes a difference only where it has fewer bits.  ``shape`` is that of one example, ``macs`` counts the
    multiply-accumulates per example of the products that read it, ``weights`` names those of the products that read or make it.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    size: int
    macs: int
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """A convolution, linear layer, matrix product or embedding: ``inputs`` are names of sites, ``macs`` counts per example."""

    name: str
    operator: str
    weight: str | None
    inputs: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Layout:
    """All that can be quantized in a model, in the order in which it is computed; ``unread`` says which products cannot and why."""

    weights: tuple[Weight, ...]
    sites: tuple[Site, ...]
    products: tuple[Product, ...]
    unread: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bits:
    """Bits of weights by parameter name and of activations by site; None leaves a tensor in float.

    What is not named has ``weight``, ``product`` or ``sum`` bits, by what it is (see :class:`Site`).  ``group`` gives each run of so
    many inputs of an output channel a scale of its own (linear layers only); ``dynamic`` takes the scales of the activations of
    linear layers from each token when it comes.  ``asymmetric`` gives weights zero points, see :func:`weight_scheme`;
    ``per_tensor`` one scale to each weight, for targets that know no scales of output channels.
    """

    weights: Mapping[str, int | None] = field(default_factory=dict)
    sites: Mapping[str, int | None] = field(default_factory=dict)
    weight: int | None = 8
    product: int | None = 8
    sum: int | None = 8
    group: int | None = None
    dynamic: bool = False
    asymmetric: bool = False
    per_tensor: bool = False

    def __post_init__(self) -> None:
        given = {**self.weights, **self.sites, "weight": self.weight, "product": self.product, "sum": self.sum}
        for name, bits in given.items():
            if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
                raise ValueError(f"{name} cannot have {bits!r} bits: give a whole number from 2 to 8, or None to leave it in float")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise ValueError(f"group must be a positive whole number of inputs, got {self.group!r}")
        if self.group is not None and self.per_tensor:
            raise ValueError(f"a weight has one scale or one for each {self.group} inputs: leave out per_tensor or group")

    def of_weight(self, name: str) -> int | None:
        """Bits of a weight."""
        return self.weights.get(name, self.weight)

    def of_site(self, site: Site) -> int | None:
        """Bits of a site."""
        return self.sites.get(site.name, self.product if site.role == "product" else self.sum)

    def to_json(self) -> str:
        """The bits as JSON, which :func:`bits_from_json` reads."""
        return json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))


def weight_scheme(bits: int, axis: int | None, *, group: int | None = None, asymmetric: bool = False) -> Scheme:
    """The grid of a weight, with one scale for each index of ``axis``, or for the whole if that is None.

    Zero points are for fewer than 8 bits without groups: there a level less its zero point still fits into int8, which is what
    runtimes multiply by, with the same values and at the same speed.
    """
    return Scheme(bits, symmetric=not asymmetric or bits == 8 or group is not None, axis=axis, group=group)


def bits_from_json(text: str) -> Bits:
    """The bits that ``to_json`` wrote.

    Raises:
        ValueError: if the text is something else.
    """
    try:
        found: dict[str, Any] = json.loads(text)
        if found.pop("version", None) != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        return Bits(**found)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"these are not the bits of a quantized model: {error}") from None


def sums_in_float(layout: Layout) -> tuple[str, ...]:
    """The sites of sums that no convolution makes or reads, in models of which convolutions are the smaller part: kernels are integer
    without a grid there too.

    Residual streams of transformers hold outliers, which a grid for the whole tensor pays for with the accuracy of everything else.
    """
    convolved = {p.weight for p in layout.products if p.operator.startswith("conv")}
    if 2 * sum(p.macs for p in layout.products if p.weight in convolved) > sum(p.macs for p in layout.products):
        return ()
    return tuple(s.name for s in layout.sites if s.role == "sum" and not convolved & set(s.weights))


def check_names(bits: Bits, layout: Layout) -> None:
    """Refuse bits for weights or sites that the model does not have.

    Raises:
        ValueError: naming them and what there is.
    """
    for kind, given, there in (("weight", bits.weights, layout.weights), ("site", bits.sites, layout.sites)):
        names = [x.name for x in there]
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"the model has no {kind} {', '.join(map(repr, unknown))}; it has {', '.join(names)}")
