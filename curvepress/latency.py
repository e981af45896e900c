"""Tables of measured latency: how long each layer takes at which widths and bits, read without a model or a runtime.

A table holds, for every kind of layer of a model, the seconds of a layer measured on a grid of widths, and what the whole
model takes besides.  It is valid on the machine it was measured on only.  The idea of a lookup table interpolated over
widths is NViT's (Yang et al., 2023, section 3.3).  Latency is no smooth function of widths, though: vector units take channels
in blocks, and some kernels need a multiple of a few channels and are left where there is none.  So the grid has points on both sides of
each such cliff, and widths are interpolated among points of their own kind: multiples of ``align`` among multiples, others among others.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil, isfinite
from typing import Any

from .structure import TensorSpec

FORMAT = {"format": "curvepress latency table", "version": 1}
FLOAT = 32
"""Bits of a layer that is not quantized."""


@dataclass(frozen=True)
class Machine:
    """What a measured time depends on besides the layer."""

    processor: str
    runtime: str
    version: str
    threads: int
    batch: int


@dataclass(frozen=True)
class Layer:
    """A layer as its weight is used: ``conv`` or ``linear``, with what a runtime must know to run one like it.

    ``size`` is the shape of what it reads without batch and channels.  A weight has its outputs at dimension ``out`` and its
    inputs at dimension ``into``.  A convolution with one input channel a group is ``depthwise``.
    """

    kind: str
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    depthwise: bool = False
    bias: bool = True
    out: int = 0
    into: int = 1

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """Output and input channels of a weight of this shape."""
        return shape[self.out], shape[self.into]


@dataclass(frozen=True)
class Axis:
    """The measured widths along one side of a layer, ascending.

    Times rise in steps after multiples of ``period``; widths that are multiples of ``align`` run on a kernel of their own.
    """

    knots: tuple[int, ...]
    period: int = 1
    align: int = 1

    def between(self, width: int) -> tuple[tuple[int, float], ...]:
        """The knots that a width is interpolated from: their positions and shares.  Outside of all knots the outermost counts."""
        own = [n for n, k in enumerate(self.knots) if (k % self.align == 0) == (width % self.align == 0)] or list(range(len(self.knots)))
        right = bisect_left(own, width, key=lambda n: self.knots[n])
        if right == len(own) or self.knots[own[right]] == width or right == 0:
            return ((own[min(right, len(own) - 1)], 1.0),)
        low, high = own[right - 1], own[right]
        start, end = self.knots[low], self.knots[high]
        if width % self.align == 0 and ceil(end / self.period) - ceil(start / self.period) > 1:  # steps in between that were not measured
            start, width, end = (ceil(w / self.period) for w in (start, width, end))
        share = (width - start) / (end - start)
        return (low, 1 - share), (high, share)


@dataclass(frozen=True)
class Grid:
    """Measured seconds of one kind of layer, ``seconds[output knot][input knot]``."""

    outs: Axis
    ins: Axis
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        rows, columns = len(self.outs.knots), len(self.ins.knots)
        shaped = len(self.seconds) == rows > 0 and all(len(r) == columns > 0 for r in self.seconds)
        if not shaped or not all(isfinite(s) and s > 0 for r in self.seconds for s in r):
            raise ValueError(f"a grid of {rows} by {columns} widths needs as many times, all above zero and finite; measure it again")

    def __call__(self, out: int, into: int) -> float:
        """Seconds at these widths."""
        return sum(a * b * self.seconds[r][c] for r, a in self.outs.between(out) for c, b in self.ins.between(into))


@dataclass(frozen=True)
class Table:
    """Measured latency of one model's layers on one machine.

    ``layers`` is by the name of the weight, ``grids`` by layer and bits.  A model takes ``fixed`` seconds besides, and
    ``each`` seconds for every activation its layers make for one batch.

    Raises:
        ValueError: if a number is negative or not finite, or a layer has no grid at 32 bits.
    """

    machine: Machine
    layers: Mapping[str, Layer]
    grids: Mapping[tuple[Layer, int], Grid] = field(repr=False)
    fixed: float = 0.0
    each: float = 0.0

    def __post_init__(self) -> None:
        if not all(isfinite(x) and x >= 0 for x in (self.fixed, self.each)):
            raise ValueError(f"a latency table has fixed = {self.fixed} and each = {self.each}; both must be finite and not negative")
        if missing := [n for n, layer in self.layers.items() if (layer, FLOAT) not in self.grids]:
            raise ValueError(f"the latency table has no times for {', '.join(missing[:3])}; measure it again")

    def without(self, names: Collection[str]) -> Table:
        """The table of the model without these layers."""
        return replace(self, layers={n: layer for n, layer in self.layers.items() if n not in names}) if names else self

    def layer(self, name: str, out: int, into: int, bits: int = FLOAT) -> float:
        """Seconds of the layer with this weight at these widths and bits.

        Raises:
            ValueError: if the table has no such layer, or not at these bits.
        """
        if name not in self.layers:
            raise ValueError(f"the latency table says nothing about {name!r}; its layers are {', '.join(self.layers)}")
        grid = self.grids.get((self.layers[name], bits))
        if grid is None:
            known = sorted({b for layer, b in self.grids if layer == self.layers[name]})
            raise ValueError(f"the latency table has {name!r} at {', '.join(map(str, known))} bits, not at {bits}; measure those too")
        return grid(out, into)


def activations(tensors: Mapping[str, TensorSpec], table: Table, of: Collection[str] | None = None) -> float:
    """How many numbers the layers of the table, or some of them, make for one batch.

    A layer makes each of its channels at as many places as one element of its weight has multiply-accumulates.
    """
    made = (tensors[n].shape[table.layers[n].out] * max(tensors[n].positions, 1) for n in (table.layers if of is None else of))
    return float(table.machine.batch * sum(made))


def layers_seconds(tensors: Mapping[str, TensorSpec], table: Table, bits: Mapping[str, int] | None = None) -> float:
    """Seconds of all layers together, each at its bits (32 where none are given).

    Raises:
        ValueError: if the tensors are of another model, or the table has not these bits.
    """
    if missing := [n for n in table.layers if n not in tensors]:
        raise ValueError(f"the latency table is for another model: it has {missing[0]!r}, which this model has not; measure one for this")
    widths = ((n, *layer.widths(tensors[n].shape)) for n, layer in table.layers.items())
    return sum(table.layer(n, out, into, (bits or {}).get(n, FLOAT)) for n, out, into in widths)


def model_seconds(tensors: Mapping[str, TensorSpec], table: Table, bits: Mapping[str, int] | None = None) -> float:
    """Predicted wall-clock seconds of a model with these tensors for one batch.

    Raises:
        ValueError: as :func:`layers_seconds`.
    """
    return layers_seconds(tensors, table, bits) + table.fixed + table.each * activations(tensors, table)


def check_machine(table: Table, here: Machine) -> None:
    """See whether a table was measured on this machine, with this runtime and settings.

    Raises:
        ValueError: if not; the message has what differs.
    """
    if table.machine != here:
        names = [f.name for f in fields(Machine)]
        apart = [(n, getattr(table.machine, n), getattr(here, n)) for n in names if getattr(table.machine, n) != getattr(here, n)]
        said = "; ".join(f"{n} was {was!r} and is {now!r}" for n, was, now in apart)
        raise ValueError(f"the latency table is stale: it was measured elsewhere or otherwise ({said}); measure it again here")


def table_to_json(table: Table) -> str:
    """The table as JSON text that :func:`table_from_json` reads back to an equal table."""
    grids = [{"layer": asdict(layer), "bits": bits, **asdict(grid)} for (layer, bits), grid in table.grids.items()]
    layers = {n: asdict(layer) for n, layer in table.layers.items()}
    rest = {"machine": asdict(table.machine), "fixed": table.fixed, "each": table.each}
    return json.dumps({**FORMAT, **rest, "layers": layers, "grids": grids}) + "\n"


def table_from_json(text: str) -> Table:
    """The table written by :func:`table_to_json`.

    Raises:
        ValueError: if the text is no such table, or a time in it is not a positive, finite number.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no latency table: the JSON is damaged ({error}); measure it again") from None
    if not isinstance(data, dict) or any(data.get(k) != v for k, v in FORMAT.items()):
        raise ValueError("this is no latency table of this version; measure it again")
    try:
        grids = {(_layer(g["layer"]), int(g["bits"])): Grid(_axis(g["outs"]), _axis(g["ins"]), _rows(g["seconds"])) for g in data["grids"]}
        layers = {n: _layer(d) for n, d in data["layers"].items()}
        return Table(Machine(**data["machine"]), layers, grids, float(data["fixed"]), float(data["each"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this latency table is damaged ({type(error).__name__}: {error}); measure it again") from None


def _layer(data: Mapping[str, Any]) -> Layer:
    found: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return Layer(**found)


def _axis(data: Mapping[str, Any]) -> Axis:
    return Axis(tuple(map(int, data["knots"])), int(data["period"]), int(data["align"]))


def _rows(data: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(map(float, row)) for row in data)
