"""What must change together: the coupled dimensions of a model, as plain data.

A *group* is a set of channels that can each be removed alone.  A *member* is one dimension of one
tensor that carries them: ``rows[c]`` are the indices of that dimension which belong to channel ``c``.

    conv -> norm -> conv       rows [[0], [1], ...] in every member
    conv -> flatten -> linear  the linear layer's rows are blocks of H*W
    cat([a, b]) -> conv        the convolution is a member of two groups, at different rows
    attention                  a head owns a block of rows, a head dimension one row of every block
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Site = tuple[str, int]
"""One dimension of one tensor: ``(tensor, dim)``."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and place of a tensor.

    ``kind`` is ``parameter``, ``buffer`` (stored with the model), ``constant`` (a buffer that is not
    stored) or ``activation`` (a product of two activations, present for its multiply-accumulates only).
    ``positions`` is the number of multiply-accumulates each element takes part in, per example.
    """

    shape: tuple[int, ...]
    dtype: str
    kind: str
    positions: int = 0


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one input of the traced example; ``high`` bounds its integers, ``name`` is that of a keyword input."""

    shape: tuple[int, ...]
    dtype: str
    high: int = 0
    name: str = ""


@dataclass(frozen=True, eq=False)
class Member:
    """A dimension that carries a group's channels.

    ``rows`` is an integer array ``[channels, rows per channel]``.  ``role`` is ``out`` (a weight that makes
    the channels), ``in`` (a weight that reads them) or ``along`` (biases, norms and other companions).
    """

    tensor: str
    dim: int
    rows: np.ndarray
    role: str

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Member)
            and (self.tensor, self.dim, self.role) == (other.tensor, other.dim, other.role)
            and np.array_equal(self.rows, other.rows)
        )


@dataclass(frozen=True)
class Group:
    """Channels that exist in all ``members`` at once; ``frozen`` is the reason they may not be cut, or ``""``."""

    name: str
    size: int
    kind: str
    members: tuple[Member, ...]
    frozen: str = ""

    def producers(self) -> tuple[Member, ...]:
        """The weights that make the channels, or, where nothing makes them, all members."""
        return tuple(m for m in self.members if m.role == "out") or self.members


@dataclass(frozen=True)
class Branch:
    """A residual branch that can be left out whole, and the tensors and products that go with it."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """Tensors of a model, the groups that couple their dimensions, and its residual branches, in the model's own order."""

    tensors: Mapping[str, TensorSpec]
    groups: tuple[Group, ...]
    inputs: tuple[InputSpec, ...] = ()
    branches: tuple[Branch, ...] = ()

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; the groups are {', '.join(g.name for g in self.groups)}")

    @property
    def free(self) -> tuple[Group, ...]:
        """The groups that may be cut."""
        return tuple(g for g in self.groups if not g.frozen and g.size > 1)


def assemble(entries: np.ndarray, sites: Sequence[Site], roles: Sequence[str], traits: Mapping[int, tuple[str, str]]) -> tuple[Group, ...]:
    """Sort removable units into groups: units that live at the same sites, with as many rows at each, belong together.

    Args:
        entries: integers ``[n, 3]``: a unit, the site it lives at (position in ``sites``), a row it owns there.
        roles: the role of every site.
        traits: ``(kind, frozen)`` of every unit.
    """
    entries = entries[np.lexsort((entries[:, 2], entries[:, 1], entries[:, 0]))]
    units, starts = np.unique(entries[:, 0], return_index=True)
    alike: dict[tuple[bytes, tuple[str, str]], list[np.ndarray]] = {}
    for unit, part in zip(units.tolist(), np.split(entries[:, 1:], starts[1:]), strict=True):
        alike.setdefault((part[:, 0].tobytes(), traits[unit]), []).append(part)
    found = [(np.stack(parts), *trait) for (_, trait), parts in alike.items() if parts[0].size]
    found.sort(key=lambda f: (_first_site(f[0], roles), f[0][:, 0, 1].min()))
    members = [_members(parts[np.argsort(parts[:, 0, 1])], sites, roles) for parts, _, _ in found]
    names: dict[int, str] = {}
    for n in sorted(range(len(found)), key=lambda n: len(found[n][0]) == 1):  # one that cannot be cut takes no name from another
        names[n] = _name(members[n], names.values())
    return tuple(Group(names[n], len(parts), kind, members[n], frozen) for n, (parts, kind, frozen) in enumerate(found))


def _first_site(parts: np.ndarray, roles: Sequence[str]) -> int:
    sites: list[int] = parts[0, :, 0].tolist()
    return min((s for s in sites if roles[s] == "out"), default=sites[0])


def _members(parts: np.ndarray, sites: Sequence[Site], roles: Sequence[str]) -> tuple[Member, ...]:
    where = parts[0, :, 0]
    columns = {s: np.ascontiguousarray(parts[:, where == s, 1]) for s in np.unique(where).tolist()}
    return tuple(Member(sites[s][0], sites[s][1], rows, roles[s]) for s, rows in columns.items())


def _name(members: tuple[Member, ...], taken: Collection[str]) -> str:
    """Of the first weight that makes the channels, or else of the first that reads or carries them."""
    made = [m.tensor.removesuffix(".weight") for m in members if m.role == "out"]
    first = made[0] if made else f"{members[0].tensor.removesuffix('.weight')} ({members[0].role})"
    names = (first if n == 1 else f"{first}#{n}" for n in range(1, len(taken) + 2))
    return next(n for n in names if n not in taken)


def structure_to_dict(structure: Structure) -> dict[str, Any]:
    """The structure as JSON-ready data; regular rows are written as start, step, count and jump."""
    return {
        "inputs": [vars(i) for i in structure.inputs],
        "groups": [
            {"name": g.name, "size": g.size, "kind": g.kind, "frozen": g.frozen, "members": [_member_to_dict(m) for m in g.members]}
            for g in structure.groups
        ],
        "branches": [vars(b) for b in structure.branches],
        "tensors": {name: vars(spec) for name, spec in structure.tensors.items()},
    }


def structure_from_dict(data: Mapping[str, Any]) -> Structure:
    """The inverse of :func:`structure_to_dict`.

    Raises:
        ValueError: if the data does not describe a structure.
    """
    try:
        tensors = {n: TensorSpec(**{**t, "shape": tuple(t["shape"])}) for n, t in data["tensors"].items()}
        inputs = tuple(InputSpec(**{**i, "shape": tuple(i["shape"])}) for i in data["inputs"])
        groups = tuple(
            Group(g["name"], g["size"], g["kind"], tuple(_member_from_dict(m, g["size"]) for m in g["members"]), g["frozen"])
            for g in data["groups"]
        )
        branches = tuple(Branch(b["name"], tuple(b["tensors"])) for b in data["branches"])
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"this is not the JSON of a structure ({reason}); write it again with `curvepress trace`") from None
    structure = Structure(tensors, groups, inputs, branches)
    _check(structure)
    return structure


def _check(structure: Structure) -> None:
    for group in structure.groups:
        for m in group.members:
            shape = structure.tensors[m.tensor].shape if m.tensor in structure.tensors else ()
            if not (0 <= m.dim < len(shape) and len(m.rows) == group.size and ((m.rows >= 0) & (m.rows < shape[m.dim])).all()):
                raise ValueError(f"group {group.name!r}: its rows of {m.tensor!r}, dimension {m.dim}, do not fit shape {shape}")

    for branch in structure.branches:
        if unknown := [name for name in branch.tensors if name not in structure.tensors]:
            raise ValueError(f"branch {branch.name!r}: {unknown[0]!r} is no tensor of this structure")


def _member_to_dict(member: Member) -> dict[str, Any]:
    rows = member.rows
    start, step, jump = int(rows[0, 0]), _stride(rows[:, 0]), _stride(rows[0])
    regular = {"start": start, "step": step, "count": rows.shape[1], "jump": jump}
    spelled = regular if np.array_equal(rows, _grid(len(rows), **regular)) else {"rows": rows.tolist()}
    return {"tensor": member.tensor, "dim": member.dim, "role": member.role, **spelled}


def _member_from_dict(data: Mapping[str, Any], size: int) -> Member:
    keys = ("start", "step", "count", "jump")
    rows = np.array(data["rows"], dtype=np.int64) if "rows" in data else _grid(size, **{k: data[k] for k in keys})
    return Member(data["tensor"], data["dim"], rows, data["role"])


def _stride(line: np.ndarray) -> int:
    return int(line[1] - line[0]) if len(line) > 1 else 1


def _grid(size: int, start: int, step: int, count: int, jump: int) -> np.ndarray:
    return start + step * np.arange(size)[:, None] + jump * np.arange(count)[None, :]
