"""A smaller model from the exported graph, for models whose own code holds constants.

The graph is run once under the label algebra, so that every dimension of every node is known to be cut or not; then every
constant that repeats a width (a view, a pad, a split, a number of groups) is written anew.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..plan import Plan, edits
from ..tracing.algebra import Labels
from ..tracing.graphs import export_graph, graph_tensors, placeholder_values
from ..tracing.labelling import Dim, Dims, blank, lost_rows
from ..tracing.watching import Trace, atoms_lost, watch
from .skipping import leave_out
from .unstacking import unstack

Seen = dict[fx.Node, Any]


def rewrite(model: nn.Module, plan: Plan, example: tuple[Any, ...]) -> fx.GraphModule:
    """The plan applied to the model's exported graph: a module that trains and evaluates like the original.

    Raises:
        ValueError: if the model cannot be exported or its graph has another structure than the plan.
    """
    graph = export_graph(model, example)
    unstack(graph, _shapes(graph, example))
    trace, seen = _observe(graph, example)
    cut = _Cut(trace, atoms_lost(trace, plan, graph_tensors(graph)))
    for node in graph.graph.nodes:
        if node.op == "call_function" and (rewriter := REWRITERS.get(_name(node))):
            rewriter(cut, node, seen)
    _slice(graph, plan)
    leave_out(graph, plan, {node: tuple(map(len, dims)) for node, dims in seen.items() if _is_tensor(dims)})
    _switch_with_mode(graph)
    graph.graph.lint()
    graph.recompile()
    graph.train(model.training)
    return graph


class _Recorder(fx.Interpreter):
    """Runs a graph and hands every node's result to ``see``."""

    def __init__(self, graph: fx.GraphModule, see: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(graph)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.see(n, result)
        return result


def _observe(graph: fx.GraphModule, example: tuple[Any, ...]) -> tuple[Trace, Seen]:
    results: Seen = {}
    trace = watch(graph, lambda: _Recorder(graph, results.__setitem__).run(*placeholder_values(graph, example)), example)

    def decided(tensor: Tensor) -> Dims:
        dims = next(iter(trace.ledger.forms(tensor)), blank(tensor.shape))
        return [dim if len(dim) == n else blank([n])[0] for dim, n in zip(dims, tensor.shape, strict=True)]

    dims = {node: torch.utils._pytree.tree_map_only(Tensor, decided, result) for node, result in results.items()}
    return trace, dims


def _shapes(graph: fx.GraphModule, example: tuple[Any, ...]) -> dict[fx.Node, tuple[int, ...]]:
    """Of every node that makes one tensor its shape on the example."""
    results: Seen = {}
    with torch.no_grad():
        _Recorder(graph, results.__setitem__).run(*placeholder_values(graph, example))
    return {node: tuple(result.shape) for node, result in results.items() if isinstance(result, Tensor)}


def _is_tensor(seen: Any) -> bool:
    return isinstance(seen, (list, tuple)) and all(isinstance(d, Dim) for d in seen)


class _Cut:
    """What is left of dimensions once the atoms ``gone`` are gone."""

    def __init__(self, trace: Trace, gone: np.ndarray) -> None:
        self.atoms, self.gone = trace.ledger.atoms, gone

    def left(self, labels: Labels) -> int:
        """How many indices stay."""
        return int((~lost_rows(self.atoms, labels, self.gone)).sum())

    def size(self, dim: Dim) -> int:
        return self.left(dim.labels)

    def changed(self, dim: Dim) -> bool:
        return self.size(dim) != len(dim)

    def groups(self, dim: Dim, groups: int) -> int:
        """How many of equally wide groups stay of a dimension."""
        return self.left(self.atoms.factor(dim.labels, (groups, len(dim) // groups))[0])


Rewriter = Callable[[_Cut, fx.Node, Seen], None]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::").rstrip("_") if schema is not None else ""


def _parameter(node: fx.Node, position: int) -> Any:
    return node.target._schema.arguments[position]  # type: ignore[union-attr]


def _get(node: fx.Node, position: int) -> Any:
    """An argument of the node's operator, by its place in the schema."""
    if len(node.args) > position:
        return node.args[position]
    parameter = _parameter(node, position)
    return node.kwargs.get(parameter.name, parameter.default_value)


def _set(node: fx.Node, position: int, value: Any) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(_parameter(node, position).name, value)


def _sizes_at(position: int) -> Rewriter:
    """view, reshape, expand, new tensors: every size that is cut."""

    def rewriter(cut: _Cut, node: fx.Node, seen: Seen) -> None:
        pairs = list(zip(_get(node, position), seen[node], strict=True))
        _set(node, position, [_resized(cut, node, n, d) if cut.changed(d) and n != -1 else n for n, d in pairs])

    return rewriter


def _resized(cut: _Cut, node: fx.Node, size: Any, dim: Dim) -> Any:
    """The new size of a dimension; of one that is only known at run time, such as examples times heads, the share that stays."""
    if not isinstance(size, fx.Node):
        return cut.size(dim)
    share = Fraction(cut.size(dim), len(dim))
    with node.graph.inserting_before(node):
        product = node.graph.call_function(operator.mul, (size, share.numerator))
        return node.graph.call_function(operator.floordiv, (product, share.denominator))


def _unflatten(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    first = _get(node, 1) % len(seen[_get(node, 0)])
    pairs = list(zip(_get(node, 2), seen[node][first:], strict=False))
    _set(node, 2, [_resized(cut, node, n, d) if cut.changed(d) and n != -1 else n for n, d in pairs])


def _pad(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    pads, dims = list(_get(node, 1)), seen[node]
    for n in range(len(pads) // 2):
        labels, (left, right) = dims[len(dims) - 1 - n].labels, pads[2 * n : 2 * n + 2]
        if labels.shape[1]:
            pads[2 * n : 2 * n + 2] = [cut.left(labels[:left]), cut.left(labels[len(labels) - right :])]
    _set(node, 1, pads)


def _slice_node(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    x = seen[_get(node, 0)]
    dim = _get(node, 1) % len(x)
    if not cut.changed(x[dim]):
        return
    start, stop, step = slice(*(_get(node, n) for n in (2, 3, 4))).indices(len(x[dim]))
    stays = ~lost_rows(cut.atoms, x[dim].labels, cut.gone)
    place = np.cumsum(stays) - 1
    rows = np.arange(start, stop, step)
    new = place[rows[stays[rows]]]
    if not np.array_equal(new, np.arange(new[0], new[0] + len(new))):
        raise ValueError(f"the strided slice {node.name} cannot be written for the channels that stay")
    for position, value in ((1, dim), (2, int(new[0])), (3, int(new[-1]) + 1), (4, 1)):
        _set(node, position, value)


def _split(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    x, parts = seen[_get(node, 0)], seen[node]
    dim = _get(node, 2) % len(x)
    if cut.changed(x[dim]):
        node.args, node.kwargs = (_get(node, 0), [cut.size(p[dim]) for p in parts], dim), {}
        node.target = torch.ops.aten.split_with_sizes.default


def _groups_at(position: int) -> Rewriter:
    def rewriter(cut: _Cut, node: fx.Node, seen: Seen) -> None:
        groups = _get(node, position)
        if groups > 1:
            _set(node, position, cut.groups(seen[_get(node, 0)][1], groups))

    return rewriter


def _normalized_shape(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    _set(node, 1, [cut.size(d) for d in seen[node][-len(_get(node, 1)) :]])


def _attention_scale(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    """The scale 1/sqrt(width) stays that of the original when query and key grow narrower."""
    width = seen[_get(node, 0)][-1]
    if node.kwargs.get("scale") is None and cut.changed(width):
        node.update_kwarg("scale", len(width) ** -0.5)


REWRITERS: Mapping[str, Rewriter] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "new_zeros", "new_ones", "new_full"), _sizes_at(1)),
    **dict.fromkeys(("zeros", "ones", "full"), _sizes_at(0)),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups_at(6)),
    "convolution": _groups_at(8),
    "group_norm": _groups_at(1),
    "channel_shuffle": _groups_at(1),
    "layer_norm": _normalized_shape,
    "slice": _slice_node,
    "unflatten": _unflatten,
    "scaled_dot_product_attention": _attention_scale,
}


def _slice(graph: fx.GraphModule, plan: Plan) -> None:
    cuts: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), rows in edits(plan).items():
        cuts.setdefault(name, {})[dim] = rows
    own = graph_tensors(graph)
    planned = {id(tensor): cuts[name] for name, tensor in own.items() if name in cuts}
    shared: dict[int, Tensor] = {}
    for name, tensor in own.items():
        if id(tensor) not in shared:
            shared[id(tensor)] = _copied(tensor, planned.get(id(tensor), {}))
        setattr(graph.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], shared[id(tensor)])


def _copied(tensor: Tensor, cuts: Mapping[int, np.ndarray]) -> Tensor:
    data = tensor.detach().clone()
    for dim, rows in cuts.items():
        data = data.index_select(dim, torch.as_tensor(rows, device=data.device))
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


MODE_FLAGS = {"batch_norm": 5, "dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "native_dropout": 2}


def _switch_with_mode(graph: fx.GraphModule) -> None:
    """Let batch norm and dropout follow ``train()`` and ``eval()``, which the export fixed to evaluation."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and _name(n) in MODE_FLAGS]
    if not nodes:
        return
    first = next(n for n in graph.graph.nodes if n.op != "placeholder")
    with warnings.catch_warnings(), graph.graph.inserting_before(first):
        warnings.simplefilter("ignore")  # fx expects a module or tensor behind get_attr; a flag serves as well
        training = graph.graph.get_attr("training")
    for node in nodes:
        node.update_arg(MODE_FLAGS[_name(node)], training)
