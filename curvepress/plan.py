"""A plan: a structure and what to do to it.  Plain data; JSON in, JSON out; no model needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import implants as implanting
from .bitplan import BitPlan, bits_from_dict, bits_to_dict, check_bits
from .implants import Implant
from .structure import Group, Member, Site, Structure, TensorSpec, assemble, structure_from_dict, structure_to_dict

VERSION = 3
READABLE = (2, VERSION)
"""Version 2 had no implants."""


@dataclass(frozen=True)
class Plan:
    """A structure, the channels that stay, by group, the residual branches that are left out, implants, by the weight they replace,
    and the bits of tensors.

    ``Plan(structure)`` changes nothing.  Channels, of pointwise implants too, are numbered as in the structure; a rank is what is left
    after pruning.

    Raises:
        ValueError: if a group is unknown or frozen, its channels are repeated, out of range or none, a branch is unknown, or an implant
            does not fit its weight or goes with a branch: an incoherent plan cannot be written down.
    """

    structure: Structure
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    implants: Mapping[str, Implant] = field(default_factory=dict)
    bits: BitPlan | None = None

    def __post_init__(self) -> None:
        names = {g.name: g for g in self.structure.groups}
        for name, channels in self.keep.items():
            if name not in names:
                raise ValueError(f"keep[{name!r}]: no such group; the groups are {', '.join(names)}")
            _check(names[name], tuple(channels))
        branches = [b.name for b in self.structure.branches]
        if unknown := [name for name in self.skip if name not in branches]:
            raise ValueError(f"skip: no branch {unknown[0]!r}; the branches are {', '.join(branches) or 'none'}")
        if self.bits is not None:
            check_bits(self.bits, {*self.structure.tensors, *(part for n, i in self.implants.items() for part in implanting.parts(n, i))})
        object.__setattr__(self, "keep", {n: tuple(sorted(c)) for n, c in self.keep.items() if len(c) < names[n].size})
        object.__setattr__(self, "skip", tuple(name for name in branches if name in self.skip))
        if lost_with := sorted(set(self.implants) & dropped(self)):
            raise ValueError(f"implants[{lost_with[0]!r}]: this weight goes with a branch that is left out; take one of them back")
        implanting.check(self.structure, self.implants, edits(self) if self.implants else {})

    @property
    def empty(self) -> bool:
        """Whether nothing is changed."""
        return not (self.keep or self.skip or self.implants)


def dropped(plan: Plan) -> set[str]:
    """The tensors and products that go with the branches that are left out."""
    return {name for b in plan.structure.branches if b.name in plan.skip for name in b.tensors}


def _check(group: Group, channels: tuple[int, ...]) -> None:
    if group.frozen and len(channels) < group.size:
        raise ValueError(f"keep[{group.name!r}]: this group cannot be cut: {group.frozen}")
    inside = all(isinstance(c, int) and 0 <= c < group.size for c in channels)
    if not channels or len(set(channels)) < len(channels) or not inside:
        raise ValueError(f"keep[{group.name!r}] must be distinct channels in [0, {group.size}), at least one; got {list(channels)}")


def kept(plan: Plan, group: Group) -> np.ndarray:
    """The channels of ``group`` that stay, ascending."""
    return np.array(plan.keep.get(group.name, range(group.size)), dtype=np.int64)


def lost(plan: Plan, group: Group) -> np.ndarray:
    """The channels of ``group`` that go, ascending."""
    return np.setdiff1d(np.arange(group.size), kept(plan, group))


def edits(plan: Plan) -> dict[Site, np.ndarray]:
    """For every tensor dimension the plan changes, ``(tensor, dim)``: the indices that stay, ascending."""
    gone: dict[Site, list[np.ndarray]] = {}
    for group in plan.structure.groups:
        if group.name in plan.keep:
            channels = lost(plan, group)
            for m in group.members:
                gone.setdefault((m.tensor, m.dim), []).append(m.rows[channels].ravel())
    lengths = {site: plan.structure.tensors[site[0]].shape[site[1]] for site in gone}
    return {site: np.setdiff1d(np.arange(lengths[site]), np.concatenate(rows)) for site, rows in gone.items()}


def after(plan: Plan) -> Structure:
    """The structure of the model that ``apply`` will return, found without touching a model."""
    if plan.implants:
        return after(implanted(plan))
    old, cut, gone = plan.structure, edits(plan), dropped(plan)
    sites = sorted({(m.tensor, m.dim) for g in old.groups for m in g.members if m.tensor not in gone}, key=_order(old))
    number = {site: n for n, site in enumerate(sites)}
    roles = {(m.tensor, m.dim): m.role for g in old.groups for m in g.members}
    entries: list[np.ndarray] = []
    traits: list[tuple[str, str]] = []
    for group in old.groups:
        units = kept(plan, group)
        first = len(traits)
        traits += [(group.kind, group.frozen)] * len(units)
        for m in (m for m in group.members if m.tensor not in gone):
            entries.append(_entries(first, number[m.tensor, m.dim], _renumbered(m.rows[units], cut.get((m.tensor, m.dim)))))
    groups = assemble(np.concatenate(entries), sites, [roles[s] for s in sites], dict(enumerate(traits))) if entries else ()
    branches = tuple(b for b in old.branches if not gone.issuperset(b.tensors))
    return Structure(tensors_after(plan), groups, old.inputs, branches)


def tensors_after(plan: Plan) -> dict[str, TensorSpec]:
    """The tensors of the model that ``apply`` will return."""
    if plan.implants:
        return tensors_after(implanted(plan))
    cut, gone = edits(plan), dropped(plan)
    return {
        n: replace(t, shape=tuple(len(cut.get((n, d), range(k))) for d, k in enumerate(t.shape)))
        for n, t in plan.structure.tensors.items()
        if n not in gone
    }


def implanted(plan: Plan) -> Plan:
    """What is left to do once the plan's implants are in the model: the same channels go, under the names of the new structure."""
    old, new = plan.structure, implanting.implanted(plan.structure, plan.implants)
    keep: dict[str, list[int]] = {}
    where = {unit: (g.name, c) for g in new.groups for c, unit in enumerate(_units(g.members, g.size))} if plan.keep else {}
    moved = implanting.moves(old, plan.implants)
    for group in (g for g in old.groups if g.name in plan.keep):
        placed = [p for m in group.members for p in implanting.replaced(old, plan.implants, m, moved)]
        units: list[set[tuple[str, int, int]]] = [set() for _ in range(group.size)]
        for member, owners in placed:
            for unit, row in zip(owners.tolist(), member.rows[:, 0].tolist(), strict=True):
                units[unit].add((member.tensor, member.dim, row))
        for channel in kept(plan, group).tolist():
            name, number = where[frozenset(units[channel])]
            keep.setdefault(name, []).append(number)
    skip = tuple(b.name for b, was in zip(new.branches, old.branches, strict=True) if was.name in plan.skip)
    return Plan(new, {name: tuple(channels) for name, channels in keep.items()}, skip)


def origins(plan: Plan) -> dict[Site, tuple[str, np.ndarray]]:
    """Where the indices of the result come from, ``(tensor, dim)``: the original's tensor, and the index that each had there.

    Dimensions that stay as they were are not in it, and neither are the inner channels of implants, which come from nowhere.
    """
    cut, moved = edits(plan), implanting.moves(plan.structure, plan.implants)
    sites = {s for s in (*cut, *moved, *((name, 0) for name in plan.implants)) if s[0] not in dropped(plan)}
    old = {s: moved.get(s, np.arange(plan.structure.tensors[s[0]].shape[s[1]])) for s in sites}
    stays = {s: np.isin(rows, cut.get(s, rows)) for s, rows in old.items()}
    found = {s: (s[0], rows[stays[s]]) for s, rows in old.items() if s[0] not in plan.implants}
    for name, implant in ((n, i) for n, i in plan.implants.items() if (n, 0) in old):
        first, second = implanting.names(name, implant)
        rows, stay = old[name, 0], stays[name, 0]
        border = len(rows) - len(implant.channels) if implant.kind == "pointwise" else 0
        found[second, 0] = name, rows[border:][stay[border:]]
        if border:
            found[first, 0] = name, rows[:border][stay[:border]]
    return found


def _units(members: tuple[Member, ...], size: int) -> list[frozenset[tuple[str, int, int]]]:
    """Where each channel lives: tensor, dimension, row."""
    return [frozenset((m.tensor, m.dim, row) for m in members for row in m.rows[c].tolist()) for c in range(size)]


def _order(structure: Structure) -> Any:
    position = {name: n for n, name in enumerate(structure.tensors)}
    return lambda site: (position[site[0]], site[1])


def _renumbered(rows: np.ndarray, stay: np.ndarray | None) -> np.ndarray:
    """New numbers of ``rows`` once only ``stay`` are left; -1 for those that another group took away."""
    if stay is None:
        return rows
    place = np.searchsorted(stay, rows).clip(max=len(stay) - 1)
    return np.where(stay[place] == rows, place, -1)


def _entries(first: int, site: int, rows: np.ndarray) -> np.ndarray:
    units = np.repeat(np.arange(first, first + len(rows)), rows.shape[1])
    table = np.stack([units, np.full_like(units, site), rows.ravel()], axis=1)
    return table[table[:, 2] >= 0]


def to_json(plan: Plan) -> str:
    """The plan as JSON text that :func:`from_json` reads back to an equal plan."""
    keep = {name: [int(c) for c in channels] for name, channels in plan.keep.items()}
    data = {
        "format": "curvepress plan",
        "version": VERSION,
        "keep": keep,
        "skip": list(plan.skip),
        "implants": implanting.to_dict(plan.implants),
        **({} if plan.bits is None else {"bits": bits_to_dict(plan.bits)}),
        "structure": structure_to_dict(plan.structure),
    }
    return dumps(data)


def from_json(text: str) -> Plan:
    """The plan written by :func:`to_json`.

    Raises:
        ValueError: if the text is not a plan of this version, or the plan is incoherent.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not a plan: the JSON is damaged ({error})") from None
    if not isinstance(data, dict) or data.get("format") != "curvepress plan" or data.get("version") not in READABLE:
        seen = {k: data.get(k) for k in ("format", "version")} if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"this is not a curvepress plan of version {' or '.join(map(str, READABLE))}; got {seen}")
    keep = data.get("keep")
    if not isinstance(keep, dict) or not all(isinstance(c, list) for c in keep.values()):
        raise ValueError("this is not a plan: `keep` must map groups to lists of channels")
    skip = data.get("skip")
    if not isinstance(skip, list) or not all(isinstance(b, str) for b in skip):
        raise ValueError("this is not a plan: `skip` must be a list of branches")
    implants = implanting.from_dict(data.get("implants", {}))
    bits = bits_from_dict(data["bits"]) if "bits" in data else None
    return Plan(structure_from_dict(data.get("structure", {})), {n: tuple(c) for n, c in keep.items()}, tuple(skip), implants, bits)


def dumps(data: Any) -> str:
    """JSON a person can read: innermost lists and objects of numbers stay on one line."""
    text = json.dumps(data, indent=1)
    return _joined(text) + "\n"


def _joined(text: str) -> str:
    inner = re.compile(r"[\[{]\n\s*([^\[\]{}]*?)\n\s*[\]}]")
    return inner.sub(lambda m: m[0][0] + re.sub(r"\n\s*", " ", m[1]) + m[0][-1], text)
