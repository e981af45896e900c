"""A quantized module as a graph that stores integers: levels of weights and biases, and explicit steps onto the grids of activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, library, nn

from ..quantizer import Grid, bias_scale, centred, quantize, quantize_bias
from .graphs import argument, aten, drop_unused, is_getitem, tensor
from .modules import ActivationQuantizer, BiasQuantizer, WeightQuantizer
from .placement import CLAMPS, CONVOLUTIONS, moves, operator_name

_LIBRARY = library.Library("curvepress", "FRAGMENT")
_LIBRARY.define("round_to_grid(Tensor x, float scale, int zero_point, int low, int high) -> Tensor")
_LIBRARY.define("dequantize(Tensor levels, Tensor scale, int axis, int group) -> Tensor")


def round_to_grid(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """``x`` rounded to whole steps of ``scale`` from zero, its levels kept from ``low`` to ``high``; pure ATen."""
    return torch.clamp(torch.round(x / scale), low - zero_point, high - zero_point) * scale


def dequantize(levels: Tensor, scale: Tensor, axis: int, group: int) -> Tensor:
    """Levels times their scales: one in all, or one per index of ``axis`` and, with a ``group``, per run of so many; pure ATen."""
    if group:
        scale = scale.repeat_interleave(group, 1)[:, : levels.shape[1 - axis]]
        return levels.to(scale.dtype) * (scale if axis == 0 else scale.t())
    return levels.to(scale.dtype) * scale.reshape([] if scale.dim() == 0 else [-1 if d == axis else 1 for d in range(levels.dim())])


for _name, _function in (("round_to_grid", round_to_grid), ("dequantize", dequantize)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
library.register_fake("curvepress::round_to_grid", lambda x, scale, zero_point, low, high: torch.empty_like(x))
library.register_fake("curvepress::dequantize", lambda levels, scale, axis, group: levels.new_empty(levels.shape, dtype=scale.dtype))

ROUND = torch.ops.curvepress.round_to_grid.default
DEQUANTIZE = torch.ops.curvepress.dequantize.default
DECOMPOSITIONS = {ROUND: round_to_grid, DEQUANTIZE: dequantize}
"""What the two operators are in operators of PyTorch alone."""


def lower(module: nn.Module) -> fx.GraphModule:
    """A copy of a quantized module, in eval mode, whose graph calls ``curvepress::round_to_grid`` and ``curvepress::dequantize``.

    It computes what the module does.  Every weight on a grid is stored once, as int8; biases that the runtime rounds as int32.
    Operators that only move values are followed by the rounding of what they move, which changes nothing but tells a runtime
    that they may work on integers; a clamp before a rounding becomes limits of its levels, which is the same.

    Raises:
        ValueError: if a site has no grid, or a bias does not fit into 32 bits.
    """
    assert isinstance(module, fx.GraphModule)
    graph = deepcopy(module).eval()
    for node in list(graph.graph.find_nodes(op="call_module")):
        part = graph.get_submodule(str(node.target))
        if type(part) in _LOWERINGS:  # the rounding of tokens is made of operators already
            _LOWERINGS[type(part)](graph, node, part)
    for node in list(graph.graph.nodes):
        _repeat_rounding(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    drop_unused(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _lower_weight(graph: fx.GraphModule, node: fx.Node, quantizer: WeightQuantizer) -> None:
    grid, name = quantizer.grid, str(node.args[0].target)  # type: ignore[union-attr]
    values, axis, group = centred(quantize(tensor(graph, name).detach(), grid), grid), grid.scheme.axis or 0, grid.scheme.group or 0
    linear = [user for user in node.users if operator_name(user) == "linear"]
    if group and len(linear) == len(node.users):  # runtimes multiply by groups where inputs come first
        values, axis = values.t().contiguous(), 1
    levels = _store(graph, node, f"{name}_levels", values)
    scale = _store(graph, node, f"{name}_scale", grid.scale)
    for user in list(node.users):
        if operator_name(user) == "embedding":
            _lower_embedding(graph, user, levels, scale, by_row=grid.scheme.axis is not None)
    if not node.users:
        return graph.graph.erase_node(node)
    new = _replace(graph, node, DEQUANTIZE, (levels, scale, axis, group))
    if axis != (grid.scheme.axis or 0):
        for user in linear:
            _multiply(graph.graph, user, new)
    return None


def _multiply(graph: fx.Graph, node: fx.Node, weight: fx.Node) -> None:
    """A linear layer as a product by ``[inputs, outputs]`` and a sum."""
    with graph.inserting_before(node):
        new = graph.call_function(aten.matmul.default, (node.args[0], weight))
        if (bias := argument(node, "bias")) is not None:
            new = graph.call_function(aten.add.Tensor, (new, bias))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _lower_embedding(graph: fx.GraphModule, node: fx.Node, levels: fx.Node, scale: fx.Node, *, by_row: bool) -> None:
    """Look up levels and scales of rows, so that the table stays as it is."""
    with graph.graph.inserting_before(node):
        rows = graph.graph.call_function(aten.embedding.default, (levels, node.args[1]))
        scales = scale
        if by_row:
            column = graph.graph.call_function(aten.unsqueeze.default, (scale, 1))
            scales = graph.graph.call_function(aten.embedding.default, (column, node.args[1]))
        product = graph.graph.call_function(aten.mul.Tensor, (graph.graph.call_function(aten.to.dtype, (rows, torch.float32)), scales))
    node.replace_all_uses_with(product)
    graph.graph.erase_node(node)


def _lower_activation(graph: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer) -> None:
    grid = quantizer.grid
    low, high, given = grid.scheme.qmin, grid.scheme.qmax, node.args[0]
    while operator_name(given) in CLAMPS and len(given.users) == 1:  # type: ignore[arg-type, union-attr]
        least, most = _limits(given)  # type: ignore[arg-type]
        low, high = max(low, _level(least, grid)), min(high, _level(most, grid))
        given = given.args[0]  # type: ignore[union-attr]
    if _has_float_weight(given):  # type: ignore[arg-type]
        given = _hide(given)  # type: ignore[arg-type]
    _replace(graph, node, ROUND, (given, float(grid.scale), int(grid.zero_point), low, high))


def _has_float_weight(node: fx.Node) -> bool:
    read = node.args[1] if operator_name(node) in CONVOLUTIONS else None
    return isinstance(read, fx.Node) and read.op == "get_attr"


def _hide(node: fx.Node) -> fx.Node:
    """The same values by way of two negations: between two grids ONNX Runtime would round a float weight to eight bits unasked."""
    with node.graph.inserting_after(node):
        once = node.graph.call_function(aten.neg.default, (node,))
    with node.graph.inserting_after(once):
        return node.graph.call_function(aten.neg.default, (once,))


def _level(value: float, grid: Grid) -> int:
    if math.isinf(value):
        return grid.scheme.qmin if value < 0 else grid.scheme.qmax
    return int(quantize(torch.tensor(value), grid))


def _limits(node: fx.Node) -> tuple[float, float]:
    """The values between which a clamp keeps its result."""
    name, numbers = operator_name(node), node.args[1:]
    given = {**dict(zip({"hardtanh": ("min_val", "max_val")}.get(name, ("min", "max")), numbers, strict=False)), **node.kwargs}
    least = {"relu": 0.0, "relu6": 0.0, "hardtanh": given.get("min_val", -1.0)}.get(name, given.get("min"))
    most = {"relu": None, "relu6": 6.0, "hardtanh": given.get("max_val", 1.0)}.get(name, given.get("max"))
    return (-math.inf if least is None else float(least)), (math.inf if most is None else float(most))  # type: ignore[arg-type]


def _lower_bias(graph: fx.GraphModule, node: fx.Node, quantizer: BiasQuantizer) -> None:
    weight, activation = quantizer.factors
    name, scale = str(node.args[0].target), bias_scale(weight.grid, activation.grid)  # type: ignore[union-attr]
    levels = _store(graph, node, f"{name}_levels", quantize_bias(tensor(graph, name).detach(), scale))
    _replace(graph, node, DEQUANTIZE, (levels, _store(graph, node, f"{name}_scale", scale), 0, 0))


_LOWERINGS: dict[type, Callable[[fx.GraphModule, fx.Node, Any], None]] = {
    WeightQuantizer: _lower_weight,
    ActivationQuantizer: _lower_activation,
    BiasQuantizer: _lower_bias,
}


def _replace(graph: fx.GraphModule, node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(target, args)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


def _store(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    owner, _, last = name.rpartition(".")
    graph.get_submodule(owner).register_buffer(last, value.detach().clone())
    with graph.graph.inserting_before(before):
        return graph.graph.create_node("get_attr", name)


def _repeat_rounding(node: fx.Node) -> None:
    """Behind an operator that moves values from a grid, say so once more."""
    made = _grid_behind(node)
    if made is None or any(user.target is ROUND for user in node.users):
        return
    with node.graph.inserting_after(node):
        new = node.graph.call_function(ROUND, (node, *made[:2], 0, 255))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _grid_behind(node: fx.Node) -> tuple[Any, ...] | None:
    """Scale and zero point of the values that an operator moves, if they all come from one grid."""
    if moves(node) and operator_name(node) not in ("split", "split_with_sizes", "chunk", "unbind"):
        given: list[Any] = [node.args[0]]
    elif is_getitem(node) and moves(node.args[0]):  # type: ignore[arg-type]
        given = [node.args[0].args[0]]  # type: ignore[union-attr]
    elif operator_name(node) == "cat":
        given = list(node.args[0])  # type: ignore[arg-type]
    else:
        return None
    grids = {g.args[1:3] if g.target is ROUND else None for g in given}
    return grids.pop() if len(grids) == 1 else None
