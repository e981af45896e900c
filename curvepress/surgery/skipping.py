"""Leaving residual branches out of a model's graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from ..plan import Plan, dropped
from ..tracing.branches import Found, History, Step, find
from ..tracing.graphs import graph_tensors
from ..tracing.operators import name_of

Shapes = Mapping[fx.Node, tuple[int, ...]]


def leave_out(graph: fx.GraphModule, plan: Plan, shapes: Shapes) -> None:
    """Let every sum with a branch that the plan skips be its other addend, and forget what nothing uses any more.

    Args:
        shapes: of the tensor that a node makes.
    """
    if not plan.skip:
        return
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    branches = {f.branch.name: f for f in _branches(graph, nodes, shapes)}
    if unknown := [name for name in plan.skip if name not in branches]:
        raise ValueError(f"the branch {unknown[0]!r} is not found in the model's exported graph, so it cannot be left out; leave it in")
    for name in plan.skip:
        _leave(nodes[branches[name].step], 1 - branches[name].addend)
    _erase_unused(graph.graph)
    for name in dropped(plan) & graph_tensors(graph).keys():
        owner, _, own = name.rpartition(".")
        delattr(graph.get_submodule(owner), own)
    graph.delete_all_unused_submodules()


def _branches(graph: fx.GraphModule, nodes: list[fx.Node], shapes: Shapes) -> list[Found]:
    tensors, history = graph_tensors(graph), History()
    first = {id(t): name for name, t in reversed(tensors.items())}
    number = {n: k for k, n in enumerate(graph.graph.nodes)}
    for node in nodes:
        own = {n for n in node.all_input_nodes if n.op == "get_attr"}
        reads = tuple(number[n] for n in node.all_input_nodes if n not in own)
        history.steps.append(Step(reads, (number[node],), reads if _plain_sum(node, shapes) else ()))
        history.used.append({first[id(tensors[str(n.target)])] for n in own if str(n.target) in tensors})
    weights = {name for name, t in tensors.items() if isinstance(t, nn.Parameter) and t.ndim > 1}
    (output,) = graph.graph.find_nodes(op="output")
    names = list(dict.fromkeys(first[id(t)] for t in tensors.values()))
    return find(history, names, weights, {number[n] for n in output.all_input_nodes})


def _plain_sum(node: fx.Node, shapes: Shapes) -> bool:
    addends = [a for a in node.args if isinstance(a, fx.Node)]
    plain = hasattr(node.target, "_schema") and name_of(node.target) == "add" and not node.kwargs and len(addends) == 2
    return plain and len({shapes.get(n) for n in (node, *addends)}) == 1


def _leave(total: fx.Node, addend: int) -> None:
    """Put one addend in the place of the sum: a copy of it where what follows writes in its place, and rectified once, not twice."""
    left = total.args[addend]
    assert isinstance(left, fx.Node)
    if _rectifies(left):
        for user in [u for u in total.users if _rectifies(u)]:
            user.replace_all_uses_with(left)
            total.graph.erase_node(user)
    if any(_writes(user) for user in total.users):
        with total.graph.inserting_before(total):
            left = total.graph.call_function(torch.ops.aten.clone.default, (left,))
    total.replace_all_uses_with(left)


def _rectifies(node: fx.Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema") and name_of(node.target) == "relu"


def _writes(node: fx.Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "_schema") and node.target._schema.is_mutable


def _erase_unused(graph: fx.Graph) -> None:
    """Also what writes in place, where nothing else reads what it writes to."""
    for node in reversed(list(graph.nodes)):
        idle = not node.users and node.op not in ("placeholder", "output")
        if idle and not (_writes(node) and isinstance(node.args[0], fx.Node) and len(node.args[0].users) > 1):
            graph.erase_node(node)
