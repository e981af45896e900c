"""Find a model's structure by watching the ATen operators of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ..objective import arguments, call, outputs
from ..plan import Plan, edits, lost
from ..structure import Group, InputSpec, Site, Structure, TensorSpec, assemble
from .algebra import CONVOLVED, INNER, OUTER, QUERY_KEY, TABLE, VALUE
from .branches import Found, find
from .labelling import Dim, Ledger, lost_rows
from .operators import observe

UNUSED = "not used in the traced forward pass"
SILENT = ("kernel", "work")


def trace(model: nn.Module, *example: Any) -> Structure:
    """Which dimensions of the model's tensors must change together, from one forward pass in evaluation mode.

    The model is left as it is.  Operators without a rule freeze what they touch; the reason is in ``Group.frozen``.

    Args:
        example: the inputs of one forward pass, a mapping for keyword inputs; multiply-accumulates are counted per example of
            the first tensor's first dimension.  Model and example may be on the meta device; what values would decide there
            is taken as zero.

    Raises:
        ValueError: if the model cannot be run on the example, gives back no tensor, or reads a parameter that none of its modules holds.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"only a torch.nn.Module can be traced, this is of type {type(model).__name__}; wrap the function in a module")
    return watch(model, lambda: run(model, example), example).structure


def run(model: nn.Module, example: Sequence[Any]) -> Any:
    """The model's output for the example.

    Raises:
        ValueError: if the forward pass fails.
    """
    try:
        return call(model, example)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        positional, named = arguments(example)
        shapes = ", ".join([*map(_seen, positional), *(f"{k}={_seen(x)}" for k, x in named.items())])
        hint = "; a mapping that ends the example is keyword inputs, write (mapping, {}) for one that is an argument" if named else ""
        raise ValueError(f"the model does not run on the example ({shapes}): {type(error).__name__}: {error}{hint}") from error


def _seen(x: Any) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)


@dataclass(frozen=True)
class Trace:
    """A structure, the ledger it was read from, and the steps that add its branches."""

    structure: Structure
    ledger: Ledger
    branches: tuple[Found, ...]


def watch(model: nn.Module, forward: Callable[[], Any], example: Sequence[Any]) -> Trace:
    """Run ``forward``, which must use the tensors of ``model``, and read off the structure."""
    ledger, tensors = Ledger(), model_tensors(model)
    for name, tensor in tensors.items():
        ledger.own(name, tensor)
        if tensor.ndim and tensor.is_floating_point():
            ledger.adopt(name, tensor)
    with quiet_evaluation(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Watch(ledger):  # one kernel for any widths
        out = forward()
    if not outputs(out):
        raise ValueError(f"the model gives back no tensor for the example but an object of type {type(out).__name__}; return its output")
    if strays := {n: t for n, t in ledger.strays.items() if n not in set(map(id, torch.utils._pytree.tree_leaves(example)))}:
        raise ValueError(_homeless(model, next(iter(strays.values()))))
    for tensor in outputs(out):
        ledger.freeze(ledger.of(tensor), "model output")
    return _read(ledger, model, tensors, example, {ledger.number(t) for t in outputs(out)})


def _homeless(model: nn.Module, stray: Tensor) -> str:
    """What is wrong with a parameter that is read and is none of the model's, with the attribute that holds it."""
    held = ((f"{name}.{key}".lstrip("."), value) for name, module in model.named_modules() for key, value in module.__dict__.items())
    leaves = ((name, leaf) for name, value in held for leaf in torch.utils._pytree.tree_leaves(value))
    found = (n for n, leaf in leaves if leaf is stray or (isinstance(leaf, nn.Module) and any(p is stray for p in leaf.parameters())))
    where = next((f"in the attribute {n!r}" for n in found), "outside of the model")
    return (
        f"the model reads a parameter of shape {tuple(stray.shape)} that is {where} and in none of its modules, so it would be neither "
        "trained nor saved; hold it in an nn.Parameter, nn.ParameterList, nn.ParameterDict or nn.ModuleList, or turn off its gradient"
    )


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones under their first name only."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the fused attention path, which hides what it does; both put back afterwards."""
    training = [m for m in model.modules() if m.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


class _Watch(TorchDispatchMode):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unknowable = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
        result = torch.zeros((), dtype=args[0].dtype).item() if unknowable else func(*args, **(kwargs or {}))
        observe(self.ledger, func, args, kwargs or {}, result)
        return result


def _read(ledger: Ledger, model: nn.Module, tensors: dict[str, Tensor], example: Sequence[Any], made: set[int]) -> Trace:
    _freeze_unused(ledger, tensors)
    ledger.settle()
    specs = {**_specs(model, tensors), **_products(ledger)}
    inputs = _inputs(example)
    batch = next((i.shape[0] for i in inputs if i.shape), 1)
    specs = {n: TensorSpec(t.shape, t.dtype, t.kind, ledger.positions.get(n, 0) // batch) for n, t in specs.items()}
    places = list(_sites(ledger, tensors))
    entries = [_entries(ledger, n, dim) for n, (_, dim, _) in enumerate(places)]
    table = np.concatenate([*entries, np.zeros((0, 3), dtype=np.int64)])
    sites, roles = [s for s, _, _ in places], [r for _, _, r in places]
    table = _audible(table, roles)
    traits = _traits(ledger, table, sites, roles)
    groups = assemble(table, sites, roles, traits)
    found = find(ledger.history, list(tensors), {n for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.ndim > 1}, made)
    return Trace(Structure(specs, groups, inputs, tuple(f.branch for f in found)), ledger, tuple(found))


def _sites(ledger: Ledger, tensors: dict[str, Tensor]) -> Iterator[tuple[Site, Dim, str]]:
    """Every dimension that may carry channels, in the model's order, with its role."""
    for name, tensor in tensors.items():
        for n, dim in enumerate(ledger.of(tensor)):
            if dim.labelled and (role := ledger.roles.get((name, n), "along")):
                yield (name, n), dim, role
    for name, dims in ledger.products.items():
        yield from (((name, n), dim, "work") for n, dim in enumerate(dims))


def _freeze_unused(ledger: Ledger, tensors: dict[str, Tensor]) -> None:
    """What no operator read stays, and where data decided what was read, so does all that it might have been coupled with."""
    unused = {n: t for n, t in tensors.items() if id(t) not in ledger.touched}
    for tensor in unused.values():
        ledger.freeze(ledger.of(tensor), UNUSED)
    if not ledger.decided_by_data:
        return
    lengths = {k: n for n, t in unused.items() if isinstance(t, nn.Parameter) for k in t.shape if k > 1}
    for tensor in tensors.values():
        for dim in ledger.of(tensor):
            if len(dim) in lengths:
                ledger.freeze([dim], f"may be coupled with {lengths[len(dim)]}, which the example did not reach as data decide its use")


def _entries(ledger: Ledger, site: int, dim: Dim) -> np.ndarray:
    labels = ledger.atoms.resolve(dim.labels)
    rows, columns = np.nonzero(labels >= 0)
    return np.stack([labels[rows, columns], np.full(len(rows), site), rows], axis=1)


def _audible(table: np.ndarray, roles: Sequence[str]) -> np.ndarray:
    """Without atoms that live only in kernels and products: they are nobody's channels."""
    heard = np.array([r not in SILENT for r in roles])[table[:, 1]] if len(table) else np.zeros(0, dtype=bool)
    return table[np.isin(table[:, 0], table[heard, 0])]


ATTENDED = ("hidden", "query-key", "value", "head_dim")
"""What carries the marks of attention is called by them: none, of queries and keys, of values, or of both at once."""


def _traits(ledger: Ledger, table: np.ndarray, sites: list[Site], roles: list[str]) -> dict[int, tuple[str, str]]:
    """Kind and reason to be frozen of every atom."""
    atoms = np.unique(table[:, 0])
    marks = ledger.atoms.marks(atoms)

    def lives(wanted: Iterable[int]) -> np.ndarray:
        return np.isin(atoms, table[np.isin(table[:, 1], list(wanted)), 0])

    made = [s for s, role in enumerate(roles) if role == "out"]
    attended = np.isin(table[:, 1], made) & np.isin(table[:, 0], atoms[marks & (QUERY_KEY | VALUE) > 0])
    projections = {sites[s][0] for s in np.unique(table[attended, 1]).tolist()}
    stream = lives(s for s, role in enumerate(roles) if role == "in" and sites[s][0] in projections) | (marks & TABLE > 0)
    columns = zip(marks.tolist(), lives(made).tolist(), stream.tolist(), strict=True)
    kinds = [_kind(*column) for column in columns]
    return dict(zip(atoms.tolist(), zip(kinds, ledger.atoms.reasons(atoms), strict=True), strict=True))


def _kind(marks: int, made: bool, stream: bool) -> str:
    """What a group is called: by what attention does with it, by who reads or makes it, and by the factor of a split it comes from."""
    if marks & (QUERY_KEY | VALUE):
        return ATTENDED[marks // QUERY_KEY % len(ATTENDED)]
    if not made:
        return "input"
    convolved = marks & CONVOLVED
    if marks & INNER:
        return "channel_in_group" if convolved else "head_dim"
    if marks & OUTER:
        return "channel_group" if convolved else "head"
    return "embedding" if stream else "channel" if convolved else "hidden"


def atoms_lost(trace: Trace, plan: Plan, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The atoms that a plan removes, in a trace of the model with these tensors.

    Raises:
        ValueError: if the trace has another structure than the plan, with the name of a tensor where they differ.
    """
    ledger, parts = trace.ledger, [np.zeros(0, dtype=np.int64)]
    for group in plan.structure.groups:
        if group.name in plan.keep:
            parts.append(_common_atom(ledger, group, tensors)[lost(plan, group)])
    gone = np.concatenate(parts)
    cut = edits(plan)
    for name, tensor in ((n, tensors[n]) for n in plan.structure.tensors if n in tensors):
        for n, dim in enumerate(ledger.of(tensor)):
            stays = np.flatnonzero(~lost_rows(ledger.atoms, dim.labels, gone))
            if not np.array_equal(stays, cut.get((name, n), np.arange(len(dim)))):
                raise ValueError(
                    f"the plan does not fit this model: what it removes is coupled otherwise in dimension {n} of {name!r}; trace again"
                )
    return gone


def _common_atom(ledger: Ledger, group: Group, tensors: Mapping[str, Tensor]) -> np.ndarray:
    """The atom of every channel: the one that is common to all its rows and lives in no other channel's."""
    members = [m for m in group.members if m.tensor in tensors]
    dims = [ledger.of(tensors[m.tensor])[m.dim] for m in members]
    owned = [ledger.atoms.resolve(d.labels)[m.rows.ravel()].reshape(group.size, -1) for d, m in zip(dims, members, strict=True)]
    every, channel = np.concatenate(owned, axis=1), np.arange(group.size)
    atoms, place = np.unique(every, return_inverse=True)
    counts = np.zeros((group.size, len(atoms)), dtype=np.int64)
    np.add.at(counts, (channel[:, None], place.reshape(every.shape)), 1)
    own = (counts == counts.sum(axis=0)) & (atoms >= 0)
    return np.asarray(atoms[np.where(own, counts, -1).argmax(axis=1)])


def _specs(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    stored, parameters = model.state_dict().keys(), dict(model.named_parameters()).keys()

    def kind(name: str) -> str:
        return "parameter" if name in parameters else "buffer" if name in stored else "constant"

    return {n: TensorSpec(tuple(t.shape), _dtype(t), kind(n)) for n, t in tensors.items()}


def _products(ledger: Ledger) -> dict[str, TensorSpec]:
    return {n: TensorSpec(tuple(map(len, dims)), "float32", "activation") for n, dims in ledger.products.items()}


def _inputs(example: Sequence[Any]) -> tuple[InputSpec, ...]:
    positional, named = arguments(example)
    return tuple(_input(x, name) for name, x in [*(("", x) for x in positional), *named.items()] if isinstance(x, Tensor))


def _input(x: Tensor, name: str) -> InputSpec:
    bounded = not x.is_floating_point() and x.numel() and not x.is_meta
    return InputSpec(tuple(x.shape), _dtype(x), int(x.max()) + 1 if bounded else 0, name)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
