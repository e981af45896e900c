"""Grids of activations from data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...objective import Batch, Batches, batch_size, output
from ..quantizer import Histogram, Observer
from .modules import ActivationQuantizer, BiasQuantizer, quantizers

FEWEST_TO_JUDGE = 32
"""Examples of one class only are taken for sorted data from this many on."""


def observe(module: nn.Module, batches: Batches, *, examples: int = 512) -> dict[str, Histogram]:
    """What the activations at each quantized site of a module are in float, by the name of the site.

    Whole batches are taken until ``examples`` were seen, or all were.  They should be drawn at random, apart from the validation split.

    Raises:
        ValueError: if there are no batches, they hold examples of one class only, or an activation is not finite or always zero.
    """
    watched = [q for q in quantizers(module) if isinstance(q, ActivationQuantizer)]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    for quantizer in watched:
        quantizer.observer = Observer(name=quantizer.name)
    try:
        with torch.no_grad():
            _run(module, batches, examples)
        return {q.name: q.observer.histogram() for q in watched if q.observer is not None}
    finally:
        for quantizer in watched:
            quantizer.observer = None
        for part, training in modes:
            part.training = training


def calibrate(module: nn.Module, batches: Batches | Mapping[str, Histogram], *, method: str = "mse", examples: int = 512) -> nn.Module:
    """The module itself, with a grid for every site: from batches, or from what :func:`observe` saw on any module of the same model.

    ``method`` is ``minmax``, ``percentile`` or ``mse``.  Weight scales are raised where a bias would not fit into 32 bits otherwise.

    Raises:
        ValueError: as :func:`observe`, or if a site was not observed.
    """
    seen = batches if isinstance(batches, Mapping) else observe(module, batches, examples=examples)
    for quantizer in quantizers(module):
        if isinstance(quantizer, ActivationQuantizer):
            if quantizer.name not in seen:
                raise ValueError(f"site {quantizer.name} was not observed; there is {', '.join(seen)}")
            quantizer.fit(seen[quantizer.name], method)
    _make_biases_fit(module)
    return module


def _make_biases_fit(module: nn.Module) -> None:
    graph: Any = module.graph
    for node in graph.find_nodes(op="call_module"):
        part = module.get_submodule(str(node.target))
        if isinstance(part, BiasQuantizer):
            weight, activation = part.factors
            owner, _, last = str(node.args[0].target).rpartition(".")
            bias = getattr(module.get_submodule(owner), last)
            weight.make_room(bias, activation.grid)


def _run(module: nn.Module, batches: Batches, examples: int) -> None:
    seen, classes = 0, set[float]()
    for batch in batches:
        output(module, batch)
        seen += batch_size(batch)
        classes |= _classes(batch)
        if seen >= examples:
            break
    if not seen:
        raise ValueError("there were no batches to calibrate on")
    if len(classes) == 1 and seen >= FEWEST_TO_JUDGE:
        raise ValueError(
            f"all {seen} examples for calibration are of class {classes.pop():g}: the data is sorted by class; shuffle it with a seed"
        )


def _classes(batch: Batch) -> set[float]:
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return set(labels.unique().tolist()) if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() else set()
