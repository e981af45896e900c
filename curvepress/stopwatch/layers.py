"""The layers of a model as a latency table sees them: how each weight of its exported graph is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..latency import Layer
from ..tracing.graphs import export_graph

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def layers_of(model: nn.Module, *example: Any) -> dict[str, Layer]:
    """Convolutions and linear layers by the name of their weight, in the order of their use, each once.

    Left out are what a table cannot follow over widths: groups of several inputs each, transposed convolutions, weights made in the
    forward pass.  They count to what the model takes besides.

    Raises:
        ValueError: if ``torch.export`` cannot follow the model, or it has no such layer.
    """
    found: dict[str, Layer] = {}
    for name, layer in _used(export_graph(model, example), dict(model.named_parameters())):
        found.setdefault(name, layer)
    if not found:
        raise ValueError("no convolution and no linear layer of this model can be timed; limit its params or macs instead of its latency")
    return found


def _used(graph: fx.GraphModule, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Layer]]:
    for node in graph.graph.nodes:
        weight = node.args[1] if len(node.args) > 1 else None
        if node.op != "call_function" or not isinstance(weight, fx.Node) or weight.target not in parameters:
            continue
        shape = tuple(node.args[0].meta["val"].shape) if "val" in node.args[0].meta else ()
        layer = _layer(node, shape, tuple(parameters[str(weight.target)].shape))
        if layer is not None:
            yield str(weight.target), layer


def _layer(node: fx.Node, shape: tuple[Any, ...], weight: tuple[int, ...]) -> Layer | None:
    bias = True  # norms are folded into one by most runtimes
    if node.target in CONVOLUTIONS:
        rank = len(weight) - 2
        stride, padding, dilation = (_numbers(node, n, default, rank) for n, default in ((3, 1), (4, 0), (5, 1)))
        groups: Any = node.args[6] if len(node.args) > 6 else 1
        if groups != 1 and weight[1] != 1:
            return None
        size = tuple(map(int, shape[2:]))
        return Layer("conv", size, weight[2:], stride, padding, dilation, groups != 1, bias)
    if node.target is aten.linear.default:
        return Layer("linear", tuple(map(int, shape[1:-1])), bias=bias)
    return None


def _numbers(node: fx.Node, position: int, default: int, rank: int) -> tuple[int, ...]:
    given: Any = node.args[position] if len(node.args) > position else default
    numbers = tuple(given) if isinstance(given, list | tuple) else (given,)
    return numbers * rank if len(numbers) == 1 else numbers
