"""What a trace knows so far: the labels of every tensor's dimensions, the roles of weights, and the work they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from ..structure import Site
from .algebra import Atoms, Labels, empty
from .branches import History, Step


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: the labels of its indices and, for one of the model's own tensors, which it is, ``whole`` or in part."""

    labels: Labels
    origin: Site | None = None
    whole: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, labels: Labels) -> Dim:
        """Some of the indices, of the same tensor of the model as before."""
        return Dim(labels, self.origin, whole=False)

    @property
    def labelled(self) -> bool:
        """Whether any index may carry an atom."""
        return bool(self.labels.shape[1])


Dims = Sequence[Dim]


def blank(shape: Iterable[int]) -> list[Dim]:
    """Dimensions that are never cut: inputs, positions, constants."""
    return [Dim(empty(n)) for n in shape]


class Ledger:
    """The state of a trace.  Operators' rules read and write it; see :mod:`curvepress.tracing.operators`."""

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.roles: dict[Site, str] = {}
        self.positions: dict[str, int] = {}
        self.products: dict[str, tuple[Dim, ...]] = {}
        self.touched: set[int] = set()  # ids of tensors that operators have read
        self.strays: dict[int, Tensor] = {}  # parameters that were read and are none of the model's, by their ids
        self.decided_by_data = False
        self.history = History()
        self._numbers: dict[int, int] = {}  # ids of tensors and the number of the value they hold now
        self._values = 0
        self._names: dict[int, str] = {}
        self._companions: set[str] = set()  # buffers carry channels, they do not make or read them
        self._known: dict[int, tuple[Tensor, Dims]] = {}
        self._waiting: dict[int, tuple[Tensor, Any, Callable[[], Any]]] = {}
        self._pieces: dict[int, list[Dims]] = {}

    def own(self, name: str, tensor: Tensor) -> None:
        """A tensor of the model: no value of the forward pass."""
        self._names[id(tensor)] = name

    def number(self, tensor: Tensor) -> int:
        """The number of the value that a tensor holds now."""
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = self._values = self._values + 1
        return self._numbers[id(tensor)]

    def step(self, reads: Sequence[Tensor], makes: Sequence[Tensor], *, plain_sum: bool) -> None:
        """An operator has read some tensors and made others, perhaps in the place of the first."""
        names = {self._names[id(t)] for t in reads if id(t) in self._names}
        values = tuple(self.number(t) for t in reads if id(t) not in self._names)
        for tensor in makes:
            self._numbers.pop(id(tensor), None)
        made = tuple(self.number(t) for t in makes)
        self.history.steps.append(Step(values, made, values if plain_sum and len(values) == 2 else ()))
        self.history.used.append(names)

    def adopt(self, name: str, tensor: Tensor) -> None:
        """Give every dimension of a tensor of the model fresh atoms."""
        self.put(tensor, [Dim(self.atoms.new(n), (name, d)) for d, n in enumerate(tensor.shape)])
        if not isinstance(tensor, Parameter):
            self._companions.add(name)

    def elastic(self, shape: Iterable[int]) -> list[Dim]:
        """Dimensions along which all entries are alike: any may go, with what they meet.  One of size one says nothing."""
        return [Dim(self.atoms.new(n)) if n > 1 else Dim(empty(n)) for n in shape]

    def mark(self, dim: Dim, marks: int) -> None:
        """Say what the indices of a dimension are for; see :mod:`curvepress.tracing.algebra`."""
        if dim.labelled:
            self.atoms.mark(dim.labels, marks)

    def put(self, tensor: Tensor, dims: Dims) -> None:
        """Remember the dimensions of ``tensor``."""
        if tuple(map(len, dims)) != tuple(tensor.shape):
            raise AssertionError(f"a rule gave sizes {tuple(map(len, dims))} to a tensor of shape {tuple(tensor.shape)}")
        self._waiting.pop(id(tensor), None)
        self._known[id(tensor)] = (tensor, dims)  # the tensor itself keeps its id from being used again

    def wait(self, tensor: Tensor, stack: Any, decide: Callable[[], Any]) -> None:
        """Let ``decide`` give the dimensions of ``tensor`` when they are asked for; see :mod:`curvepress.tracing.operators.observing`."""
        self._waiting[id(tensor)] = tensor, stack, decide

    def waiting(self, tensor: Tensor) -> Any:
        """The stack that ``tensor`` is, if nobody has asked for its dimensions yet."""
        return self._waiting.get(id(tensor), (None, None))[1]

    def piece(self, tensor: Tensor, dims: Dims) -> None:
        """Remember the dimensions of a piece of a stack, in which the stack's own dimension has size one."""
        self._pieces.setdefault(id(tensor), []).append(dims)

    def forms(self, tensor: Tensor) -> list[Dims]:
        """The dimensions of ``tensor``, or of the pieces of a stack that nobody has read; asking decides nothing."""
        return self._pieces.get(id(tensor), []) if id(tensor) in self._waiting else [self.of(tensor)]

    def of(self, tensor: Tensor) -> Dims:
        """The dimensions of ``tensor``; blank if no rule has spoken of it."""
        if id(tensor) in self._waiting:
            self.put(tensor, self._waiting.pop(id(tensor))[2]())
        return self._known[id(tensor)][1] if id(tensor) in self._known else blank(tensor.shape)

    def touch(self, tensors: Sequence[Tensor]) -> None:
        """An operator has read these tensors."""
        self.touched.update(map(id, tensors))
        known = (self._names, self._known, self._waiting)
        self.strays |= {id(t): t for t in tensors if t.requires_grad and not any(id(t) in seen for seen in known)}

    def same(self, a: Dim, b: Dim, why: str) -> Dim:
        """Two dimensions are one; ``why`` is the reason where that freezes them.  Size 1 broadcasts and says nothing."""
        if len(a) != len(b) or (len(a) == 1 and not (a.labelled and b.labelled)):
            return a if len(a) > len(b) or a.labelled else b
        if a.labelled or b.labelled:
            self.atoms.equate(a.labels, b.labels, why)
        return a if a.labelled else b

    def freeze(self, dims: Iterable[Dim], why: str) -> None:
        """These dimensions may never be cut."""
        for dim in dims:
            if dim.labelled:
                self.atoms.freeze(dim.labels, why)

    def role(self, dim: Dim, role: str) -> None:
        """Say what a dimension of a weight does; what makes channels outranks what reads them, and that what carries them."""
        ranks = ("kernel", "along", "in", "out")
        if dim.origin is not None and dim.origin[0] in self._companions and role != "kernel":
            role = "along"
        if dim.origin is not None and ranks.index(role) >= ranks.index(self.roles.get(dim.origin, "kernel")):
            self.roles[dim.origin] = role

    def split(self, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
        """A dimension seen as a box of ``sizes``."""
        return [dim if n == len(dim) else Dim(labels) for n, labels in zip(sizes, self.atoms.factor(dim.labels, sizes), strict=True)]

    def work(self, a: Dims, b: Dims, repeats: int, op: str) -> None:
        """Count ``repeats`` multiply-accumulates for each element of the outer product of the distinct dimensions ``a`` and ``b``.

        Where ``a`` is exactly a weight of the model they are counted on it; otherwise on a product of activations.
        """
        owners = {d.origin[0] if d.origin and d.whole else None for d in a}
        if len(owners) == 1 and (name := owners.pop()) is not None:
            self.positions[name] = self.positions.get(name, 0) + repeats * prod(map(len, b))
            return
        name = f"{op}#{len(self.products) + 1}"
        self.products[name] = (*a, *b)
        self.history.used[-1].add(name)
        self.positions[name] = repeats * prod(len(d) for d in (*a, *b))

    def settle(self) -> None:
        """Once all is known: products keep the dimensions that may be cut, and the others are in their work."""
        for name, dims in self.products.items():
            self.products[name] = tuple(self._distinct(d) for d in dims if self.atoms.live(d.labels))
            self.positions[name] //= prod(map(len, self.products[name]))

    def _distinct(self, dim: Dim) -> Dim:
        """A dimension without its repetitions, such as the examples of a batch that is one with the heads."""
        labels = self.atoms.living(dim.labels)
        rows, counts = np.unique(labels, axis=0, return_counts=True)
        return Dim(rows if (counts == counts[0]).all() else labels)


def lost_rows(atoms: Atoms, labels: Labels, gone: np.ndarray) -> np.ndarray:
    """Which indices carry one of the atoms ``gone``: booleans ``[indices]``."""
    resolved = atoms.resolve(labels)
    return np.asarray(np.isin(resolved, gone).any(axis=1))
