"""Int32 biases, as the integer runtimes round them: on the scale of the products that they are added to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .grids import Grid

LARGEST = 2**31 - 1
ROOM = 2**30  # what a raised scale leaves to the sum of products in the same accumulator


def bias_scale(weight: Grid, activation: Grid) -> Tensor:
    """Scale of the accumulator, float32 ``[channels]`` or ``[]``: that of the weight times that of the activation.

    Raises:
        ValueError: if the weight has groups of inputs or the activation channels, for then a sum has no scale of its own.
    """
    if weight.scheme.group is not None or activation.scheme.axis is not None:
        raise ValueError(
            f"biases are integers only where a sum has one scale, got weights of {weight.scheme} and activations of {activation.scheme}; "
            "leave the bias in float, or use scales per channel for weights and per tensor for activations"
        )
    return weight.scale * activation.scale


def quantize_bias(bias: Tensor, scale: Tensor, *, name: str = "bias") -> Tensor:
    """int32 ``[channels]``: ``round(bias / scale)``.

    Raises:
        ValueError: if one is NaN or does not fit into 32 bits: the scale of that channel's weights is too small (see :func:`fit_bias`).
    """
    steps = (bias.double() / scale.double()).round()
    wrong = ~(steps.abs() <= LARGEST)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} does not fit into 32 bits in {int(wrong.sum())} of {len(bias)} channels (largest: {steps.abs().max():.3g} steps): "
            "their weights are nearly zero; raise their scales with fit_bias, or prune the channels"
        )
    return steps.to(torch.int32)


def fake_quantize_bias(bias: Tensor, scale: Tensor, *, name: str = "bias") -> Tensor:
    """The float32 bias that the runtime adds; the gradient of ``bias`` is 1, ``scale`` has none."""
    with torch.no_grad():
        rounded = (quantize_bias(bias, scale, name=name).double() * scale.double()).float()
    return bias + (rounded - bias).detach() if bias.requires_grad else rounded


def fit_bias(weight: Grid, bias: Tensor, activation: Grid) -> Grid:
    """The weight's grid with scales raised where the bias would take more than 31 bits (channels that are nearly dead)."""
    least = bias.detach().abs().double() / (ROOM * activation.scale.double())
    least = least if weight.scheme.axis is not None else least.max()
    bias_scale(weight, activation)
    return replace(weight, scale=torch.maximum(weight.scale, least.float()))
