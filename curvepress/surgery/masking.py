"""What a plan should compute: the full model with every lost channel held at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ..objective import call
from ..plan import Plan, edits
from ..tracing.labelling import Dims, Ledger, lost_rows
from ..tracing.operators import bound, name_of, observe, reduced
from ..tracing.watching import Trace, atoms_lost, model_tensors, quiet_evaluation, run, watch

Cuts = dict[int, np.ndarray]
"""For each dimension of a tensor that is cut the indices that stay, ascending."""


def masked_output(model: nn.Module, plan: Plan, example: Sequence[Any]) -> Any:
    """The output of the full model for the example with everything the plan removes at zero, and without the branches it skips.

    Every slice of a weight, bias or running statistic that belongs to a lost channel is zero, so whatever reads the channel
    reads nothing.  Norms, means and sums run over the channels that stay: over a cut dimension they have new statistics.
    """
    trace = watch(model, lambda: run(model, example), example)
    return masked(model, plan, example, trace, atoms_lost(trace, plan, model_tensors(model)))


def masked(model: nn.Module, plan: Plan, example: Sequence[Any], trace: Trace, gone: np.ndarray) -> Any:
    """:func:`masked_output` of a model that has been traced on the example, with the atoms that are lost."""
    full = copy.deepcopy(model)
    tensors, originals, stays = model_tensors(full), model_tensors(model), stay(plan)
    with torch.no_grad():
        for name, tensor in tensors.items():
            trace.ledger.put(tensor, trace.ledger.of(originals[name]))
            for dim, rows in stays.get(name, {}).items():
                lost = np.setdiff1d(np.arange(tensor.shape[dim]), rows)
                tensor.index_fill_(dim, _on(lost, tensor), 0)
        with quiet_evaluation(full), sdpa_kernel(SDPBackend.MATH), _OverSurvivors(trace.ledger, gone, left_over(trace, plan.skip)):
            return call(full, example)


def stay(plan: Plan) -> dict[str, Cuts]:
    """The rows that stay of every dimension of the model's tensors that the plan cuts."""
    found: dict[str, Cuts] = {}
    for (name, dim), rows in edits(plan).items():
        if plan.structure.tensors[name].kind != "activation":
            found.setdefault(name, {})[dim] = rows
    return found


class Skipping(TorchDispatchMode):
    """Runs a forward pass in which of some sums only one addend is left: ``left[step]`` is 0 or 1."""

    def __init__(self, left: Mapping[int, int]) -> None:
        super().__init__()
        self.left, self.steps = left, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (addend := self.left.get(self.steps)) is not None:
            in_place = func._schema.is_mutable
            args = [a if n == addend else a.zero_() if in_place and not n else torch.zeros_like(a) for n, a in enumerate(args)]
        self.steps += 1
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operator."""
        return func(*args, **kwargs)


def left_over(trace: Trace, skip: Collection[str]) -> dict[int, int]:
    """For the sum of each of these branches its step and the addend that is left."""
    return {f.step: 1 - f.addend for f in trace.branches if f.branch.name in skip}


class _OverSurvivors(Skipping):
    """Runs norms and statistics over the channels that stay, and leaves zero elsewhere."""

    def __init__(self, ledger: Ledger, gone: np.ndarray, left: Mapping[int, int]) -> None:
        super().__init__(left)
        self.ledger, self.gone = ledger, gone

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if run := SURVIVING.get(name_of(func)):
            result = run(self.cuts, func, bound(func, args, kwargs), args, kwargs)
        else:
            result = func(*args, **kwargs)
        observe(self.ledger, func, args, kwargs, result)
        return result

    def cuts(self, x: Tensor, over: Sequence[int]) -> Cuts:
        """What stays of those of these dimensions that are cut."""
        dims: Dims = self.ledger.of(x)
        lost = {d: lost_rows(self.ledger.atoms, dims[d].labels, self.gone) for d in over}
        return {d: np.flatnonzero(~rows) for d, rows in lost.items() if rows.any()}


Survivors = Callable[[Tensor, Sequence[int]], Cuts]


def _statistic(cuts: Survivors, func: Any, a: dict[str, Any], args: Any, kwargs: Any) -> Any:
    return func(_narrow(args[0], cuts(args[0], sorted(reduced(a)))), *args[1:], **kwargs)


def _layer_norm(cuts: Survivors, func: Any, a: dict[str, Any], args: Any, kwargs: Any) -> Any:
    x, shape, *rest = args
    first = x.ndim - len(shape)
    stays = cuts(x, range(first, x.ndim))
    if not stays:
        return func(*args, **kwargs)
    own = {d - first: rows for d, rows in stays.items()}
    small = _narrow(x, stays)
    narrow = [_narrow(t, own) if isinstance(t, Tensor) else t for t in rest]
    y, *statistics = func(small, list(small.shape[first:]), *narrow, **kwargs)
    return (_widen(y, stays, x), *statistics)


def _group_norm(cuts: Survivors, func: Any, a: dict[str, Any], args: Any, kwargs: Any) -> Any:
    x, weight, bias, n, c, hw, groups, eps = args
    stays = cuts(x, [1])
    if not stays:
        return func(*args, **kwargs)
    left = len(np.unique(stays[1] // (c // groups)))
    small = _narrow(x, stays).contiguous()
    own = [None if t is None else _narrow(t, {0: stays[1]}) for t in (weight, bias)]
    y, *statistics = func(small, *own, n, len(stays[1]), hw, left, eps)
    return (_widen(y, stays, x), *statistics)


SURVIVING: Mapping[str, Any] = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(("mean", "sum", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm"), _statistic),
}


def _on(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(rows, device=like.device)


def _narrow(tensor: Tensor, cuts: Mapping[int, np.ndarray]) -> Tensor:
    for dim, rows in cuts.items():
        tensor = tensor.index_select(dim, _on(rows, tensor))
    return tensor


def _widen(tensor: Tensor, cuts: Mapping[int, np.ndarray], like: Tensor) -> Tensor:
    for dim, rows in cuts.items():
        shape = [*tensor.shape[:dim], like.shape[dim], *tensor.shape[dim + 1 :]]
        tensor = tensor.new_zeros(shape).index_copy(dim, _on(rows, tensor), tensor)
    return tensor
