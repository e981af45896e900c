"""The layers that implants are made of: ordinary modules of ordinary layers, that trace, prune, train and export like any others."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Sequential):
    """A layer as two: ``down`` reads the inputs into a few inner channels, ``up`` makes the outputs from these."""


class Pointwise(nn.Module):
    """A convolution whose last output channels are made by 1x1 filters: ``full`` and ``point``, concatenated."""

    def __init__(self, full: nn.Module, point: nn.Module) -> None:
        super().__init__()
        self.full, self.point = full, point

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer."""
        return torch.cat([self.full(x), self.point(x)], 1)


def refusal(layer: nn.Module) -> str:
    """Why no implant can take the place of a layer; empty if one can."""
    if type(layer) not in (nn.Linear, *CONVOLUTIONS):
        return f"it belongs to a {type(layer).__name__}, not to an nn.Linear or an nn.Conv of one to three dimensions"
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return f"it is a convolution of {layer.groups} groups"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "its layer has hooks, which would be lost"
    return ""


def low_rank(layer: Any, up: Tensor, down: Tensor) -> LowRank:
    """``layer`` with the weight ``up @ down``: matrices ``[out, rank]`` and ``[rank, inputs of a filter]``."""
    weight, rank = layer.weight, len(down)
    first = down.reshape(rank, *weight.shape[1:])
    second = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
    if isinstance(layer, nn.Linear):
        parts = nn.Linear(layer.in_features, rank, False, device="meta"), nn.Linear(rank, layer.out_features, device="meta")
    else:
        ends = type(layer)(rank, layer.out_channels, 1, device="meta")
        parts = _convolution(layer, rank), ends
    return _like(LowRank(OrderedDict(down=_filled(parts[0], first, None, layer), up=_filled(parts[1], second, layer.bias, layer))), layer)


def pointwise(layer: Any, full: Tensor, point: Tensor) -> Pointwise:
    """``layer`` with the filters ``full`` ``[kept, in, *kernel]`` and then the 1x1 filters ``point`` ``[others, in]``.

    Raises:
        ValueError: if 1x1 filters cannot see the centres of the kernel, as it is not padded by enough.
    """
    reach = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    given = {"same": reach, "valid": [0] * len(reach)}[layer.padding] if isinstance(layer.padding, str) else layer.padding
    padding = tuple(p - r for p, r in zip(given, reach, strict=True))
    if min(padding) < 0 or (any(padding) and layer.padding_mode != "zeros"):
        raise ValueError(f"1x1 filters cannot stand in for a kernel {layer.kernel_size} padded by {layer.padding}; choose low_rank")
    few = type(layer)(layer.in_channels, len(point), 1, layer.stride, padding, device="meta")
    many, second = _convolution(layer, len(full)), point.reshape(*point.shape, *[1] * len(reach))
    biases = (None, None) if layer.bias is None else (layer.bias[: len(full)], layer.bias[len(full) :])
    return _like(Pointwise(_filled(many, full, biases[0], layer), _filled(few, second, biases[1], layer)), layer)


def _convolution(layer: Any, out: int) -> Any:
    how = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "padding_mode")}
    return type(layer)(layer.in_channels, out, layer.kernel_size, **how, bias=False, device="meta")


def _filled(part: Any, weight: Tensor, bias: Tensor | None, layer: Any) -> Any:
    """Tensors of the old layer's type, and trained where the old ones were."""
    part.weight = nn.Parameter(weight.detach().to(layer.weight).clone(), layer.weight.requires_grad)
    part.bias = None if bias is None else nn.Parameter(bias.detach().clone(), layer.bias.requires_grad)
    return part


def _like(made: Any, layer: nn.Module) -> Any:
    return made.train(layer.training)
