"""Where quantizers go on a graph: one for each tensor that products or residual sums read, shared by whatever only moves its values."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from .graphs import Values, argument, is_getitem
from .layout import Layout, Product, Role, Site, Weight

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
MATRIX = ("matmul", "mm", "bmm")
TURNS = ("t", "transpose", "permute")
MOVES = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "repeat", "repeat_interleave"),
    *(
        "permute",
        "transpose",
        "t",
        "mT",
        "numpy_T",
        "swapaxes",
        "swapdims",
        "movedim",
        "flip",
        "roll",
        "channel_shuffle",
        "pixel_shuffle",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "dropout",
    ),
    *("slice", "select", "narrow", "index_select", "split", "split_with_sizes", "chunk", "unbind", "pad", "constant_pad_nd"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "upsample_nearest2d"),
}
"""Operators whose results hold values of their first input and zeros only."""
CLAMPS = frozenset(["relu", "relu6", "hardtanh", "clamp", "clamp_min"])
"""Operators that runtimes fold into the rounding of what they return."""


@dataclass(frozen=True)
class Operand:
    """How a product reads its tensors: ``weight`` is a ``get_attr`` node and ``axis`` its dimension of output channels."""

    node: fx.Node
    activations: tuple[fx.Node, ...]
    weight: fx.Node | None
    axis: int
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """A site in the graph: ``roots`` are the nodes whose results are quantized, ``reads`` the product inputs behind a ``.read`` site."""

    site: Site
    roots: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Placement:
    """The layout and, for each of its names, the nodes it stands for."""

    layout: Layout
    operands: Mapping[str, Operand]
    places: tuple[Place, ...]


def operator_name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; empty for what is no ATen operator."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema.name.removeprefix("aten::").rstrip("_") if schema is not None and schema.name.startswith("aten::") else ""


def source(node: fx.Node) -> fx.Node:
    """The node whose values this one only moves."""
    while moves(node) or (is_getitem(node) and moves(node.args[0])):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return node


def moves(node: fx.Node) -> bool:
    """Whether the results of a node hold values of its first input, and zeros, only."""
    name = operator_name(node)
    if name in ("pad", "constant_pad_nd"):
        return (name != "pad" or argument(node, "mode") == "constant") and not argument(node, "value")
    return name in MOVES


def place(graph: fx.GraphModule, values: Values) -> Placement:
    """All weights, sites and products of a graph from :func:`graphs.float_graph`."""
    return _Placing(graph, values).result()


class _Placing:
    def __init__(self, graph: fx.GraphModule, values: Values) -> None:
        self.graph, self.values = graph.graph, values
        self.batch = _batch(graph, values)
        self.names = _names(self.graph)
        self.operands = {self.names[o.node]: o for n in self.graph.nodes if (o := self._operand(n)) is not None}
        self.leader: dict[fx.Node, fx.Node] = {}  # of the nodes that share a grid, the first; union-find
        self.marked: set[fx.Node] = set()
        self.weights_at: dict[fx.Node, list[str]] = defaultdict(list)

    def result(self) -> Placement:
        for operand in self.operands.values():
            self._mark_product(operand)
        summed = [node for node in self.graph.nodes if self._mark_sum(node)]
        places = tuple(self._places(summed))
        weights = tuple(self._weights())
        unread = {name: o.reason for name, o in self.operands.items() if o.reason}
        products = tuple(self._products(places))
        return Placement(Layout(weights, tuple(p.site for p in places), products, unread), self.operands, places)

    def _operand(self, node: fx.Node) -> Operand | None:
        name = operator_name(node)
        if name in (*CONVOLUTIONS, *TRANSPOSED, "linear"):
            return self._with_weight(node, node.args[0], node.args[1], 1 if name in TRANSPOSED else 0)
        if name == "embedding":
            return self._with_weight(node, None, node.args[0], 0)
        if name == "addmm":
            return self._with_weight(node, node.args[1], node.args[2], 1)
        if name in MATRIX and self._floating(node):
            return self._with_weight(node, node.args[0], node.args[1], -1)
        return None

    def _with_weight(self, node: fx.Node, read: Any, weight: Any, axis: int) -> Operand:
        """The operand of a product by a weight, or, where the weight is computed, of a product of two activations."""
        parameter, turned = weight, False
        while operator_name(parameter) in (*TURNS, "detach", "alias"):
            turned ^= operator_name(parameter) in TURNS
            parameter = parameter.args[0]
        reads = () if read is None else (read,)
        if parameter.op == "get_attr":
            dims = self.values[parameter].dim()
            if turned and dims != 2:
                return Operand(node, reads, None, 0, "its weight is turned in more than two dimensions")
            return Operand(node, reads, parameter, 1 - axis % dims if turned else axis % dims)
        if read is None or operator_name(node) not in MATRIX:
            return Operand(node, (), None, 0, "its weight is computed, not stored")
        return Operand(node, (*reads, weight), None, 0)

    def _floating(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and isinstance(v := self.values.get(node), torch.Tensor) and v.is_floating_point()

    def _mark_product(self, operand: Operand) -> None:
        for read in operand.activations:
            self._mark(read)
        if operand.weight is not None:
            made = self._after_clamps(operand.node)
            if operator_name(operand.node) != "embedding" and not _ends(made):
                self._mark(made)
            for tensor in (*operand.activations, made):
                for root in self._roots(tensor):
                    self.weights_at[root].append(str(operand.weight.target))

    def _mark_sum(self, node: fx.Node) -> bool:
        """Mark both inputs and the result of a residual sum: one of the inputs is on a grid already, and neither is a constant."""
        terms: tuple[Any, ...] = node.args[:2] if operator_name(node) == "add" else ()
        if len(terms) != 2 or not all(self._floating(t) for t in terms) or argument(node, "alpha") != 1:
            return False
        roots = [root for t in terms for root in self._roots(t)]
        if any(r.op == "get_attr" for r in roots) or not any(r in self.marked for r in roots):
            return False
        for tensor in (*terms, self._after_clamps(node)):
            if not _ends(tensor):
                self._mark(tensor)
        return True

    def _after_clamps(self, node: fx.Node) -> fx.Node:
        while len(node.users) == 1 and operator_name(user := next(iter(node.users))) in CLAMPS:
            node = user
        return node

    def _roots(self, tensor: fx.Node) -> list[fx.Node]:
        """The nodes that made the values of a tensor: one, or one for each part of a concatenation."""
        root = source(tensor)
        if operator_name(root) == "cat":
            parts: Any = root.args[0]
            return [r for part in parts for r in self._roots(part)]
        return [root]

    def _mark(self, tensor: fx.Node) -> None:
        roots = self._roots(tensor)
        self.marked.update(roots)
        for root in roots:
            first, second = self._lead(roots[0]), self._lead(root)
            if first is not second:
                self.leader[second] = first

    def _lead(self, node: fx.Node) -> fx.Node:
        while node in self.leader:
            node = self.leader[node]
        return node

    def _places(self, summed: list[fx.Node]) -> Iterator[Place]:
        sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            if node in self.marked:
                sharing[self._lead(node)].append(node)
        read, macs = self._readers()
        for lead, roots in sharing.items():
            reads, products = tuple(read[lead]), sum(macs[lead])
            both = bool(reads) and self._read_by_sums(roots)
            role: Role = "product" if reads and not both else "sum"
            yield Place(self._site(roots, role, 0 if both else products), tuple(roots))
            if both:
                yield Place(self._site(roots, "product", products, ".read"), tuple(roots), reads)

    def _readers(self) -> tuple[dict[fx.Node, list[fx.Node]], dict[fx.Node, list[int]]]:
        """For the leading node of each grid: the tensors that products read, and the multiply-accumulates of those products."""
        read: dict[fx.Node, dict[fx.Node, None]] = defaultdict(dict)
        macs: dict[fx.Node, list[int]] = defaultdict(list)
        for operand in self.operands.values():
            for lead in dict.fromkeys(self._lead(r) for t in operand.activations for r in self._roots(t)):
                macs[lead].append(self._macs(operand))
            for tensor in operand.activations:
                read[self._lead(self._roots(tensor)[0])][tensor] = None
        return defaultdict(list, {k: list(v) for k, v in read.items()}), macs

    def _read_by_sums(self, roots: list[fx.Node]) -> bool:
        """Whether anything but products reads these values."""
        products = {o.node for o in self.operands.values()}
        waiting = list(roots)
        while waiting:
            node = waiting.pop()
            for user in node.users:
                if moves(user) or is_getitem(user) or operator_name(user) == "cat":
                    waiting.append(user)
                elif user not in products:
                    return True
        return False

    def _site(self, roots: list[fx.Node], role: Role, macs: int, suffix: str = "") -> Site:
        shape = tuple(self.values[roots[0]].shape)
        size = sum(prod(self.values[r].shape) for r in roots) // self.batch
        weights = dict.fromkeys(w for r in roots for w in self.weights_at[r])
        return Site(self.names[roots[0]] + suffix, role, shape[1:], size, macs, tuple(weights))

    def _weights(self) -> Iterator[Weight]:
        found: dict[str, list[Operand]] = defaultdict(list)
        for operand in self.operands.values():
            if operand.weight is not None:
                found[str(operand.weight.target)].append(operand)
        for name, readers in found.items():
            shape = tuple(self.values[readers[0].weight].shape)  # type: ignore[index]
            yield Weight(name, shape, readers[0].axis, sum(map(self._macs, readers)))

    def _products(self, places: tuple[Place, ...]) -> Iterator[Product]:
        named: dict[fx.Node, str] = {}
        for p in places:  # a ``.read`` site comes after its tensor and takes its place
            named.update(dict.fromkeys(p.roots, p.site.name))
        for name, o in self.operands.items():
            inputs = dict.fromkeys(named[r] for t in o.activations for r in self._roots(t))
            yield Product(name, operator_name(o.node), str(o.weight.target) if o.weight else None, tuple(inputs), self._macs(o))

    def _macs(self, operand: Operand) -> int:
        """Multiply-accumulates per example."""
        name, node = operator_name(operand.node), operand.node
        reads: tuple[Any, ...] = node.args
        if name == "embedding":
            return 0
        if name in TRANSPOSED:
            return prod(self.values[reads[0]].shape) * prod(self.values[reads[1]].shape[1:]) // self.batch
        if name in (*CONVOLUTIONS, "linear"):
            return prod(self.values[node].shape) * prod(self.values[reads[1]].shape[1:]) // self.batch
        return prod(self.values[node].shape) * self.values[operand.activations[0]].shape[-1] // self.batch


def _ends(node: fx.Node) -> bool:
    """Whether nothing but the model's output reads a tensor, in any shape."""
    return all(user.op == "output" or (moves(user) and _ends(user)) for user in node.users)


def _batch(graph: fx.GraphModule, values: Values) -> int:
    first = next(values[n] for n in graph.graph.nodes if n.op == "placeholder" and isinstance(values.get(n), torch.Tensor))
    return max(1, len(first))


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A name for every node: its module's, where that computes one operator only, otherwise with the operator; numbered if needed."""
    nodes = [n for n in graph.nodes if n.op in ("placeholder", "call_function")]
    alone = Counter(_module(n) for n in nodes if not is_getitem(n))
    names: dict[fx.Node, str] = {}
    taken: Counter[str] = Counter()
    for node in nodes:
        path, kind = _module(node), operator_name(node) or node.name
        name = node.name if node.op == "placeholder" else path if path and alone[path] == 1 else f"{path}.{kind}".removeprefix(".")
        names[node] = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1
    return names


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]).removeprefix("L['self']").removeprefix(".") if stack else ""
