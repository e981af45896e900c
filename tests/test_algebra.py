"""The label algebra against a plain one of Python sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curvepress.tracing.algebra import Atoms, empty, joined, merged


def labels(atoms: Atoms, array: np.ndarray) -> list[set[int]]:
    return [{int(a) for a in row if a >= 0} for row in atoms.resolve(array)]


def test_single_atoms_merge_in_bulk() -> None:
    atoms = Atoms()
    a, b, c = atoms.new(5), atoms.new(5), atoms.new(5)
    atoms.equate(a, b, "")
    atoms.equate(b[::-1], c, "")
    assert labels(atoms, a) == labels(atoms, b)
    assert labels(atoms, c) == labels(atoms, a)[::-1]


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_any_equations_between_single_atoms_give_the_classes_of_a_union_find(pairs: list[tuple[int, int]]) -> None:
    atoms, classes = Atoms(), {n: {n} for n in range(12)}
    all_atoms = atoms.new(12)
    left, right = ([p[k] for p in pairs] for k in (0, 1))
    atoms.equate(all_atoms[left], all_atoms[right], "")
    for x, y in pairs:
        union = classes[x] | classes[y]
        classes.update(dict.fromkeys(union, union))
    roots = atoms.resolve(all_atoms)[:, 0]
    assert all((roots[x] == roots[y]) == (y in classes[x]) for x in range(12) for y in range(12))


def test_a_split_finds_heads_and_widths() -> None:
    atoms = Atoms()
    rows = atoms.new(12)
    heads, widths = atoms.factor(rows, (3, 4))
    assert len(heads) == 3 and len(widths) == 4
    assert labels(atoms, rows) == [labels(atoms, heads)[i] | labels(atoms, widths)[j] for i in range(3) for j in range(4)]


def test_a_split_of_a_merge_is_what_was_merged() -> None:
    atoms = Atoms()
    heads, widths = atoms.new(3), atoms.new(4)
    found = atoms.factor(merged([heads, empty(2), widths]), (3, 2, 4))
    assert labels(atoms, found[0]) == labels(atoms, heads)
    assert labels(atoms, found[1]) == [set(), set()]
    assert labels(atoms, found[2]) == labels(atoms, widths)


def test_a_split_imposes_only_what_is_not_known_yet() -> None:
    atoms = Atoms()
    examples, rows = atoms.new(2), atoms.new(12)
    atoms.freeze(examples, "batch")
    lines, widths = atoms.factor(merged([examples, rows]), (6, 4))  # examples times heads, widths
    heads = [labels(atoms, lines)[n] - labels(atoms, examples)[0] for n in range(3)]
    assert labels(atoms, lines) == [labels(atoms, examples)[b] | heads[h] for b in range(2) for h in range(3)]
    assert labels(atoms, rows) == [heads[i] | labels(atoms, widths)[j] for i in range(3) for j in range(4)]
    assert labels(atoms, atoms.living(lines)) == heads * 2
    assert not any(atoms.reasons(atoms.resolve(rows).ravel()))


def test_products_that_meet_unite_factor_by_factor() -> None:
    atoms = Atoms()
    q, k = atoms.new(12), atoms.new(12)
    (q_heads, q_widths), (k_heads, k_widths) = atoms.factor(q, (3, 4)), atoms.factor(k, (3, 4))
    atoms.equate(q, k, "")
    assert labels(atoms, q_heads) == labels(atoms, k_heads)
    assert labels(atoms, q_widths) == labels(atoms, k_widths)
    assert len({frozenset(x) for x in labels(atoms, q)}) == 12


def test_meeting_something_fixed_freezes_with_the_first_reason() -> None:
    atoms = Atoms()
    a = atoms.new(3)
    atoms.equate(a, empty(3), "first")
    atoms.freeze(a, "second")
    assert atoms.reasons(atoms.resolve(a)[:, 0]) == ["first"] * 3


def test_a_frozen_atom_freezes_what_it_merges_with_and_what_defines_it() -> None:
    atoms = Atoms()
    a, b = atoms.new(4), atoms.new(4)
    atoms.freeze(a[:1], "output")
    atoms.freeze(b[3:], "positions")
    atoms.equate(a, b, "")
    assert atoms.reasons(atoms.resolve(b)[:, 0]) == ["output", "", "", "positions"]
    heads, widths = atoms.factor(b, (2, 2))
    assert atoms.reasons(atoms.resolve(heads)[:, 0]) == ["output", "positions"]
    assert atoms.reasons(atoms.resolve(widths)[:, 0]) == ["output", "positions"]


def test_unequal_products_couple_more_and_never_less() -> None:
    atoms = Atoms()
    a = atoms.new(12)
    atoms.factor(a, (3, 4))
    atoms.factor(a, (4, 3))
    assert len({frozenset(x) for x in labels(atoms, a)}) == 1


def test_an_atom_equated_with_a_set_that_holds_it_merges_with_the_rest() -> None:
    atoms = Atoms()
    a, b = atoms.new(1), atoms.new(1)
    atoms.equate(a, np.concatenate([a, b], axis=1), "")
    assert labels(atoms, a) == labels(atoms, b)


def test_joined_pads_to_the_widest() -> None:
    atoms = Atoms()
    a, b = atoms.new(2), merged([atoms.new(1), atoms.new(2)])
    assert labels(atoms, joined([a, empty(1), b])) == [{0}, {1}, set(), {2, 3}, {2, 4}]
