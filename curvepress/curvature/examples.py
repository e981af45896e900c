"""Squared gradients of single examples: what every Gauss-Newton and Fisher estimator is a sum of.

``examine`` finds out once how the gradients of single examples can be read off a backward pass over many, and compares them
with those of each example run alone.  ``squares`` then sums ``(J'u)^2`` over examples and output vectors ``u``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .factors import Factor, Looked, convolved, factor, plain, squared_rows, summed_squares
from .graph import Use, curved
from .measures import Activation, gathered
from .recording import Gradients, Pass, Vectors, View, only, recorded
from .sharding import agreed, in_use, sharded, spans
from .trees import concatenated, examples, leaves, mapped, rows

Column = Callable[[int, int, Sequence[Tensor]], Vectors]
"""``(start, stop, outputs) -> u`` for the examples of that range, one output vector each, where the model returns ``outputs`` for them."""
TRIAL = 3
"""Examples of the first batch on which the reading of gradients is checked."""
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Reading:
    """How gradients of single examples are read: for each parameter the dimension that counts examples, or None if they
    must be run one at a time; why Gauss-Newton blocks may differ from those of the Hessian; the tables ``made`` in which
    all examples look up the same; and the weights of convolutions that are read for several output vectors ``at_once``."""

    axes: Mapping[str, int | None]
    curved: tuple[str, ...]
    made: frozenset[str] = frozenset()
    at_once: frozenset[str] = frozenset()

    @property
    def alone(self) -> list[str]:
        """Parameters that are read one example at a time."""
        return [n for n, a in self.axes.items() if a is None]


@dataclass
class Sums:
    """What has been summed so far: squared gradients by parameter, and finished sums by measure.  All float64."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Sums, factor: float = 1.0) -> None:
        """Adds another's sums times ``factor``."""
        for mine, theirs in ((self.squares, other.squares), (self.totals, other.totals)):
            for name, values in theirs.items():
                mine[name] = mine[name] + factor * values if name in mine else factor * values

    def finite(self) -> bool:
        """Whether no sum has overflowed."""
        return all(bool(torch.isfinite(v).all()) for v in (*self.squares.values(), *self.totals.values()))


class Tally:
    """Takes in the gradients of ``count`` examples for one output vector each, in whatever order the parameters come."""

    def __init__(self, view: View, count: int) -> None:
        self.view, self.count, self.sums = view, count, Sums()
        self.slopes: dict[str, Tensor] = {}

    def take(self, name: str, gradients: Tensor, start: int, rows: Tensor | None = None) -> None:
        """Gradients ``[n, *shape]`` of examples from ``start``: squared, and added up along each direction.

        With ``rows`` they are those of these rows of the parameter alone, all others being zero.
        """
        self._add(name, squared_rows(gradients) if name in self.view.rows else summed_squares(gradients), rows)
        for direction, measure in self.view.directions.items():
            for part in (p for p in measure.parts if p.tensor == name):
                move, labels = self.view.moves[direction][name], part.labels
                if rows is not None:
                    move, labels = move[rows], labels[rows.cpu().numpy()] if labels.ndim == move.ndim and len(labels) > 1 else labels
                moved = gathered(gradients.double() * move.double(), labels, measure.size, lead=1)
                slopes = self.slopes.setdefault(direction, moved.new_zeros(self.count, measure.size))
                slopes[start : start + len(moved)] += moved

    def _add(self, name: str, squares: Tensor, rows: Tensor | None) -> None:
        if rows is None:
            self.sums.add(Sums({name: squares}))
            return
        if name not in self.sums.squares:
            self.sums.squares[name] = squares.new_zeros(len(self.view.parameters[name]), *squares.shape[1:])
        self.sums.squares[name].index_add_(0, rows, squares)

    def read(self, name: str, factors: Sequence[tuple[Use, Factor]]) -> None:
        """The gradients of one parameter, which are the sum of those of its uses."""
        first = factors[0]
        watched = any(p.tensor == name for m in self.view.directions.values() for p in m.parts)
        if len(factors) == 1 and not watched and first[0].form != "other":
            self.sums.add(Sums({name: self._squares(*first)}))
            return
        if len(factors) == 1 and first[0].form == "itself" and isinstance(first[1], Looked):
            looked, factor = first[1].narrowed()
            for a, b in factor.blocks():
                self.take(name, factor.block(a, b), a, looked)
            return
        for a, b in first[1].blocks():
            self.take(name, torch.stack([_pulled(use, f.block(a, b), self.view) for use, f in factors]).sum(0), a)

    def _squares(self, use: Use, factor: Factor) -> Tensor:
        rows = use.tensor in self.view.rows
        if use.form == "itself":
            return factor.row_squares() if rows else factor.squares()
        return factor.squares().sum(0)[:, None] if rows else factor.squares().T

    def close(self) -> Sums:
        """The sums, once every parameter has been taken in: only now are slopes along directions complete and squared."""
        self.sums.add(Sums({}, {n: s.square().sum(0) for n, s in self.slopes.items()}))
        return self.sums


def examine(view: View, inputs: Any, outputs: Iterable[int] | None) -> Reading:
    """How the gradients of single examples can be read, checked on a few examples ``inputs``.

    For random vectors at the tensors ``outputs`` of the model's output (all, if None), each parameter's squares by the rules of
    :mod:`.factors` are compared with those of each example run alone; a parameter for which no layout of the examples
    agrees is read one example at a time.

    Raises:
        ValueError: if a parameter that is asked about has no influence on these outputs, or the model mixes examples.
    """
    view, names, count = replace(view, half=None, rows=frozenset()), list(view.parameters), examples(inputs)
    generator = torch.Generator().manual_seed(0)
    with only(view.model, names):
        trial = recorded(view, inputs, names)
        floating = [i for i, t in enumerate(trial.outputs) if t.is_floating_point()]
        asked = floating if outputs is None else list(outputs)
        u = {i: torch.randn(trial.outputs[i].shape, generator=generator).to(trial.outputs[i]) for i in asked}
        _separate(view, inputs, [trial.outputs[i] for i in asked], asked)
        truth = Tally(view, count)
        _alone(view, inputs, [lambda a, b, _: {i: v[a:b] for i, v in u.items()}], names, [truth])
        silent = [n for n in names if n not in truth.sums.squares]
        if silent:
            raise ValueError(f"parameter {silent[0]!r} has no influence on the outputs that the loss reads; leave it out of the measures")
        axes = _axes(view, trial, u, truth.sums, names)
        unread = [n for n in names if axes[n] is None]
        shared = _axes(view, recorded(view, inputs, names, unread), u, truth.sums, unread) if unread else {}
    made = frozenset(n for n in unread if shared[n] is not None)
    reading = Reading(axes | shared, tuple(curved(trial.order, trial.uses)), made, _at_once(view, trial, axes))
    if reading.alone and sharded(view.model):
        raise ValueError(
            f"the gradients of {reading.alone[0]!r} can only be read one example at a time, for which a sharded model takes too many "
            "passes; leave it out of the measures, or give the whole model"
        )
    return reading


def _separate(view: View, inputs: Any, together: Sequence[Tensor], asked: Sequence[int]) -> None:
    """Raises where the outputs of an example depend on the examples beside it."""
    with torch.no_grad():
        single = leaves(concatenated([view.run(rows(inputs, torch.tensor([n]))) for n in range(examples(inputs))]))
    for own, other in ((single[i], t) for i, t in zip(asked, together, strict=True)):
        bound = max(AGREEMENT, 4 * torch.finfo(own.dtype).eps)
        if own.shape != other.shape or bool((own - other).abs().max() > bound * other.abs().max()):
            raise ValueError(
                "the model mixes the examples of a batch (by batch statistics in evaluation mode?), so they have no gradients of their"
                " own; choose the estimator 'hessian' with micro at least the batch size"
            )


def _axes(view: View, trial: Pass, u: Vectors, truth: Sums, names: Sequence[str]) -> dict[str, int | None]:
    """For each parameter the first layout in which its squares are the true ones, None if there is none."""
    gradients, count = trial.gradients(u), len(next(iter(u.values())))
    readings = [{n: _trial(view, trial, gradients, n, axis, count) for n in names} for axis in (0, 1)]
    return {n: next((a for a, r in enumerate(readings) if _agree(r[n], truth.squares[n], view.parameters[n].dtype)), None) for n in names}


def _trial(view: View, trial: Pass, gradients: Gradients, name: str, axis: int, count: int) -> Tensor | None:
    """The squares of one parameter under one layout, None where it does not fit."""
    tally = Tally(view, count)
    try:
        tally.read(name, _factors(trial, gradients, name, axis, count))
    except (Unread, RuntimeError):  # a reshape that does not divide: the examples are not where ``axis`` says
        return None
    return tally.sums.squares[name]


def _agree(found: Tensor | None, truth: Tensor, dtype: torch.dtype) -> bool:
    """Whether two readings are the same but for rounding, which in low precision flips a ReLU here and there.

    A wrong layout is off by a good part of the whole.
    """
    bound = {torch.float64: 1e-6, torch.float32: 0.02}.get(dtype, 0.1)
    return found is not None and found.shape == truth.shape and bool((found - truth).norm() <= bound * truth.norm())


def _at_once(view: View, trial: Pass, axes: Mapping[str, int | None]) -> frozenset[str]:
    """The weights of convolutions of which all that is asked is sums over examples and vectors, and which are used once."""
    watched = {p.tensor for m in view.directions.values() for p in m.parts}
    used = Counter(use.tensor for use in trial.uses)
    fit = [use for use in trial.uses if use.form == "itself" and used[use.tensor] == 1 and axes[use.tensor] == 0]
    return frozenset(use.tensor for use in fit if use.operation == "Convolution" and use.position == 1 and plain(use)) - watched


def squares(view: View, reading: Reading, inputs: Any, columns: Sequence[Column], micro: int) -> Sums:
    """Sums over the examples of ``inputs``, and over ``columns`` of one output vector ``u`` an example, of ``(J'u)^2``.

    Args:
        micro: examples run at a time for one column.
    """
    sums, count = Sums(), examples(inputs)
    fast = {n: a for n, a in reading.axes.items() if a is not None}
    counted = len(columns)
    columns = [*columns, *[columns[-1]] * (agreed(view.model, counted) - counted)]
    most = min(len(columns), micro) if reading.at_once else 1
    for start, stop, counts in spans(view.model, count, _size(micro, most)):
        part = mapped(lambda t: t.contiguous(), rows(inputs, torch.arange(start, stop)))
        tallies = [Tally(view, stop - start) for _ in columns]
        with only(view.model, reading.alone):
            _alone(view, part, columns, reading.alone, tallies, start)
        with only(view.model, list(fast)):
            record = recorded(view, part, list(fast), reading.made)
            for first in range(0, len(columns), most):
                vectors = [c(start, stop, record.outputs) for c in columns[first : first + most]]
                _together(record, vectors, replace(reading, axes=fast), tallies[first : first + most])
        for tally in tallies[:counted] if counts else ():
            sums.add(tally.close())
    return sums


def _size(micro: int, columns: int) -> int:
    """How many examples to run at a time for so many columns, in the memory of ``micro`` for one.

    A pass keeps about three activations of each layer, and one gradient for each column.
    """
    return max(1, 4 * micro // (3 + columns))


def _together(record: Pass, vectors: Sequence[Vectors], reading: Reading, tallies: Sequence[Tally]) -> None:
    """Takes in the gradients for several vectors an example, each into a tally of its own but for what is read at once."""
    several = [record.gradients(u) for u in vectors]
    at_once = reading.at_once if len(several) > 1 else frozenset()
    for use in record.uses:
        own = [g for gradients in several if (g := gradients[use.node, 0]) is not None]
        if use.tensor in at_once and own:
            tallies[0].read(use.tensor, [(use, convolved(use, own))])
    for gradients, tally in zip(several, tallies, strict=True):
        for name, (_, edge) in record.activations.items():
            if (g := gradients[edge.node, edge.output_nr]) is not None:
                tally.sums.add(Sums({}, {name: _activation(tally.view.activations[name], g)}))
        for name, axis in reading.axes.items():
            if name not in at_once:
                tally.read(name, _factors(record, gradients, name, axis or 0, tally.count))


class Unread(ValueError):
    """No rule reads the gradients of a parameter."""


def _factors(record: Pass, gradients: Gradients, name: str, axis: int, count: int) -> list[tuple[Use, Factor]]:
    own = [(u, g) for u in record.uses if u.tensor == name and (g := gradients[u.node, 0]) is not None]
    found = [(u, f) for u, g in own if (f := factor(u, g, count, axis)) is not None]
    if not found or len(found) < len(own):
        raise Unread(f"the gradients of {name!r} could be read on the first examples but not on later ones; give batches of one form")
    return found


def _activation(measure: Activation, gradient: Tensor) -> Tensor:
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    if measure.dim is None:
        return wide.square().sum(dtype=torch.float64)[None]
    return wide.square().movedim(measure.dim, 0).flatten(1).sum(1, dtype=torch.float64)


def _pulled(use: Use, gradients: Tensor, view: View) -> Tensor:
    """Gradients of an operand ``[examples, *operand]`` as gradients of the parameter it was made from."""
    if use.form != "other":
        return gradients.transpose(1, 2) if use.form == "transposed" else gradients
    parameter = view.parameters[use.tensor]
    return torch.stack([torch.autograd.grad([use.edge], [parameter], [g], retain_graph=True)[0] for g in gradients])


def _alone(view: View, inputs: Any, columns: Sequence[Column], names: Sequence[str], tallies: Sequence[Tally], start: int = 0) -> None:
    """Each example run by itself, from number ``start`` of the columns on: slow, and right for any use of a parameter."""
    for number in range(examples(inputs)) if names else ():
        one = rows(inputs, torch.tensor([number]))
        with torch.enable_grad(), in_use(view.model) as live:
            outputs = leaves(view.run(one))
        for column, tally in zip(columns, tallies, strict=True):
            u = column(start + number, start + number + 1, outputs)
            roots = {i: v.to(outputs[i]) for i, v in u.items() if outputs[i].requires_grad}
            wanted = [live[n] for n in names]
            if roots:
                found = torch.autograd.grad([outputs[i] for i in roots], wanted, list(roots.values()), retain_graph=True, allow_unused=True)
                for name, g in zip(names, found, strict=True):
                    if g is not None:
                        tally.take(name, g[None], number)
