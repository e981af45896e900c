"""Weights of a quantized module rounded anew, one layer after the other, with a look at what each layer computes.

Every layer is rounded for the inputs it really gets, which come from layers that are rounded already (GPTQ, Frantar et al. 2023,
arXiv:2210.17323, section 3), and its scales are fitted to what was rounded; see :mod:`.rounding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graphs import placeholder_values
from .objective import Batch, Batches, batch_size
from .quantized.graphs import argument, tensor
from .quantized.modules import WeightQuantizer
from .quantized.placement import operator_name
from .quantizer import Grid, Scheme, dequantize
from .rounding import Method, fit_and_round, gram_convolution, gram_linear

ROUNDINGS = ("nearest", "compensated", "adaptive")
EXAMPLES = 256
CONVOLUTIONS = ("conv1d", "conv2d")
PRODUCTS = {"linear": ("input", False), "addmm": ("mat1", True), "matmul": ("self", True), "mm": ("self", True)}
"""Products by a matrix: the argument that it is multiplied with, and whether its output channels are its columns."""


def requantize(module: nn.Module, batches: Batches, *, method: Method = "adaptive", examples: int = EXAMPLES) -> tuple[str, ...]:
    """Round the weights of a calibrated module so that the outputs of layers change little; what it could not do so is named.

    Weights and their scales change in place.  Calibrate again afterwards with what was observed, so that biases fit.  Embeddings,
    transposed convolutions, and weights that several operators read stay rounded to the nearest; their names come back.

    Raises:
        ValueError: if the method is unknown, there are no batches, or an activation is not finite.
    """
    if method not in ROUNDINGS:
        raise ValueError(f"rounding {method!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
    assert isinstance(module, fx.GraphModule)
    given = _taken(batches, examples) if method != "nearest" else []
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    left = [q.name for q, reader in _read_weights(module) if reader is None]
    try:
        for quantizer, reader in _read_weights(module) if given else ():
            if reader is not None:
                _round(module, quantizer, _gram(module, reader, given), method, _by_columns(reader))
    finally:
        for part, training in modes:
            part.training = training
    return tuple(left)


def _taken(batches: Batches, examples: int) -> list[Batch]:
    taken: list[Batch] = []
    seen = 0
    for batch in batches:
        taken.append(batch)
        seen += batch_size(batch)
        if seen >= examples:
            break
    if not taken:
        raise ValueError("there were no batches to round weights with; give calibration data")
    return taken


def _read_weights(module: fx.GraphModule) -> Iterator[tuple[WeightQuantizer, fx.Node | None]]:
    """Every weight on a grid, in the order of the graph, and the one operator that reads it if its inputs' Gram matrix can be had."""
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(quantizer := module.get_submodule(str(node.target)), WeightQuantizer):
            yield quantizer, _reader(module, node)


def _reader(module: fx.GraphModule, weight: fx.Node) -> fx.Node | None:
    users = [u for u in weight.users if operator_name(u) or u.op != "call_module"]
    if len(users) != 1:
        return None
    user, name = users[0], operator_name(users[0])
    if name in CONVOLUTIONS:
        return user if not isinstance(argument(user, "padding"), str) else None
    if name not in PRODUCTS or argument(user, PRODUCTS[name][0]) is weight:
        return None
    return user if tensor(module, str(weight.args[0].target)).dim() == 2 else None  # type: ignore[union-attr]


def _by_columns(reader: fx.Node) -> bool:
    return operator_name(reader) in PRODUCTS and PRODUCTS[operator_name(reader)][1]


def _gram(module: fx.GraphModule, reader: fx.Node, batches: list[Batch]) -> Tensor:
    """The Gram matrices of what a product reads, summed over the batches."""
    total = torch.zeros(())
    for batch in batches:
        values, name = _values_before(module, reader, batch), operator_name(reader)
        if name in PRODUCTS:
            total = total + gram_linear(values[argument(reader, PRODUCTS[name][0])])
        else:
            how = {k: argument(reader, k) for k in ("stride", "padding", "dilation", "groups")}
            total = total + gram_convolution(values[argument(reader, "input")], values[argument(reader, "weight")], **how)
    return total


def _values_before(module: fx.GraphModule, last: fx.Node, batch: Batch) -> Mapping[fx.Node, Any]:
    """What a graph, run no further than a node, has at hand for it."""
    run = fx.Interpreter(module)
    run.args_iter = iter(placeholder_values(module, batch[0]))
    with torch.no_grad():
        for node in module.graph.nodes:
            if node is last:
                break
            run.env[node] = run.run_node(node)
            for done in run.user_to_last_uses.get(node, []):
                del run.env[done]
    return run.env


def _round(module: fx.GraphModule, quantizer: WeightQuantizer, gram: Tensor, method: Method, by_columns: bool) -> None:
    weight, grid = tensor(module, quantizer.name), quantizer.grid
    values = weight.detach().T.contiguous() if by_columns else weight.detach()
    rows = Grid(Scheme(grid.bits, axis=0, group=grid.scheme.group), grid.scale, grid.zero_point) if by_columns else grid
    levels, fitted = fit_and_round(values, rows, gram, method=method)
    rounded = dequantize(levels, fitted)
    with torch.no_grad():
        weight.copy_(rounded.T if by_columns else rounded)
    quantizer.grid = Grid(grid.scheme, fitted.scale, fitted.zero_point)
