"""Torch-Pruning on one model of the coverage table: is a group that it finds removed without changing anything else?

Which rows it removes is read off the result: the model is pruned with the numbers of its elements in place of its weights.  Then the
true weights take their places, and the outputs are compared with those of the model in which the removed rows are zero, layer and group
norms over the rows that stay: the same measure that curvepress has to meet.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from math import prod
from time import process_time
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

from benchmarks.coverage_cases import Case, make
from benchmarks.coverage_laws import TOLERANCE, distance
from benchmarks.records import Record
from curvepress.objective import call, outputs
from curvepress.plan import Plan
from curvepress.structure import Group, Member, Structure, TensorSpec
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import model_tensors

GROUPS = 16
"""How many of a model's groups are tried, evenly spread over it."""

Rows = dict[tuple[str, int], np.ndarray]


def measure(name: str) -> Record:
    """The record of a model: how many groups Torch-Pruning removes exactly, and how far it can be cut.

    Groups that are not tried count as exact for the share that can be cut.
    """
    case = make(name)
    start = process_time()
    sizes = [len(group[0].idxs) for group in _groups(case.model, case.inputs(3, 0))]
    seconds = process_time() - start
    tried = sorted({int(n) for n in np.linspace(0, len(sizes) - 1, min(GROUPS, len(sizes)))})
    outcomes = {n: outcome(make(name), n, sizes[n]) for n in tried}
    counted = [o for o in outcomes.values() if o != "output"]
    return {
        "params": sum(p.numel() for p in case.model.parameters()),
        "trace_seconds": seconds,
        "groups": len(sizes),
        "tried": len(counted),
        "exact": counted.count("exact"),
        "outcomes": dict(Counter(counted)),
        "cut": share_cut(make(name), [n for n in range(len(sizes)) if outcomes.get(n, "exact") == "exact"]),
    }


def _groups(model: nn.Module, example: tuple[Any, ...]) -> Iterator[Any]:
    named = example[0] if isinstance(example[0], dict) else example
    return tp.DependencyGraph().build_dependency(model, example_inputs=named).get_all_groups()


def outcome(case: Case, number: int, size: int) -> str:
    """What removing a sixth of one group does: ``exact``, ``output`` where it narrows the model's output, or what goes wrong."""
    gone = np.random.default_rng(number).permutation(size)[: max(size // 6, 1)].tolist()
    example, other = case.inputs(3, 0), case.inputs(5, 1)
    try:
        small, whole = pruned(case, example, {number: gone}), untied(case.model)
        rows = rows_left(small, whole)
        fill(small, whole)
        with torch.no_grad():
            if _shapes(call(small, other)) != _shapes(call(whole, other)):
                return "output"
        apart = distance(small, other, wanted(whole, rows, other))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return "exact" if apart <= TOLERANCE else f"WRONG by {apart:.1g}"


def wanted(model: nn.Module, rows: Rows, inputs: tuple[Any, ...]) -> Any:
    """What the model computes without the rows that are not left; where these are only parts of what is coupled, with plain zeros."""
    try:
        return masked_output(model, plan_of(model, rows), inputs)
    except ValueError:
        full = copy.deepcopy(model)
        with torch.no_grad():
            for (name, dim), left in rows.items():
                tensor = model_tensors(full)[name]
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), left)
                tensor.index_fill_(dim, torch.as_tensor(gone), 0)
            return call(full, inputs)


def pruned(case: Case, example: tuple[Any, ...], gone: dict[int, list[int]]) -> nn.Module:
    """A copy that holds the numbers of its elements in place of its weights, with these indices of these groups removed."""
    small = make(case.name).model
    for tensor in model_tensors(small).values():
        if tensor.is_floating_point():
            tensor.data.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    for number, group in enumerate(_groups(small, example)):
        if number in gone:
            group.prune(idxs=gone[number])
    return small


def rows_left(small: nn.Module, model: nn.Module) -> Rows:
    """The indices that are left of every dimension that is narrower.

    Raises:
        ValueError: if what is left of a tensor is not a box.
    """
    rows: Rows = {}
    for name, tensor in model_tensors(small).items():
        whole = model_tensors(model)[name]
        if tensor.shape == whole.shape:
            continue
        numbers = tensor.detach().long()
        for dim in range(whole.ndim):
            left = numbers // prod(whole.shape[dim + 1 :]) % whole.shape[dim]
            line = left.movedim(dim, 0).reshape(tensor.shape[dim], -1).numpy()
            if (line != line[:, :1]).any():
                raise ValueError(f"what is left of {name} is not a box")
            rows[name, dim] = line[:, 0]
    return rows


def untied(model: nn.Module) -> nn.Module:
    """A copy in which tied parameters are parameters of their own, as they are after Torch-Pruning has cut one of them."""
    free = copy.deepcopy(model)
    for module in free.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach().clone())
    return free


def fill(small: nn.Module, model: nn.Module) -> None:
    """Put the weights of ``model`` where their numbers are."""
    for name, tensor in model_tensors(small).items():
        whole = model_tensors(model)[name]
        if tensor.is_floating_point():
            tensor.data = whole.detach().flatten()[tensor.detach().long()].clone()


def plan_of(model: nn.Module, rows: Rows) -> Plan:
    """A plan that keeps these rows, each dimension a group of its own: all that masking needs."""
    specs = {n: TensorSpec(tuple(t.shape), "float64", "parameter") for n, t in model_tensors(model).items()}
    groups = tuple(_line(f"{n}/{d}", n, d, specs[n].shape[d]) for n, d in rows)
    return Plan(Structure(specs, groups), {f"{n}/{d}": tuple(int(r) for r in np.unique(left)) for (n, d), left in rows.items()})


def _line(name: str, tensor: str, dim: int, size: int) -> Group:
    return Group(name, size, "channel", (Member(tensor, dim, np.arange(size)[:, None], "along"),))


def _shapes(output: Any) -> list[torch.Size]:
    return [t.shape for t in outputs(output)]


def share_cut(case: Case, exact: list[int]) -> float:
    """The share of parameters that goes when all but one index of every group that is removed exactly go together; 0 if that fails."""
    example = case.inputs(3, 0)
    sizes = [len(group[0].idxs) for group in _groups(case.model, example)]
    try:
        small = pruned(case, example, {n: list(range(1, sizes[n])) for n in exact})
        call(small, example)
    except Exception:
        return 0.0
    return 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in case.model.parameters())
