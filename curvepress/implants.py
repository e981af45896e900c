"""Implants: weights replaced by cheaper ones inside the same layer.  Plain data, and what it does to a structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from .structure import Branch, Group, Member, Site, Structure, TensorSpec, assemble

KINDS = ("low_rank", "pointwise")


@dataclass(frozen=True)
class Implant:
    """What a layer's weight is replaced by.

    ``low_rank``: the layer reads its inputs into ``rank`` inner channels (``down``: the old kernel, stride and padding) and makes
    its outputs from these (``up``: 1x1, with the bias).  ``pointwise``: the output ``channels`` get 1x1 filters (``point``), the others
    keep theirs (``full``); source: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022.  As the two are
    concatenated, those channels move to the end wherever they live, so that nothing has to be gathered.
    """

    kind: str
    rank: int = 0
    channels: tuple[int, ...] = ()


Implants = Mapping[str, Implant]
"""Implants by the name of the weight they replace."""


def names(weight: str, implant: Implant) -> tuple[str, str]:
    """Names of the two weights that take the place of ``weight``: down and up, or full and point."""
    stem, parts = weight.removesuffix("weight"), ("down", "up") if implant.kind == "low_rank" else ("full", "point")
    return f"{stem}{parts[0]}.weight", f"{stem}{parts[1]}.weight"


def parts(weight: str, implant: Implant) -> tuple[str, ...]:
    """Names of all tensors that may take the place of ``weight`` and its bias."""
    both = names(weight, implant)
    return (*both, *map(bias_of, both))


def bias_of(weight: str) -> str:
    """The name that the bias of the same layer has, if there is one."""
    return weight.removesuffix("weight") + "bias"


def full_rank(shape: Sequence[int]) -> int:
    """The rank from which on a low-rank implant of a weight of this shape can be exact."""
    return min(shape[0], prod(shape[1:]))


@dataclass(frozen=True)
class RankPrice:
    """Predicted rise of the loss, its standard error, and the parameters and multiply-accumulates (per example) that a rank saves."""

    rise: float
    stderr: float
    params: int
    macs: int


def low_rank_sizes(shape: Sequence[int], rank: int) -> int:
    """Parameters of a low-rank implant for a weight of this shape."""
    return rank * (shape[0] + prod(shape[1:]))


def ranks(shape: Sequence[int], most: int = 12) -> tuple[int, ...]:
    """Ranks that save parameters, at most so many: multiples of 8 or a larger step; powers of two where these are too coarse."""
    limit = (prod(shape) - 1) // low_rank_sizes(shape, 1)
    step = 8 * max(1, -(-limit // (8 * most)))
    return tuple(r for r in (1, 2, 4) if limit < 32 and r <= limit) + tuple(range(step, limit + 1, step))


def check(structure: Structure, implants: Implants, stays: Mapping[Site, np.ndarray]) -> None:
    """See that implants fit a structure of which ``stays`` is what pruning leaves of the dimensions that it cuts.

    Raises:
        ValueError: with the weight, what is wrong and what is allowed.
    """
    for name, implant in implants.items():
        spec = structure.tensors.get(name)
        if not isinstance(implant, Implant) or implant.kind not in KINDS:
            raise ValueError(f"implants[{name!r}] must be an Implant of kind {' or '.join(KINDS)}; got {implant}")
        if spec is None or not replaceable(structure, name):
            able = ", ".join(n for n in structure.tensors if replaceable(structure, n))
            raise ValueError(
                f"implants[{name!r}]: this is no weight of a convolution or linear layer; those are {able or 'not in this model'}"
            )
        _check_one(structure, name, implant, {d: stays.get((name, d), np.arange(k)) for d, k in enumerate(spec.shape)})
    orders(structure, implants)


def replaceable(structure: Structure, name: str) -> bool:
    """Whether a tensor looks like the weight of a convolution or linear layer; groups and ties are seen by whoever has the model."""
    spec = structure.tensors[name]
    roles = {m.dim: m.role for g in structure.groups for m in g.members if m.tensor == name}
    named = name.endswith(".weight") and spec.kind == "parameter"
    return named and len(spec.shape) >= 2 and roles.get(0) == "out" and roles.get(1) == "in"


def _check_one(structure: Structure, name: str, implant: Implant, stays: Mapping[int, np.ndarray]) -> None:
    if implant.kind == "low_rank":
        most = full_rank([len(rows) for rows in stays.values()])
        if implant.channels or type(implant.rank) is not int or not 1 <= implant.rank <= most:
            raise ValueError(f"implants[{name!r}]: a low-rank implant has a rank of 1 to {most} here and no channels; got {implant}")
        return
    shape, chosen = structure.tensors[name].shape, set(implant.channels)
    if implant.rank or len(chosen) < len(implant.channels) or not all(type(c) is int and 0 <= c < shape[0] for c in chosen):
        raise ValueError(
            f"implants[{name!r}]: a pointwise implant names distinct output channels in [0, {shape[0]}) and no rank; got {implant}"
        )
    if not all(k % 2 for k in shape[2:]) or prod(shape[2:]) == 1:
        raise ValueError(f"implants[{name!r}]: pointwise implants are for odd kernels above 1, not a weight {shape}; choose low_rank")
    if not 0 < len(chosen & set(stays[0].tolist())) < len(stays[0]):
        raise ValueError(
            f"implants[{name!r}]: of the output channels that stay, some but not all must be pointwise; got {implant.channels}"
        )


def orders(structure: Structure, implants: Implants) -> dict[str, np.ndarray]:
    """The new order of the channels of every group that pointwise implants move, by group.

    Raises:
        ValueError: if no order has every implant's channels at the end.
    """
    wanted: dict[str, list[np.ndarray]] = {}
    for name, implant in implants.items():
        if implant.kind == "pointwise":
            group, rows = _moved_by(structure, name)
            wanted.setdefault(group.name, []).append(np.flatnonzero(np.isin(rows, implant.channels)))
    found = {}
    for group_name, sets in wanted.items():
        times = np.bincount(np.concatenate(sets), minlength=structure[group_name].size)
        found[group_name] = order = np.argsort(times, kind="stable")
        for chosen in sets:
            if set(order[-len(chosen) :].tolist()) != set(chosen.tolist()):
                raise ValueError(
                    f"pointwise implants of layers that make the same group, {group_name!r}, must name the same channels, or some of them"
                )
    return found


def _moved_by(structure: Structure, name: str) -> tuple[Group, np.ndarray]:
    """The group that a weight makes, and which output channel of the weight each of its channels is."""
    made = [(g, m) for g in structure.groups for m in g.members if (m.tensor, m.dim) == (name, 0)]
    group, member = made[0]
    if len(made) > 1 or group.frozen or member.rows.shape != (structure.tensors[name].shape[0], 1):
        why = group.frozen or "they belong to several groups"
        raise ValueError(f"implants[{name!r}]: its output channels cannot be moved to the end: {why}; choose low_rank")
    return group, member.rows[:, 0]


def moves(structure: Structure, implants: Implants) -> dict[Site, np.ndarray]:
    """For every dimension that pointwise implants reorder: the old index at each new place."""
    found: dict[Site, np.ndarray] = {}
    for group_name, order in orders(structure, implants).items():
        for m in structure[group_name].members:
            source = found.setdefault((m.tensor, m.dim), np.arange(structure.tensors[m.tensor].shape[m.dim]))
            source[m.rows.ravel()] = m.rows[order].ravel()
    return found


def implanted(structure: Structure, implants: Implants) -> Structure:
    """The structure of the model with its implants: the inner channels of a low-rank one are a new group of the first weight's name."""
    tensors, moved = _tensors(structure, implants), moves(structure, implants)
    position = {name: n for n, name in enumerate(tensors)}
    placed = [(g, [p for m in g.members for p in replaced(structure, implants, m, moved)]) for g in structure.groups]
    members = [part for g, own in placed for part in _apart(g, own)]
    inner = [_inner(tensors, name, implant) for name, implant in implants.items() if implant.kind == "low_rank"]
    roles = {(m.tensor, m.dim): m.role for own in (*members, *inner) for m, _ in own}
    sites = sorted(roles, key=lambda site: (position[site[0]], site[1]))
    number, first, entries, traits = {site: n for n, site in enumerate(sites)}, 0, [], []
    kinds = [(g.kind, g.frozen, g.size) for g, own in placed for _ in _apart(g, own)] + [
        ("channel" if len(tensors[own[0][0].tensor].shape) > 2 else "hidden", "", len(own[0][1])) for own in inner
    ]
    for own, (kind, frozen, size) in zip((*members, *inner), kinds, strict=True):
        entries += [np.stack([first + units, np.full(len(units), number[m.tensor, m.dim]), m.rows.ravel()], 1) for m, units in own]
        traits += [(kind, frozen)] * size
        first += size
    groups = assemble(np.concatenate(entries), sites, [roles[s] for s in sites], dict(enumerate(traits))) if entries else ()
    return Structure(tensors, groups, structure.inputs, tuple(_branch(structure, implants, b) for b in structure.branches))


def _branch(structure: Structure, implants: Implants, branch: Branch) -> Branch:
    """A branch of which some weights are replaced, called by the first of them as it was."""
    own = {n: t for n, t in structure.tensors.items() if n in branch.tensors}
    found = tuple(_tensors(Structure(own, ()), {n: i for n, i in implants.items() if n in own}))
    return Branch(branch.name.replace(branch.tensors[0].removesuffix(".weight"), found[0].removesuffix(".weight"), 1), found)


Placed = tuple[Member, np.ndarray]
"""A member whose rows ``[n, 1]`` belong to these channels ``[n]``."""


def _apart(group: Group, placed: list[Placed]) -> list[list[Placed]]:
    """Two weights that read the same inputs of fixed size are not coupled by that: the channels of nobody have no name in common."""
    return [[p] for p in placed] if group.frozen and len(group.members) == 1 and group.members[0].dim else [placed]


def replaced(structure: Structure, implants: Implants, member: Member, moved: Mapping[Site, np.ndarray]) -> Iterator[Placed]:
    """Where the rows of a member are in the model with implants."""
    rows = member.rows
    if (source := moved.get((member.tensor, member.dim))) is not None:
        rows = np.argsort(source)[rows]
    units, rows = np.repeat(np.arange(len(rows)), rows.shape[1]), rows.reshape(-1, 1)
    weight = member.tensor if member.tensor in implants else member.tensor.removesuffix("bias") + "weight"
    if weight not in implants or not member.tensor.endswith(("weight", "bias")):
        yield Member(member.tensor, member.dim, rows, member.role), units
        return
    first, second = (n.removesuffix("weight") + member.tensor.rpartition(".")[2] for n in names(weight, implants[weight]))
    if implants[weight].kind == "low_rank":
        yield Member(second if member.dim == 0 else first, member.dim, rows, member.role), units
    elif member.dim:
        yield from ((Member(name, member.dim, rows, member.role), units) for name in (first, second))
    else:
        border = structure.tensors[weight].shape[0] - len(implants[weight].channels)
        early = rows[:, 0] < border
        yield Member(first, 0, rows[early], member.role), units[early]
        yield Member(second, 0, rows[~early] - border, member.role), units[~early]


def _inner(tensors: Mapping[str, TensorSpec], name: str, implant: Implant) -> list[Placed]:
    (down, up), units = names(name, implant), np.arange(implant.rank)
    return [(Member(down, 0, units[:, None], "out"), units), (Member(up, 1, units[:, None], "in"), units)]


def _tensors(structure: Structure, implants: Implants) -> dict[str, TensorSpec]:
    found: dict[str, TensorSpec] = {}
    biases = {bias_of(name) for name in implants}
    for name, spec in structure.tensors.items():
        if name in implants:
            found |= _parts(name, spec, structure.tensors.get(bias_of(name)), implants[name])
        elif name not in biases:
            found[name] = spec
    return found


def _parts(name: str, spec: TensorSpec, bias: TensorSpec | None, implant: Implant) -> dict[str, TensorSpec]:
    (first, second), (out, read, *kernel) = names(name, implant), spec.shape
    ones = [1] * len(kernel)
    if implant.kind == "low_rank":
        shapes = {first: (implant.rank, read, *kernel), second: (out, implant.rank, *ones)}
    else:
        few = len(implant.channels)
        shapes = {first: (out - few, read, *kernel), second: (few, read, *ones)}
    found = {}
    for part, shape in shapes.items():
        found[part] = replace(spec, shape=shape)
        if bias is not None and (part == second or implant.kind == "pointwise"):
            found[bias_of(part)] = replace(bias, shape=shape[:1])
    return found


def to_dict(implants: Implants) -> dict[str, Any]:
    """JSON-ready data."""
    return {
        n: {"kind": i.kind, **({"rank": i.rank} if i.kind == "low_rank" else {"channels": list(i.channels)})} for n, i in implants.items()
    }


def from_dict(data: Any) -> dict[str, Implant]:
    """The implants that :func:`to_dict` wrote.

    Raises:
        ValueError: if the data is something else.
    """
    try:
        return {str(n): Implant(i["kind"], i.get("rank", 0), tuple(i.get("channels", ()))) for n, i in data.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"`implants` must map weights to kinds with a rank or channels ({type(error).__name__}: {error})") from None
