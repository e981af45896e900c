"""A plan: a structure and what to do to it.  Plain data; JSON in, JSON out; no model needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .bitplan import BitPlan, bits_from_dict, bits_to_dict, check_bits
from .structure import Group, Site, Structure, TensorSpec, assemble, structure_from_dict, structure_to_dict

VERSION = 2


@dataclass(frozen=True)
class Plan:
    """A structure, the channels that stay, by group, the residual branches that are left out, and the bits of tensors.

    ``Plan(structure)`` changes nothing.

    Raises:
        ValueError: if a group is unknown or frozen, its channels are repeated, out of range or none, or a branch is unknown:
            an incoherent plan cannot be written down.
    """

    structure: Structure
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
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
            check_bits(self.bits, self.structure.tensors)
        object.__setattr__(self, "keep", {n: tuple(sorted(c)) for n, c in self.keep.items() if len(c) < names[n].size})
        object.__setattr__(self, "skip", tuple(name for name in branches if name in self.skip))

    @property
    def empty(self) -> bool:
        """Whether nothing is changed."""
        return not (self.keep or self.skip)


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
            for m in group.members:
                gone.setdefault((m.tensor, m.dim), []).append(m.rows[lost(plan, group)].ravel())
    lengths = {site: plan.structure.tensors[site[0]].shape[site[1]] for site in gone}
    return {site: np.setdiff1d(np.arange(lengths[site]), np.concatenate(rows)) for site, rows in gone.items()}


def after(plan: Plan) -> Structure:
    """The structure of the model that ``apply`` will return, found without touching a model."""
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
    cut, gone = edits(plan), dropped(plan)
    return {
        n: replace(t, shape=tuple(len(cut.get((n, d), range(k))) for d, k in enumerate(t.shape)))
        for n, t in plan.structure.tensors.items()
        if n not in gone
    }


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
    data = {"format": "curvepress plan", "version": VERSION, "keep": keep, "skip": list(plan.skip)}
    bits = {} if plan.bits is None else {"bits": bits_to_dict(plan.bits)}
    return dumps({**data, **bits, "structure": structure_to_dict(plan.structure)})


def from_json(text: str) -> Plan:
    """The plan written by :func:`to_json`.

    Raises:
        ValueError: if the text is not a plan of this version, or the plan is incoherent.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not a plan: the JSON is damaged ({error})") from None
    if not isinstance(data, dict) or data.get("format") != "curvepress plan" or data.get("version") != VERSION:
        seen = {k: data.get(k) for k in ("format", "version")} if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"this is not a curvepress plan of version {VERSION}; got {seen}")
    keep = data.get("keep")
    if not isinstance(keep, dict) or not all(isinstance(c, list) for c in keep.values()):
        raise ValueError("this is not a plan: `keep` must map groups to lists of channels")
    skip = data.get("skip")
    if not isinstance(skip, list) or not all(isinstance(b, str) for b in skip):
        raise ValueError("this is not a plan: `skip` must be a list of branches")
    bits = bits_from_dict(data["bits"]) if "bits" in data else None
    return Plan(structure_from_dict(data.get("structure", {})), {n: tuple(c) for n, c in keep.items()}, tuple(skip), bits)


def dumps(data: Any) -> str:
    """JSON a person can read: innermost lists and objects of numbers stay on one line."""
    text = json.dumps(data, indent=1)
    return _joined(text) + "\n"


def _joined(text: str) -> str:
    inner = re.compile(r"[\[{]\n\s*([^\[\]{}]*?)\n\s*[\]}]")
    return inner.sub(lambda m: m[0][0] + re.sub(r"\n\s*", " ", m[1]) + m[0][-1], text)
