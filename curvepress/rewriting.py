"""A smaller model from the exported graph, for models whose own code holds constants.

The graph is run once under the label algebra, so that every dimension of every node is known to be cut or not; then every
constant that repeats a width (a view, a pad, a split, a number of groups) is written anew.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .algebra import Labels
from .labelling import Dim, lost_rows
from .plan import Plan, edits, lost
from .tracing import Trace, quiet_evaluation, watch

Seen = dict[fx.Node, Any]


def rewrite(model: nn.Module, plan: Plan, example: tuple[Any, ...]) -> fx.GraphModule:
    """The plan applied to the model's exported graph: a module that trains and evaluates like the original.

    Raises:
        ValueError: if the model cannot be exported or its graph has another structure than the plan.
    """
    graph = export_graph(model, example)
    trace, seen = _observe(graph, example)
    cut = _Cut(trace, _gone(trace, plan))
    for node in graph.graph.nodes:
        if node.op == "call_function" and (rewriter := REWRITERS.get(_name(node))):
            rewriter(cut, node, seen)
    _slice(graph, plan)
    _switch_with_mode(graph)
    graph.graph.lint()
    graph.recompile()
    graph.train(model.training)
    return graph


def export_graph(model: nn.Module, example: tuple[Any, ...]) -> fx.GraphModule:
    """The model as a graph of ATen operators for any batch size, with the model's own names and its own tensors.

    Raises:
        ValueError: if ``torch.export`` cannot follow the model.
    """
    example = tuple(torch.cat([x, x]) if isinstance(x, Tensor) and len(x) == 1 else x for x in example)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) else None for x in example)
    try:
        with quiet_evaluation(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, example, dynamic_shapes=(dynamic,) if _takes_varargs(model) else dynamic).module()
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ValueError(f"this model's code holds constants, and torch.export cannot follow it for any batch size: {reason}") from error
    for node in list(exported.graph.nodes):
        if node.op == "call_module" and "guards" in str(node.target):
            exported.graph.erase_node(node)
    _simplify_calling(exported.graph)
    plain = fx.GraphModule(exported, exported.graph)
    _restore(plain, model)
    return plain


def _simplify_calling(graph: fx.Graph) -> None:
    """Positional tensors in and one tensor out need no tree of arguments around the graph's code."""
    (output,) = graph.find_nodes(op="output")
    spec = getattr(graph._codegen, "pytree_info", None)
    if spec is not None and spec.out_spec == torch.utils._pytree.tree_structure(0):
        output.args = (output.args[0][0],)
        graph.set_codegen(fx.graph.CodeGen())


def _takes_varargs(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())


def _restore(graph: fx.GraphModule, model: nn.Module) -> None:
    """Tensors the graph does not use (counters, spare parameters) stay part of the model."""
    have = {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers(remove_duplicate=False))}
    stored = model.state_dict().keys()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name not in have:
            _owner(graph, name).register_parameter(name.rpartition(".")[2], tensor)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in have:
            _owner(graph, name).register_buffer(name.rpartition(".")[2], buffer, persistent=name in stored)


def _owner(module: nn.Module, name: str) -> nn.Module:
    for part in name.split(".")[:-1]:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module


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
    trace = watch(graph, lambda: _Recorder(graph, results.__setitem__).run(*example), example)
    dims = {node: torch.utils._pytree.tree_map_only(Tensor, trace.ledger.of, result) for node, result in results.items()}
    return trace, dims


def _gone(trace: Trace, plan: Plan) -> np.ndarray:
    parts = [np.zeros(0, dtype=np.int64)]
    for group in plan.structure.groups:
        if group.name in plan.keep:
            atoms = trace.atoms.get(group.name, parts[0])
            if len(atoms) != group.size:
                raise ValueError(f"group {group.name!r} has {group.size} channels in the plan and {len(atoms)} in the exported graph")
            parts.append(atoms[lost(plan, group)])
    return np.concatenate(parts)


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


def _sizes(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    """view, reshape, expand: every constant size that is cut."""
    pairs = zip(_get(node, 1), seen[node], strict=True)
    _set(node, 1, [n if isinstance(n, fx.Node) or n == -1 else cut.size(d) if cut.changed(d) else n for n, d in pairs])


def _unflatten(cut: _Cut, node: fx.Node, seen: Seen) -> None:
    dim = _get(node, 1) % len(seen[_get(node, 0)])
    _set(node, 2, [n if isinstance(n, fx.Node) or n == -1 else cut.size(seen[node][dim + k]) for k, n in enumerate(_get(node, 2))])


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


def _groups_at(position: int) -> Callable[[_Cut, fx.Node, Seen], None]:
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


REWRITERS: Mapping[str, Callable[[_Cut, fx.Node, Seen], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand"), _sizes),
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
        if plan.structure.tensors[name].kind != "activation":
            cuts.setdefault(name, {})[dim] = rows
    shared: dict[int, Tensor] = {}
    own = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    for name, tensor in own:
        first.setdefault(id(tensor), name)
    for name, tensor in own:
        if id(tensor) not in shared:
            shared[id(tensor)] = _copied(tensor, cuts.get(first[id(tensor)], {}))
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
