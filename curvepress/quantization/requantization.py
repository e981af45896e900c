"""Weights of a quantized module rounded anew, one layer after the other, with a look at what each layer computes.

Every layer is rounded for the inputs it really gets, which come from layers that are rounded already (GPTQ, Frantar et al. 2023,
arXiv:2210.17323, section 3), and its scales are fitted to what was rounded; see :mod:`.rounding`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..objective import Batch, Batches, batch_size
from ..tracing.graphs import placeholder_values
from .quantized.graphs import argument, tensor
from .quantized.modules import WeightQuantizer
from .quantized.placement import operator_name
from .quantizer import Grid, dequantize, fake_quantize, fit_grid, quantize
from .rounding import Method, fit_and_round, gram_convolution, gram_linear

ROUNDINGS = ("nearest", "weighted", "compensated", "adaptive")
"""Those of :mod:`.rounding`, and ``weighted``: to the nearest, on the scales with the least error weighted by the curvature of the layer's
output, whose diagonal is the mean square of what each element is multiplied with."""
EXAMPLES = 256
CONVOLUTIONS = ("conv1d", "conv2d")
PRODUCTS = {"linear": ("input", False), "addmm": ("mat1", True), "matmul": ("self", True), "mm": ("self", True)}
"""Products by a matrix: the argument that it is multiplied with, and whether its output channels are its columns."""


def requantize(module: nn.Module, batches: Batches, *, method: str = "adaptive", examples: int = EXAMPLES) -> tuple[str, ...]:
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


def rounding_errors(
    module: nn.Module, batches: Batches, grids: Mapping[str, Sequence[Grid]], *, method: str = "compensated", examples: int = EXAMPLES
) -> dict[str, list[Tensor]]:
    """What rounding each weight by itself changes in it, on each of the grids given for it, all others being as they are.

    ``module`` is one that ``quantize`` returned, switched off, so that layers read what they do in float.  Weights whose rounding cannot
    look at outputs, as in :func:`requantize`, are rounded to the nearest.
    """
    assert isinstance(module, fx.GraphModule)
    readers = {q.name: reader for q, reader in _read_weights(module) if q.name in grids}
    looked = {} if method == "nearest" else {name: r for name, r in readers.items() if r is not None}
    grams = _grams(module, looked.values(), _taken(batches, examples)) if looked else {}
    found: dict[str, list[Tensor]] = {}
    for name, on in grids.items():
        weight = tensor(module, name).detach()
        if (reader := looked.get(name)) is None:
            found[name] = [fake_quantize(weight, g) - weight for g in on]
        else:
            found[name] = [_rounded(weight, g, grams[reader], method, _by_columns(reader), rounds=1)[0] - weight for g in on]
    return found


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
    return _grams(module, [reader], batches)[reader]


def _grams(module: fx.GraphModule, readers: Collection[fx.Node], batches: list[Batch]) -> dict[fx.Node, Tensor]:
    """The same for several products, in one pass over the batches, which ends with the last of them."""
    totals = dict.fromkeys(readers, torch.zeros(()))
    for batch in batches:
        run, left = fx.Interpreter(module), set(readers)
        run.args_iter = iter(placeholder_values(module, batch[0]))
        with torch.no_grad():
            for node in module.graph.nodes:
                if node in left:
                    totals[node] = totals[node] + _gram_of(node, run.env)
                    left.remove(node)
                if not left:
                    break
                run.env[node] = run.run_node(node)
                for done in run.user_to_last_uses.get(node, []):
                    del run.env[done]
    return totals


def _gram_of(reader: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor:
    """The Gram matrices of what a product reads of one batch."""
    name = operator_name(reader)
    if name in PRODUCTS:
        return gram_linear(values[argument(reader, PRODUCTS[name][0])])
    how = {k: argument(reader, k) for k in ("stride", "padding", "dilation", "groups")}
    return gram_convolution(values[argument(reader, "input")], values[argument(reader, "weight")], **how)


def _round(module: fx.GraphModule, quantizer: WeightQuantizer, gram: Tensor, method: str, by_columns: bool) -> None:
    weight = tensor(module, quantizer.name)
    rounded, fitted = _rounded(weight.detach(), quantizer.grid, gram, method, by_columns)
    with torch.no_grad():
        weight.copy_(rounded)
    quantizer.grid = fitted


def _rounded(weight: Tensor, grid: Grid, gram: Tensor, method: str, by_columns: bool, rounds: int = 4) -> tuple[Tensor, Grid]:
    """A weight on its grid, and the grid with the scales that suit it best."""
    rows = replace(grid, scheme=replace(grid.scheme, axis=0)) if by_columns else grid
    values = weight.T.contiguous() if by_columns else weight
    if method == "weighted":
        squares = gram.diagonal(dim1=1, dim2=2).repeat_interleave(len(values) // len(gram), 0).reshape(values.shape)
        fitted = fit_grid(values, rows.scheme, weights=squares)
        levels = quantize(values, fitted)
    else:
        levels, fitted = fit_and_round(values, rows, gram, method=cast(Method, method), rounds=rounds)
    found = dequantize(levels, fitted)
    return (found.T if by_columns else found), Grid(grid.scheme, fitted.scale, fitted.zero_point)
