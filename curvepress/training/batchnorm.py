"""Batch statistics read again, as the weights now make them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..objective import Batches, batch_size, output


def reestimate(model: nn.Module, batches: Batches, *, examples: int = 2048) -> nn.Module:
    """A copy of ``model`` whose batch-normalisation statistics are those of ``batches``, as its weights now make them.

    Every running mean and (unbiased) variance becomes the average of the batches' own, weighted by their sizes;
    meanwhile layers normalise by the batch, as in training, and dropout is off.  All else stays: weights, modes,
    counters.  Layers are found by the operator they call, so graph modules are served like others.
    Whole batches are taken until ``examples`` were seen, or all were.

    Raises:
        ValueError: if there are no batches or a layer sees one value per channel only.
    """
    if examples < 1:
        raise ValueError(f"examples must be 1 or more; got {examples}")
    copy, seen = deepcopy(model).eval(), 0
    with torch.no_grad(), _Averaging():
        for batch in batches:
            output(copy, batch)
            seen += batch_size(batch)
            if seen >= examples:
                break
    if not seen:
        raise ValueError("there were no batches to estimate the statistics on")
    for mine, given in zip(copy.modules(), model.modules(), strict=True):
        mine.training = given.training
    return copy


_ATEN = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_ARGUMENTS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    **dict.fromkeys((torch.batch_norm, torch.ops.aten.batch_norm, torch.ops.aten.batch_norm.default), _ATEN),
}


class _InTraining(TorchFunctionMode):
    """Batch normalisation runs as in training, with the momentum of this example, batch and layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(_ARGUMENTS.get(func, ()), args, strict=False)) | (kwargs or {})
        if func not in _ARGUMENTS and "batch_norm" in getattr(func, "__name__", ""):
            raise ValueError(f"statistics cannot be re-estimated through {func}: give a model that calls aten.batch_norm")
        if func not in _ARGUMENTS or given["running_mean"] is None:
            return func(*args, **(kwargs or {}))
        inputs = given["input"]
        if inputs.numel() == inputs.shape[1]:
            raise ValueError(f"batch normalisation of inputs {tuple(inputs.shape)} sees one value per channel; use larger batches")
        return func(**given | {"training": True, "momentum": self.momentum(inputs, given["running_mean"], given["running_var"])})

    def momentum(self, inputs: Tensor, mean: Tensor, variance: Tensor) -> float:
        """How much of the running statistics is replaced."""
        raise NotImplementedError


class Untouched(_InTraining):
    """Batch normalisation by the statistics of each batch, as they would be after they are estimated anew; buffers stay."""

    def momentum(self, inputs: Tensor, mean: Tensor, variance: Tensor) -> float:
        """None of them."""
        return 0.0


class _Averaging(_InTraining):
    """The buffers become averages over the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}  # examples, by the address of the running mean

    def momentum(self, inputs: Tensor, mean: Tensor, variance: Tensor) -> float:
        if mean.data_ptr() not in self.seen:
            for buffer in (mean, variance):
                buffer.zero_()  # were it NaN, it would outlive a momentum of 1
        examples = self.seen[mean.data_ptr()] = self.seen.get(mean.data_ptr(), 0) + len(inputs)
        return len(inputs) / examples
