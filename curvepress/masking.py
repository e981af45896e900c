"""What a plan should compute: the full model with every lost channel held at zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .plan import Plan, edits
from .tracing import model_tensors, quiet_evaluation


def masked_output(model: nn.Module, plan: Plan, example: tuple[Any, ...]) -> Any:
    """The output of the full model for the example with everything the plan removes at zero.

    Every slice of a weight, bias or running statistic that belongs to a lost channel is zero, so whatever reads the channel
    reads nothing.  Layer and group norms run over the channels that stay: a norm over a cut dimension has new statistics.
    """
    full = copy.deepcopy(model)
    tensors, stay = model_tensors(full), _stay(plan)
    with torch.no_grad():
        for name, dims in stay.items():
            for dim, rows in dims.items():
                gone = np.setdiff1d(np.arange(tensors[name].shape[dim]), rows)
                tensors[name].index_fill_(dim, _on(gone, tensors[name]), 0)
        with quiet_evaluation(full), _NormsOverSurvivors({id(tensors[n]): dims for n, dims in stay.items()}):
            return full(*example)


def _stay(plan: Plan) -> dict[str, dict[int, np.ndarray]]:
    stay: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), rows in edits(plan).items():
        if plan.structure.tensors[name].kind != "activation":
            stay.setdefault(name, {})[dim] = rows
    return stay


def _on(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(rows, device=like.device)


class _NormsOverSurvivors(TorchDispatchMode):
    """Runs layer and group norms over the rows of their weights that stay, and leaves zero elsewhere."""

    def __init__(self, stay: Mapping[int, dict[int, np.ndarray]]) -> None:
        super().__init__()
        self.stay = stay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::native_layer_norm" and id(args[2]) in self.stay:
            return self._layer_norm(func, *args)
        if name == "aten::native_group_norm" and id(args[1]) in self.stay:
            return self._group_norm(func, *args)
        return func(*args, **(kwargs or {}))

    def _layer_norm(self, func: Any, x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None, eps: float) -> Any:
        cuts = self.stay[id(weight)]
        offset = x.ndim - weight.ndim
        small_weight, small_bias = _narrow(weight, cuts), None if bias is None else _narrow(bias, cuts)
        small_x = _narrow(x, {d + offset: rows for d, rows in cuts.items()})
        y, *statistics = func(small_x, list(small_weight.shape), small_weight, small_bias, eps)
        return (_widen(y, {d + offset: rows for d, rows in cuts.items()}, x), *statistics)

    def _group_norm(
        self, func: Any, x: Tensor, weight: Tensor, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
    ) -> Any:
        rows = self.stay[id(weight)][0]
        left = len(np.unique(rows // (c // groups)))
        small = _narrow(x, {1: rows}).contiguous()
        bias = None if bias is None else _narrow(bias, {0: rows})
        y, *statistics = func(small, _narrow(weight, {0: rows}), bias, n, len(rows), hw, left, eps)
        return (_widen(y, {1: rows}, x), *statistics)


def _narrow(tensor: Tensor, cuts: Mapping[int, np.ndarray]) -> Tensor:
    for dim, rows in cuts.items():
        tensor = tensor.index_select(dim, _on(rows, tensor))
    return tensor


def _widen(tensor: Tensor, cuts: Mapping[int, np.ndarray], like: Tensor) -> Tensor:
    for dim, rows in cuts.items():
        shape = [*tensor.shape[:dim], like.shape[dim], *tensor.shape[dim + 1 :]]
        tensor = tensor.new_zeros(shape).index_copy(dim, _on(rows, tensor), tensor)
    return tensor
