"""The label algebra: which indices of which dimensions live and die together.

Every index of a tensor dimension carries a *label*, a set of atoms; it is removed when any of its atoms is.
The empty label is never removed.  Operators only move labels or equate them.  An equation between

* two single atoms merges them;
* an atom and a larger set defines the atom as that set (a row of a projection = its head and its head dimension);
* a label and the empty one freezes the label, with a reason;
* anything else merges every atom involved: more coupling than needed, never less.

Labels of a whole dimension are one integer array ``[indices, atoms]`` padded with -1, so that all work is vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

Labels = np.ndarray
"""Integers ``[n, k]``: for each of ``n`` indices up to ``k`` atoms, padded with -1."""

OUTER, INNER, QUERY_KEY, VALUE, TABLE, CONVOLVED = 1, 2, 4, 8, 16, 32
"""Marks of atoms: of an outer factor of a split, of its innermost one, of what queries and keys are compared by, of what attention
carries, of what a table of embeddings holds, of what a convolution makes."""


def empty(size: int) -> Labels:
    """Labels of ``size`` indices that are never removed."""
    return np.full((size, 0), -1, dtype=np.int64)


def joined(parts: Sequence[Labels]) -> Labels:
    """Labels of dimensions laid end to end."""
    width = max((p.shape[1] for p in parts), default=0)
    return np.concatenate([_widened(p, width) for p in parts])


def merged(parts: Sequence[Labels]) -> Labels:
    """Labels of a box flattened to one dimension: each index unites the labels of its coordinates."""
    size = prod(len(p) for p in parts)
    grid = np.indices([len(p) for p in parts]).reshape(len(parts), size)
    return np.concatenate([empty(size), *(p[at] for p, at in zip(parts, grid, strict=True))], axis=1)


class Atoms:
    """All atoms of one trace, and what is known about them."""

    def __init__(self) -> None:
        self._count = 0
        self._root = np.zeros(0, dtype=np.int64)  # what an atom was merged into; itself for a root
        self._parts = np.zeros((0, 0), dtype=np.int64)  # the set that defines an atom; all -1 for an undefined one
        self._why = np.zeros(0, dtype=np.int64)  # the reason an atom is frozen, a place in _reasons; 0 for a free one
        self._reasons = [""]
        self._marks = np.zeros(0, dtype=np.int8)

    def new(self, size: int, marks: int = 0) -> Labels:
        """Labels of ``size`` fresh atoms with these marks."""
        start, self._count = self._count, self._count + size
        if self._count > len(self._root):
            self._grow(2 * self._count)
        self._marks[start : self._count] = marks
        return np.arange(start, self._count, dtype=np.int64)[:, None]

    def marks(self, atoms: np.ndarray) -> np.ndarray:
        """The marks of these root atoms, with those of all atoms merged into them."""
        return np.asarray(self._marks[atoms])

    def mark(self, labels: Labels, marks: int) -> None:
        """Add marks to every atom of ``labels``."""
        atoms = np.unique(self.resolve(labels))
        self._marks[atoms[atoms >= 0]] |= marks

    def resolve(self, labels: Labels) -> Labels:
        """Labels in canonical form: undefined roots only, distinct, descending, without empty columns."""
        labels = self._rooted(labels)
        while (split := self._defined(labels)).any():
            parts = np.where(split[..., None], self._parts[labels], -1)
            labels = np.concatenate([np.where(split, -1, labels), parts.reshape(len(labels), -1)], axis=1)
            labels = _canonical(self._rooted(labels))
        return _canonical(labels)

    def equate(self, a: Labels, b: Labels, why: str) -> None:
        """Make labels ``a`` and ``b`` equal, index by index; ``why`` is the reason where that freezes them."""
        while True:
            a, b = _level(self.resolve(a), self.resolve(b))
            differ = (a != b).any(axis=1)
            one_sided = differ & ((a[:, :1] < 0) | (b[:, :1] < 0)).any(axis=1)
            self.freeze(np.concatenate([a[one_sided], b[one_sided]]), why)
            a, b = a[differ & ~one_sided], b[differ & ~one_sided]
            if not len(a):
                return
            self._step(a, b)

    def freeze(self, labels: Labels, why: str) -> None:
        """Mark every atom of ``labels`` as never to be removed; the first reason given stays."""
        atoms = np.unique(self.resolve(labels))
        atoms = atoms[atoms >= 0]
        fresh = atoms[self._why[atoms] == 0]
        if len(fresh):
            if why not in self._reasons:
                self._reasons.append(why)
            self._why[fresh] = self._reasons.index(why)

    def live(self, labels: Labels) -> bool:
        """Whether any atom of ``labels`` may still go."""
        return bool(self.living(labels).shape[1])

    def living(self, labels: Labels) -> Labels:
        """Labels without frozen atoms: what is removed is the same, however a dimension came to be fixed."""
        atoms = self.resolve(labels)
        return _canonical(np.where((atoms >= 0) & (self._why[atoms] > 0), -1, atoms)) if atoms.size else atoms

    def reasons(self, atoms: np.ndarray) -> list[str]:
        """Why each of these root atoms is frozen, or ``""``."""
        return [self._reasons[w] for w in self._why[atoms]]

    def factor(self, flat: Labels, sizes: Sequence[int]) -> list[Labels]:
        """Labels of a dimension seen as a box of ``sizes``: its product structure as far as there is one, the rest imposed.

        Examples times heads, say, where an example is labelled too: rows know their example, and only the heads are imposed.
        """
        wide = [d for d, n in enumerate(sizes) if n > 1]
        flat = self.resolve(flat)
        if not flat.shape[1]:
            return [empty(n) for n in sizes]
        if len(wide) <= 1:
            return [flat if wide == [d] or (not wide and d == 0) else empty(n) for d, n in enumerate(sizes)]
        found = _each_once([_common(flat.reshape(*sizes, -1), d) for d in range(len(sizes))])
        if np.array_equal(*_level(_canonical(merged(found)), flat)):
            return found
        found = [f if (f >= 0).any(axis=1).all() else empty(len(f)) for f in found]
        fresh = [self.new(n, INNER if d == wide[-1] else OUTER) if d in wide else empty(n) for d, n in enumerate(sizes)]
        self.equate(_without(flat, merged(found)), merged(fresh), "split in a way that its channels do not follow")
        return [np.concatenate(factors, axis=1) for factors in zip(found, fresh, strict=True)]

    def _rooted(self, labels: Labels) -> Labels:
        if not labels.size:
            return labels
        known = labels >= 0
        return np.asarray(np.where(known, self._find(labels), -1))

    def _find(self, atoms: np.ndarray) -> np.ndarray:
        roots = self._root[atoms]
        while not np.array_equal(further := self._root[roots], roots):
            roots = further
        self._root[atoms[atoms >= 0]] = roots[atoms >= 0]
        return np.asarray(roots)

    def _defined(self, labels: Labels) -> np.ndarray:
        if not self._parts.shape[1] or not labels.size:
            return np.zeros(labels.shape, dtype=bool)
        return np.asarray((labels >= 0) & (self._parts[labels, 0] >= 0))

    def _step(self, a: Labels, b: Labels) -> None:
        """Use up at least one equation between resolved, unequal, non-empty labels."""
        singles = [(x >= 0).sum(axis=1) == 1 for x in (a, b)]
        if (both := singles[0] & singles[1]).any():
            return self._union(a[both, 0], b[both, 0])
        shared = (a[:, :, None] == b[:, None, :]) & (a[:, :, None] >= 0)
        if (lone := (singles[0] ^ singles[1]) & ~shared.any(axis=(1, 2))).any():
            swap = singles[1][lone, None]
            return self._define(np.where(swap, b[lone], a[lone])[:, 0], np.where(swap, a[lone], b[lone]))
        rest_a = _canonical(np.where(shared.any(axis=2), -1, a))
        rest_b = _canonical(np.where(shared.any(axis=1), -1, b))
        rest_a, rest_b = _level(rest_a, rest_b)
        if (paired := ((rest_a >= 0) == (rest_b >= 0)).all(axis=1)).any():
            x, y = rest_a[paired].ravel(), rest_b[paired].ravel()
            return self._union(x[x >= 0], y[y >= 0])
        everything = np.concatenate([a, b], axis=1)
        first = np.broadcast_to(everything[:, :1], everything.shape)
        self._union(everything[everything >= 0], first[everything >= 0])

    def _grow(self, size: int) -> None:
        more = size - len(self._root)
        self._root = np.concatenate([self._root, np.arange(len(self._root), size)])
        self._parts = np.pad(self._parts, ((0, more), (0, 0)), constant_values=-1)
        self._why, self._marks = np.pad(self._why, (0, more)), np.pad(self._marks, (0, more))

    def _union(self, x: np.ndarray, y: np.ndarray) -> None:
        while True:
            x, y = self._find(x), self._find(y)
            apart = x != y
            if not apart.any():
                return
            x, y = x[apart], y[apart]
            low, high = np.minimum(x, y), np.maximum(x, y)
            why = np.where(self._why[low] == 0, self._why[high], self._why[low])
            self._root[high] = low  # of several equations about one atom the last one written wins; the loop meets the others
            np.maximum.at(self._why, low, why)
            np.bitwise_or.at(self._marks, low, self._marks[high])

    def _define(self, atoms: np.ndarray, labels: Labels) -> None:
        first = np.unique(atoms, return_index=True)[1]
        atoms, labels = atoms[first], labels[first]
        inside = np.isin(atoms, labels)  # defining two atoms by each other at once would never resolve
        atoms, labels = (atoms[~inside], labels[~inside]) if not inside.all() else (atoms[:1], labels[:1])
        frozen = self._why[atoms] > 0
        for reason in np.unique(self._why[atoms[frozen]]).tolist():
            self.freeze(labels[frozen & (self._why[atoms] == reason)], self._reasons[reason])
        self._inherit(atoms, labels)
        if self._parts.shape[1] < labels.shape[1]:
            self._parts = _widened(self._parts, labels.shape[1])
        self._parts[atoms] = _widened(labels, self._parts.shape[1])

    def _inherit(self, atoms: np.ndarray, labels: Labels) -> None:
        """What an atom is for, so are its parts; a part that is a factor already stays the factor it is."""
        marks = np.broadcast_to(self._marks[atoms, None], labels.shape)
        marks = np.where(self._marks[labels] & (OUTER | INNER), marks & ~(OUTER | INNER), marks)
        np.bitwise_or.at(self._marks, labels[labels >= 0], marks[labels >= 0])


def _widened(labels: Labels, width: int) -> Labels:
    return np.pad(labels, ((0, 0), (0, width - labels.shape[1])), constant_values=-1)


def _level(a: Labels, b: Labels) -> tuple[Labels, Labels]:
    width = max(a.shape[1], b.shape[1])
    return _widened(a, width), _widened(b, width)


def _canonical(labels: Labels) -> Labels:
    labels = -np.sort(-labels, axis=1)
    if labels.shape[1] > 1:
        repeated = labels[:, 1:] == labels[:, :-1]
        labels = labels.copy()
        labels[:, 1:][repeated] = -1
        labels = -np.sort(-labels, axis=1)
    width = int((labels >= 0).sum(axis=1).max(initial=0))
    return labels[:, :width]


def _without(labels: Labels, others: Labels) -> Labels:
    """Labels without those atoms that ``others`` have at the same index."""
    return _canonical(np.where((labels[:, :, None] == others[:, None, :]).any(axis=2), -1, labels))


def _each_once(factors: list[Labels]) -> list[Labels]:
    """Factors of a box without what the one before has along its whole length."""
    result, whole = [], np.zeros(0, dtype=np.int64)
    for labels in factors:
        result.append(_canonical(np.where(np.isin(labels, whole), -1, labels)))
        for atom in np.unique(labels[:1]):
            if (labels == atom).any(axis=1).all():
                whole = np.append(whole, atom)
    return result


def _common(box: np.ndarray, dim: int) -> Labels:
    """For each index of ``dim`` the atoms that every entry of its slice of the box ``[..., atoms]`` carries."""
    slices = np.moveaxis(box, dim, 0).reshape(box.shape[dim], -1, box.shape[-1])
    candidates = slices[:, 0]
    everywhere = np.ones(candidates.shape, dtype=bool)
    for column in range(candidates.shape[1]):
        everywhere[:, column] = (slices == candidates[:, None, column, None]).any(axis=2).all(axis=1)
    return _canonical(np.where(everywhere, candidates, -1))
