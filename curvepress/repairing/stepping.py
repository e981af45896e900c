"""A model run one operator after the other on all calibration batches at once, and the products by its weights on the way.

Values live from the operator that makes them to the last one that reads them, so memory is that of the widest place of the model for
all examples at once, not that of all its activations, and time is that of one forward pass, however many products are looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..objective import Batch, arguments
from ..quantization.quantized.graphs import argument, tensor
from ..quantization.quantized.placement import operator_name
from ..tracing.graphs import export_graph, placeholder_values

CONVOLUTIONS = ("conv1d", "conv2d")
MATRICES = {
    "linear": ("input", "weight", False),
    "addmm": ("mat1", "mat2", True),
    "matmul": ("self", "other", True),
    "mm": ("self", "mat2", True),
}
"""Products by a matrix: what is read, the weight, and whether outputs are the weight's columns."""
PASSING = ("dropout", "clone", "contiguous", "alias", "detach")
"""Operators that hand on what they read, dropout only while not training."""
COLUMNS = 1 << 23
"""Elements of unfolded inputs that are at hand at once."""


@dataclass(frozen=True)
class Product:
    """An operator that multiplies what it reads by the parameter ``name``; ``bias`` is that of the parameter it adds, or ``""``."""

    name: str
    node: fx.Node
    reads: fx.Node
    bias: str = ""
    by_columns: bool = False
    groups: int = 1

    @property
    def axis(self) -> int:
        """The dimension of the weight that counts outputs."""
        return int(self.by_columns)

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution, whose outputs are along dimension 1, or a product by a matrix, where they are along the last."""
        return operator_name(self.node) in CONVOLUTIONS


def graph_of(model: nn.Module, batch: Batch) -> fx.GraphModule:
    """The model as a graph over its own tensors, for inputs like those of a batch.

    Raises:
        ValueError: if ``torch.export`` cannot follow the model.
    """
    positional, named = arguments(batch[0])
    return export_graph(model, (*positional, *([named] if named else []))).eval()


def products(graph: fx.GraphModule) -> tuple[dict[str, Product], dict[str, str]]:
    """Products by parameters in the order of the graph, by the parameter's name; and parameters of others, with the reason."""
    found: dict[str, Product] = {}
    left: dict[str, str] = {}
    readers = _readers(graph)
    for node in graph.graph.nodes:
        for weight in _weights(node):
            name = str(weight.target)
            if readers[id(tensor(graph, name))] > 1:
                left[name] = "several operators read it"
            elif (product := _product(graph, node, weight)) is None:
                left[name] = f"no rule for {operator_name(node)} in this form"
            else:
                found[name] = product
    return found, left


def _readers(graph: fx.GraphModule) -> dict[int, int]:
    count: dict[int, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(value := _attribute(graph, str(node.target)), Tensor):
            count[id(value)] = count.get(id(value), 0) + len(node.users)
    return count


def _attribute(graph: fx.GraphModule, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(graph.get_submodule(owner), last, None)


def _weights(node: fx.Node) -> list[fx.Node]:
    """Parameters of two or more dimensions that an operator may multiply by."""
    if not any(part in operator_name(node) for part in ("conv", *MATRICES, "bmm", "einsum")):
        return []
    return [a for a in node.all_input_nodes if a.op == "get_attr" and getattr(a.meta.get("val"), "ndim", 2) > 1]


def _product(graph: fx.GraphModule, node: fx.Node, weight: fx.Node) -> Product | None:
    name, parameter = operator_name(node), str(weight.target)
    if name in CONVOLUTIONS and argument(node, "weight") is weight:
        return Product(parameter, node, argument(node, "input"), _name(argument(node, "bias")), False, argument(node, "groups"))
    if name not in MATRICES or tensor(graph, parameter).ndim != 2:
        return None
    reads, held, by_columns = MATRICES[name]
    if argument(node, held) is not weight or not isinstance(argument(node, reads), fx.Node):
        return None
    if name == "addmm" and (argument(node, "beta"), argument(node, "alpha")) != (1, 1):
        return None
    bias = argument(node, "bias") if name == "linear" else argument(node, "self") if name == "addmm" else None
    return Product(parameter, node, argument(node, reads), _name(bias), by_columns)


def _name(node: Any) -> str:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def inputs_of(product: Product, x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of a batch, each with what its outputs are products of: ``[groups, inputs, rows]``, by examples and then positions."""
    if not product.convolution:
        yield slice(None), x.reshape(1, -1, x.shape[-1]).mT
        return
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_spread(argument(product.node, n), kernel) for n in ("stride", "dilation"))
    x = F.pad(x, _padding(argument(product.node, "padding"), kernel, dilation))
    if x.ndim == 3:
        x, kernel, stride, dilation = x.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    step = max(1, COLUMNS // (x[0].numel() * prod(kernel)))
    for start in range(0, len(x), step):
        columns = F.unfold(x[start : start + step], kernel, dilation, 0, stride)
        rows = columns.reshape(len(columns), product.groups, -1, columns.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        yield slice(start, start + step), rows


def outputs_of(product: Product, y: Tensor) -> Tensor:
    """A product's outputs as ``[groups, outputs, rows]``, by examples and then positions."""
    if not product.convolution:
        return y.reshape(1, -1, y.shape[-1]).mT
    return y.reshape(len(y), product.groups, y.shape[1] // product.groups, -1).permute(1, 2, 0, 3).flatten(2)


def _spread(sizes: Sequence[int] | int, kernel: Sequence[int]) -> tuple[int, ...]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return given * len(kernel) if len(given) == 1 else given


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """As ``F.pad`` wants it: the last dimension first, before and after."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [n for total in reversed(whole) for n in (total // 2, total - total // 2)]
    return [n for p in reversed(_spread(padding, kernel)) for n in (p, p)]


class Stepped:
    """A graph run on several batches in step.  A value is there from its operator to the last operator that reads it."""

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Batch]) -> None:
        self.graph, self.nodes = graph, list(graph.graph.nodes)
        self.position, self.executed = 0, False
        self.runs = [fx.Interpreter(graph) for _ in batches]
        for run, batch in zip(self.runs, batches, strict=True):
            positional, named = arguments(batch[0])
            run.args_iter = iter(placeholder_values(graph, (*positional, *([named] if named else []))))
        self.done: set[fx.Node] = set()

    def before(self, node: fx.Node) -> None:
        """Go on until it is this operator's turn."""
        while self.nodes[self.position] is not node:
            if not self.executed:
                self.execute()
            self._advance()

    def execute(self) -> None:
        """Compute what the present operator makes; may be repeated."""
        node = self.nodes[self.position]
        with torch.no_grad():
            for run in self.runs:
                run.env[node] = run.run_node(node)
        self.executed = True

    def _advance(self) -> None:
        """Go on to the next operator; what the present one was the last to read is dropped."""
        node = self.nodes[self.position]
        for run in self.runs:
            for last in run.user_to_last_uses.get(node, []):
                del run.env[last]
        self.done.add(node)
        self.position, self.executed = self.position + 1, False

    def value(self, node: fx.Node, batch: int) -> Any:
        """What an operator made of a batch, if that is still to be read."""
        return self.runs[batch].env[node]


def live_bytes(graph: fx.GraphModule, batch: Batch) -> int:
    """The most bytes that activations take at once while a batch runs, its inputs included."""
    stepped, most = Stepped(graph, [batch]), 0
    own = {t.untyped_storage().data_ptr() for t in (*graph.parameters(), *graph.buffers())}
    for node in stepped.nodes[1:]:
        if not stepped.executed:
            stepped.execute()
        values = [t for t in torch.utils._pytree.tree_leaves(dict(stepped.runs[0].env)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in values}
        most = max(most, sum(size for place, size in storages.items() if place not in own))
        stepped.before(node)
    return most


def grams(model: nn.Module, batches: Sequence[Batch], names: Collection[str] = ()) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For every product by a parameter (or those named), in order: the name, the weight, the Gram matrix of what it is multiplied with.

    Gram matrices are ``[groups, inputs, inputs]`` in float64, summed over examples and positions.  One pass over the model.

    Raises:
        ValueError: if ``torch.export`` cannot follow the model.
    """
    graph = graph_of(model, batches[0])
    stepped = Stepped(graph, batches)
    for name, product in products(graph)[0].items():
        if names and name not in names:
            continue
        stepped.before(product.node)
        weight = tensor(graph, name)
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for n in range(len(batches)):
            for _, rows in inputs_of(product, stepped.value(product.reads, n), weight):
                total = total + (rows @ rows.mT).double()
        yield name, weight, total


def chain(product: Product, done: Collection[fx.Node]) -> tuple[fx.Node | None, fx.Node | None]:
    """What else joins a product's outputs before anything else reads them: a batch normalisation, and the other side of a sum.

    The other side counts only if it is made before the product; ``done`` are the operators that have run.
    """
    node, norm = product.node, None
    while len(node.users) == 1:
        (user,) = node.users
        name = operator_name(user)
        if name == "batch_norm" and norm is None and user.args[0] is node and not argument(user, "training"):
            norm = user
        elif name == "add" and argument(user, "alpha") == 1:
            others = [a for a in (user.args[0], user.args[1]) if a is not node]
            other = others[0] if len(others) == 1 and isinstance(others[0], fx.Node) and others[0].op != "get_attr" else None
            return norm, other if other in done else None
        elif name not in PASSING or (name == "dropout" and argument(user, "train")):
            break
        node = user
    return norm, None
