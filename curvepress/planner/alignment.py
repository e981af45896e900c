"""Which widths an ordinary attention block writes as one number, and what widths a plan may have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil, gcd, lcm

from ..structure import Group, Structure

WIDTHS = ("query-key", "value")


@dataclass(frozen=True)
class Shape:
    """Widths that a plan may have.

    Args:
        multiple: widths are rounded up to multiples of this, as far as the group is wide; a mapping gives one by kind of group.
            Heads are counted by the rows they own.
        floor: the least share of a group's channels that stays; at least one does.
        whole: groups that are not cut, by kind or by name; ``*`` in a name stands for anything.
        aligned: the query-key and the value width of an attention block stay equal, as code with one ``head_dim`` wants it.

    Raises:
        ValueError: if a number is out of range, or ``whole`` is a single string.
    """

    multiple: int | Mapping[str, int] = 1
    floor: float = 0.05
    whole: Collection[str] = ()
    aligned: bool = False

    def __post_init__(self) -> None:
        multiples = self.multiple.values() if isinstance(self.multiple, Mapping) else (self.multiple,)
        if any(m < 1 for m in multiples) or not 0 <= self.floor <= 1 or isinstance(self.whole, str):
            raise ValueError(
                f"widths need multiple >= 1, floor in [0, 1] and a list of kinds or names in whole; got {self.multiple}, {self.floor} "
                f"and {self.whole!r}"
            )

    def cuttable(self, structure: Structure) -> tuple[Group, ...]:
        """The free groups that may be cut.

        Raises:
            ValueError: if an entry of ``whole`` is neither a kind nor the name of a group, or nothing is left to be cut.
        """
        found = self.not_whole(structure)
        if self.whole and not found:
            free = ", ".join(sorted({g.kind for g in structure.free}))
            raise ValueError(f"whole: with {', '.join(self.whole)} whole nothing is left to be cut; free are the kinds {free}")
        return found

    def not_whole(self, structure: Structure) -> tuple[Group, ...]:
        """The free groups that may be cut, if any.

        Raises:
            ValueError: if an entry of ``whole`` is neither a kind nor the name of a group.
        """
        for entry in self.whole:
            if not any(_is(g, entry) for g in structure.groups):
                kinds = sorted({g.kind for g in structure.groups})
                raise ValueError(f"whole: {entry!r} is no kind and no name of a group; the kinds are {', '.join(kinds)}")
        return tuple(g for g in structure.free if not any(_is(g, entry) for entry in self.whole))

    def step(self, group: Group) -> int:
        """Widths of this group are multiples of this many channels."""
        multiple = self.multiple.get(group.kind, 1) if isinstance(self.multiple, Mapping) else self.multiple
        return multiple // gcd(multiple, group.members[0].rows.shape[1]) if group.kind == "head" else multiple

    def widths(self, structure: Structure, wanted: Mapping[str, int]) -> dict[str, int]:
        """How many channels stay of each group of which at least ``wanted`` must."""
        groups = {g.name: g for g in self.cuttable(structure)}
        least = {n: max(wanted[n], ceil(self.floor * g.size), 1) for n, g in groups.items()}
        blocks = head_widths(structure) if self.aligned else []
        held = {g.name for b in blocks for g in b}
        result = {n: _rounded(least[n], self.step(g), g.size) for n, g in groups.items() if n not in held}
        for block in blocks:
            if all(g.name in groups for g in block):  # where one of them stays whole all do
                result |= self._block(block, least)
        return result

    def _block(self, block: list[Group], least: Mapping[str, int]) -> dict[str, int]:
        """Equal widths for groups whose channels may own several rows of a head each, as rotated pairs do."""
        width = max(g.size for g in block)
        rows = {g.name: width // g.size for g in block}
        step = lcm(*rows.values(), *(self.step(g) for g in block))
        most = max(least[n] * k for n, k in rows.items())
        return {n: _rounded(most, step, width) // k for n, k in rows.items()}


def _is(group: Group, entry: str) -> bool:
    return entry == group.kind or fnmatchcase(group.name, entry)


def _rounded(least: int, step: int, size: int) -> int:
    return min(ceil(least / step) * step, size)


def head_widths(structure: Structure) -> list[list[Group]]:
    """The groups of query-key and value widths that belong to the same attention blocks, where their widths divide each other."""
    block: dict[int, set[int]] = {}
    widths = [n for n, g in enumerate(structure.groups) if g.kind in WIDTHS and g.size > 1]
    sites = {n: {(m.tensor, m.dim) for m in structure.groups[n].members} for n in widths}
    links = [{(m.tensor, m.dim) for m in g.members} for g in structure.groups if g.kind == "head"]
    for n in widths:
        block[n] = {n}
    for link in [*links, *sites.values()]:
        joined = set().union(*(block[n] for n in widths if sites[n] & link))
        block.update(dict.fromkeys(joined, joined))
    found = [[structure.groups[n] for n in sorted(b)] for b in {id(b): b for b in block.values()}.values()]
    return [b for b in found if len(b) > 1 and all(max(g.size for g in b) % g.size == 0 for g in b)]
