"""Grids that are made from each batch as it comes: nothing is calibrated, the range is looked at every time."""

from __future__ import annotations

import torch
from torch import Tensor

from .grids import Scheme


def fake_quantize_dynamic(x: Tensor, bits: int, *, symmetric: bool = False, per_token: bool = True) -> Tensor:
    """``x`` on the grid from its own minimum to its own maximum, zero included, with the gradient 1.

    ``per_token`` gives each row of the last dimension its grid, otherwise there is one for the tensor (with 8 bits what ONNX
    calls DynamicQuantizeLinear).  What is zero throughout stays zero.
    """
    scheme, values = Scheme(bits, symmetric), x.detach()
    low, high = (values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)) if per_token else values.aminmax()
    scale, zero = _dynamic_span(low.clamp_max(0), high.clamp_min(0), scheme)
    rounded = (values / scale).round_().add_(zero).clamp_(scheme.qmin, scheme.qmax).sub_(zero).mul_(scale)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _dynamic_span(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """In the dtype of the data, as runtimes do it."""
    scale = torch.maximum(high / scheme.qmax, low / scheme.qmin) if scheme.symmetric else (high - low) / scheme.qmax
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.zeros_like(scale) if scheme.symmetric else (-low / scale).round().clamp(0, scheme.qmax)
