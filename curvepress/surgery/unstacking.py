"""A box ``[3, heads, width]`` of queries, keys and values that is only taken apart again, written as ranges of what it was made of.

As a box its parts are equally wide; as ranges each has a width of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ..tracing.operators import bound, name_of
from ..tracing.operators.observing import SPLITTING, Split, first_split, moved

Shapes = Mapping[fx.Node, tuple[int, ...]]


@dataclass(frozen=True)
class Taken:
    """A node that is piece ``index`` of a stack, dimension ``at`` of what the nodes of ``path`` make of it."""

    path: tuple[fx.Node, ...]
    at: int
    index: int
    node: fx.Node


class _Mixed(Exception):
    """Something reads the stack as a whole."""


def unstack(graph: fx.GraphModule, shapes: Shapes) -> None:
    """Rewrite every stack of the graph whose pieces alone are read; it computes what it did.

    Args:
        shapes: of what the nodes make for one example.
    """
    splits = {node: split for node in graph.graph.nodes if (split := _split(node, shapes))}
    for node, split in splits.items():
        try:
            taken = list(_taken(node, split.at, (), shapes))
        except _Mixed:
            continue
        for piece in taken:
            _rewrite(graph.graph, node, split, piece)
        _prune(graph.graph, {node, *(n for t in taken for n in (*t.path, t.node, *t.node.all_input_nodes))})


def _name(node: fx.Node) -> str:
    return name_of(node.target) if node.op == "call_function" and hasattr(node.target, "_schema") else ""


def _split(node: fx.Node, shapes: Shapes) -> Split | None:
    """How the node splits a dimension of a size that is the same for all examples."""
    if _name(node) not in (*SPLITTING, "unflatten"):
        return None
    source = node.args[0]
    split = first_split(shapes[source], shapes[node])  # type: ignore[index]
    known = source.meta.get("val")  # type: ignore[union-attr]
    return split if split and known is not None and isinstance(known.shape[split.dim], int) else None


def _taken(node: fx.Node, at: int, path: tuple[fx.Node, ...], shapes: Shapes) -> Iterator[Taken]:
    """Every piece that is read of the stack ``node``."""
    rank, count = len(shapes[node]), shapes[node][at]
    for user in node.users:
        name = _name(user)
        a = bound(user.target, user.args, user.kwargs) if name else {}
        if name and (now := moved({**a, "name": name}, shapes[node], at)) is not None:
            yield from _taken(user, now, (*path, user), shapes)
        elif name == "select" and a["dim"] % rank == at and isinstance(a["index"], int):
            yield Taken(path, at, a["index"] % count, user)
        elif name == "unbind" and a["dim"] % rank == at and all(u.target is operator.getitem for u in user.users):
            yield from (Taken(path, at, int(u.args[1]) % count, u) for u in user.users)  # type: ignore[arg-type]
        else:
            raise _Mixed


def _rewrite(graph: fx.Graph, node: fx.Node, split: Split, piece: Taken) -> None:
    aten, source = torch.ops.aten, node.args[0]
    size = split.size
    a = bound(node.target, node.args, node.kwargs)
    flat = _name(node) == "unflatten"
    sizes = list(a["sizes"] if flat else a["size"] if "size" in a else a["shape"])
    sizes[split.at - split.dim if flat else split.at] = 1
    with graph.inserting_before(piece.node):
        made = graph.call_function(aten.slice.Tensor, (source, split.dim, piece.index * size, (piece.index + 1) * size, 1))
        made = graph.call_function(*(aten.unflatten.int, (made, split.dim, sizes)) if flat else (aten.reshape.default, (made, sizes)))
        for move in piece.path:
            made = graph.call_function(move.target, (made, *move.args[1:]), dict(move.kwargs))  # type: ignore[arg-type]
        made = graph.call_function(aten.select.int, (made, piece.at, 0))
    piece.node.replace_all_uses_with(made)


def _prune(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in nodes and not node.users:
            graph.erase_node(node)
