"""Residual branches: what is added to a stream and can be left out whole.

In ``x + f(x)`` the branch ``f`` is all that only the sum reads, and leaving it out leaves ``x``.  Blocks of residual networks, and the
attention and the hidden layers of transformers, are branches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import takewhile

from ..structure import Branch


@dataclass(frozen=True)
class Step:
    """One operator of a forward pass, by numbers of values: what it reads and what it makes.

    ``addends`` are the two values of a plain sum of equal shapes, otherwise empty.
    """

    reads: tuple[int, ...]
    makes: tuple[int, ...]
    addends: tuple[int, ...] = ()


@dataclass
class History:
    """The steps of a forward pass so far, and the names of the tensors and products that each of them used."""

    steps: list[Step] = field(default_factory=list)
    used: list[set[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """A branch, the step that adds it, and which of the two addends it is."""

    branch: Branch
    step: int
    addend: int


def find(history: History, names: Sequence[str], weights: Set[str], outputs: Collection[int]) -> list[Found]:
    """Every residual branch that has weights of its own, in the order of the sums, called by the first of them.

    Where both addends could go, as beside a shortcut with a projection, it is the longer one.

    Args:
        names: of the model's tensors, in its order; ``weights`` are those among them that count as a branch's own.
        outputs: the values that the forward pass returns.
    """
    steps, readers = history.steps, _readers(history.steps, outputs)
    makers = {value: n for n, step in enumerate(steps) for value in step.makes}
    found: list[Found] = []
    for n in (n for n, step in enumerate(steps) if len(set(step.addends)) == 2):
        addends = steps[n].addends
        private = [_private(steps, n, value, readers, outputs) for value in addends]
        owned = {k: _owned(history, private[k], names) for k in (0, 1) if _residual(steps, private[k], addends[1 - k], makers)}
        best = max((k for k in owned if not weights.isdisjoint(owned[k])), key=lambda k: len(private[k]), default=None)
        if best is not None:
            found.append(Found(Branch(_name(owned[best], weights, found), owned[best]), n, best))
    return found


def _readers(steps: Sequence[Step], outputs: Collection[int]) -> dict[int, set[int]]:
    """The steps that read a value, without those that nothing comes of, such as checks."""
    readers: dict[int, set[int]] = {}
    for n in range(len(steps) - 1, -1, -1):
        if any(v in outputs or v in readers for v in steps[n].makes):
            for value in steps[n].reads:
                readers.setdefault(value, set()).add(n)
    return readers


def _name(owned: Sequence[str], weights: Collection[str], taken: Sequence[Found]) -> str:
    """Of the module that holds all of the branch, or of its first weight where another branch has that name or nothing holds it."""
    own = [name for name in owned if name in weights]
    parts = [name.split(".")[:-1] for name in own]
    common = ".".join(first for first, *rest in takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    return common if common and common not in {f.branch.name for f in taken} else own[0].removesuffix(".weight")


def _private(steps: Sequence[Step], last: int, value: int, readers: Mapping[int, set[int]], outputs: Collection[int]) -> set[int]:
    """The steps whose results are read, in the end, as this addend of the last step and nowhere else."""
    found: set[int] = set()
    allowed = {last}

    def only_here(v: int) -> bool:
        return v not in outputs and readers.get(v, set()) <= found | (allowed if v == value else set())

    for n in range(last - 1, -1, -1):
        made = steps[n].makes
        if all(map(only_here, made)) and _leads(steps, n, value, found, readers):
            found.add(n)
    return found


def _leads(steps: Sequence[Step], n: int, value: int, found: set[int], readers: Mapping[int, set[int]]) -> bool:
    return any(v == value or readers.get(v, set()) & found for v in steps[n].makes)


def _residual(steps: Sequence[Step], private: set[int], other: int, makers: Mapping[int, int]) -> bool:
    """Whether the branch reads the stream that it is added to: something that the other addend comes from too, or is."""
    inside = {v for n in private for v in steps[n].makes}
    outside = {v for n in private for v in steps[n].reads} - inside
    return bool(outside & _ancestors(steps, other, makers))


def _ancestors(steps: Sequence[Step], value: int, makers: Mapping[int, int]) -> set[int]:
    seen, left = {value}, [value]
    while left:
        n = makers.get(left.pop())
        for v in steps[n].reads if n is not None else ():
            if v not in seen:
                seen.add(v)
                left.append(v)
    return seen


def _owned(history: History, private: set[int], names: Sequence[str]) -> tuple[str, ...]:
    """The tensors and products that nothing but the branch uses, and what no step uses of the modules they are in."""
    within, elsewhere = _used(history, private), _used(history, set(range(len(history.used))) - private)
    inner, outer = ({name.rpartition(".")[0] for name in part} for part in (within - elsewhere, elsewhere))
    idle = {name for name in names if name not in within | elsewhere and name.rpartition(".")[0] in inner - outer}
    products = sorted((within - elsewhere) - set(names))
    return (*(name for name in names if name in (within - elsewhere) | idle), *products)


def _used(history: History, steps: Collection[int]) -> set[str]:
    return set[str]().union(*(history.used[n] for n in steps))
