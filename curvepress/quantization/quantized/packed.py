"""Quantized modules in packed files: the levels of the weights in as many bits as they have, all grids, and the bits to rebuild from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...objective import Example
from ..packing import Packed, load_packed, save_packed
from ..quantizer import dequantize, quantize
from .graphs import tensor
from .insertion import FOLDER, bits_of, prepare
from .layout import bits_from_json
from .modules import ActivationQuantizer, WeightQuantizer, quantizers


def save(module: nn.Module, path: str | Path, plan: Mapping[str, Any] | None = None) -> None:
    """Write a calibrated module that ``quantize`` returned; ``plan`` is any JSON object that goes along.

    Raises:
        ValueError: if a site has no grid yet.
    """
    weights = {q.name: q.grid for q in quantizers(module) if isinstance(q, WeightQuantizer)}
    own = {n: t.detach() for n, t in _own(module).items() if n not in weights}
    levels = {name: (quantize(tensor(module, name).detach(), grid), grid) for name, grid in weights.items()}
    grids = {q.name: q.grid for q in quantizers(module) if isinstance(q, ActivationQuantizer)}
    save_packed(Packed(own, levels, grids, {"bits": json.loads(bits_of(module).to_json()), **(plan or {})}), path)


def load(model: nn.Module, example: Example, path: str | Path) -> fx.GraphModule:
    """The module that was saved, from a freshly built model of the same architecture, in eval mode.

    It computes bit for bit what the saved one did; its weights are on their grids.

    Raises:
        ValueError: if the file is damaged or of another model.
    """
    packed = load_packed(path)
    if "bits" not in packed.plan:
        raise ValueError(f"{path} does not say with which bits it was quantized; it was not written by this function")
    module = prepare(model, bits_from_json(json.dumps(packed.plan["bits"])), example).eval()
    grids = {**{name: grid for name, (_, grid) in packed.quantized.items()}, **packed.activations}
    values = {**packed.tensors, **{name: dequantize(*pair) for name, pair in packed.quantized.items()}}
    _check(path, "grids", {q.name: () for q in quantizers(module)}, dict.fromkeys(grids, ()))
    _check(path, "tensors", _shapes(_own(module)), _shapes(values))
    for quantizer in quantizers(module):
        quantizer.grid = grids[quantizer.name]
    with torch.no_grad():
        for name, own in _own(module).items():
            own.copy_(values[name])
    return module


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers, without those of quantizers."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: t for name, t in state.items() if not name.startswith(f"{FOLDER}.")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def _check(path: str | Path, what: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    apart = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if apart:
        raise ValueError(f"{path} was written from another model: its {what} differ at {', '.join(apart[:5])}")
