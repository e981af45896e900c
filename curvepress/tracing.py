"""Find a model's structure by watching the ATen operators of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .labelling import Dim, Ledger
from .operators import observe
from .structure import Group, InputSpec, Site, Structure, TensorSpec, assemble

UNUSED = "not used in the traced forward pass"
SILENT = ("kernel", "work")


def trace(model: nn.Module, *example: Tensor) -> Structure:
    """Which dimensions of the model's tensors must change together, from one forward pass in evaluation mode.

    The model is left as it is.  Operators without a rule freeze what they touch; the reason is in ``Group.frozen``.

    Args:
        example: the inputs of one forward pass; multiply-accumulates are counted per example of its first dimension.

    Raises:
        ValueError: if the model cannot be run on the example.
    """
    return watch(model, lambda: run(model, example), example).structure


def run(model: nn.Module, example: Sequence[Tensor]) -> Any:
    """The model's output for the example.

    Raises:
        ValueError: if the forward pass fails.
    """
    try:
        return model(*example)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x) for x in example)
        raise ValueError(f"the model does not run on the example ({shapes}): {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Trace:
    """A structure, the ledger it was read from, and the atom of every channel of every group."""

    structure: Structure
    ledger: Ledger
    atoms: dict[str, np.ndarray]


def watch(model: nn.Module, forward: Callable[[], Any], example: Sequence[Tensor]) -> Trace:
    """Run ``forward``, which must use the tensors of ``model``, and read off the structure."""
    ledger, tensors = Ledger(), model_tensors(model)
    for name, tensor in tensors.items():
        if tensor.ndim and tensor.is_floating_point():
            ledger.adopt(name, tensor)
    with quiet_evaluation(model), torch.no_grad(), _Watch(ledger):
        out = forward()
    for tensor in torch.utils._pytree.tree_leaves(out):
        if isinstance(tensor, Tensor):
            ledger.freeze(ledger.of(tensor), "model output")
    return _read(ledger, model, tensors, example)


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
        result = func(*args, **(kwargs or {}))
        observe(self.ledger, func, args, kwargs or {}, result)
        return result


def _read(ledger: Ledger, model: nn.Module, tensors: dict[str, Tensor], example: Sequence[Tensor]) -> Trace:
    specs = {**_specs(model, tensors), **_products(ledger)}
    batch = next((len(x) for x in example if isinstance(x, Tensor) and x.ndim), 1)
    specs = {n: TensorSpec(t.shape, t.dtype, t.kind, ledger.positions.get(n, 0) // batch) for n, t in specs.items()}
    found = list(_sites(ledger, tensors))
    entries = [_entries(ledger, n, dim) for n, (_, dim, _) in enumerate(found)]
    table = np.concatenate([*entries, np.zeros((0, 3), dtype=np.int64)])
    sites, roles = [s for s, _, _ in found], [r for _, _, r in found]
    table = _audible(table, roles)
    traits = _traits(ledger, table, sites, roles, specs)
    groups = assemble(table, sites, roles, traits)
    structure = Structure(specs, groups, tuple(_input(x) for x in example if isinstance(x, Tensor)))
    return Trace(structure, ledger, _atoms(ledger, groups, dict(zip(sites, (d for _, d, _ in found), strict=True))))


def _sites(ledger: Ledger, tensors: dict[str, Tensor]) -> Iterator[tuple[Site, Dim, str]]:
    """Every dimension that may carry channels, in the model's order, with its role."""
    for name, tensor in tensors.items():
        for n, dim in enumerate(ledger.of(tensor)):
            role = ledger.roles.get((name, n))
            unseen = not any((name, k) in ledger.roles for k in range(tensor.ndim))
            if role is None and unseen:
                ledger.freeze([dim], UNUSED)
            if dim.labelled and (role or unseen):
                yield (name, n), dim, role or "along"
            elif dim.labelled:
                ledger.freeze([dim], "not a dimension of channels")
    for name, dims in ledger.products.items():
        yield from (((name, n), dim, "work") for n, dim in enumerate(dims))


def _entries(ledger: Ledger, site: int, dim: Dim) -> np.ndarray:
    labels = ledger.atoms.resolve(dim.labels)
    rows, columns = np.nonzero(labels >= 0)
    return np.stack([labels[rows, columns], np.full(len(rows), site), rows], axis=1)


def _audible(table: np.ndarray, roles: Sequence[str]) -> np.ndarray:
    """Without atoms that live only in kernels and products: they are nobody's channels."""
    heard = np.array([r not in SILENT for r in roles])[table[:, 1]] if len(table) else np.zeros(0, dtype=bool)
    return table[np.isin(table[:, 0], table[heard, 0])]


KINDS = (("hidden", "head", "head_dim"), ("channel", "channel_group", "channel_in_group"))
"""What a group is called, by whether a convolution makes it and by the factor of a split its atoms come from."""


def _traits(
    ledger: Ledger, table: np.ndarray, sites: list[Site], roles: list[str], specs: dict[str, TensorSpec]
) -> dict[int, tuple[str, str]]:
    """Kind and reason to be frozen of every atom."""
    atoms = np.unique(table[:, 0])

    def lives(wanted: Callable[[int], bool]) -> list[bool]:
        return np.isin(atoms, table[np.isin(table[:, 1], [s for s in range(len(sites)) if wanted(s)]), 0]).tolist()

    made = lives(lambda s: roles[s] == "out")
    convolved = lives(lambda s: roles[s] == "out" and len(specs[sites[s][0]].shape) > 2)
    levels, reasons = ledger.atoms.level(atoms).tolist(), ledger.atoms.reasons(atoms)
    kinds = [KINDS[c][level] if m else "input" for m, c, level in zip(made, convolved, levels, strict=True)]
    return dict(zip(atoms.tolist(), zip(kinds, reasons, strict=True), strict=True))


def _atoms(ledger: Ledger, groups: Sequence[Group], dims: dict[Site, Dim]) -> dict[str, np.ndarray]:
    """The atom of every channel: the one that is common to all its rows."""
    return {g.name: _common_atom(ledger, g, dims) for g in groups}


def _common_atom(ledger: Ledger, group: Group, dims: dict[Site, Dim]) -> np.ndarray:
    owned = [ledger.atoms.resolve(dims[m.tensor, m.dim].labels)[m.rows.ravel()].reshape(group.size, -1) for m in group.members]
    candidates = owned[0]
    share = np.zeros(candidates.shape, dtype=np.int64)
    for atoms in owned:
        share += (atoms[:, None, :] == candidates[:, :, None]).sum(axis=2)
    return candidates[np.arange(group.size), np.where(candidates >= 0, share, -1).argmax(axis=1)]


def _specs(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    stored, parameters = model.state_dict().keys(), dict(model.named_parameters()).keys()

    def kind(name: str) -> str:
        return "parameter" if name in parameters else "buffer" if name in stored else "constant"

    return {n: TensorSpec(tuple(t.shape), _dtype(t), kind(n)) for n, t in tensors.items()}


def _products(ledger: Ledger) -> dict[str, TensorSpec]:
    return {n: TensorSpec(tuple(map(len, dims)), "float32", "activation") for n, dims in ledger.products.items()}


def _input(x: Tensor) -> InputSpec:
    return InputSpec(tuple(x.shape), _dtype(x), 0 if x.is_floating_point() or not x.numel() or x.is_meta else int(x.max()) + 1)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
