"""A model as a graph of ATen operators: nothing written in place, BatchNorm folded, attention spelt out."""

from __future__ import annotations

import operator
from copy import deepcopy
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ...objective import Example, call, in_a_tuple
from ...tracing.graphs import export_graph, placeholder_values

aten = torch.ops.aten

Values = dict[fx.Node, Any]
"""What every node computed for an example: tensors on the meta device, in the nesting the node returns."""

FOLDABLE = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
TOLERANCE = 1e-4


def float_graph(model: nn.Module, example: Example) -> tuple[fx.GraphModule, Values]:
    """The model's graph in eval mode with copies of its tensors under their own names, and what its nodes compute for the example.

    The batch size stays open.  A BatchNorm that follows a convolution or linear layer is folded into it: its running statistics are
    kept as they are.  Dropout follows ``train()`` and ``eval()``.

    Raises:
        ValueError: if a weight, the example or what the model computes for it holds NaN or infinities, ``torch.export`` cannot follow
            the model, or the graph computes something else on the example.
    """
    inputs = in_a_tuple(example)
    for name, own in model.named_parameters():  # buffers may: masks do
        _refuse_not_finite(name, own, "train the model again, or load other weights")
    for place, given in enumerate(tree_leaves(inputs)):
        _refuse_not_finite(f"input {place} of the example", given, "clean the data")
    graph = export_graph(deepcopy(model).eval(), inputs)
    _make_functional(graph)
    _fold_batchnorm(graph)
    for node in graph.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _spell_out(graph.graph, node)
    _let_dropout_follow(graph)
    _tidy(graph)
    values = observe(graph, inputs)
    _compare(graph, model, inputs)
    return graph, values


def argument(node: fx.Node, name: str) -> Any:
    """An argument of the node's operator by the name it has in the schema."""
    for place, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name, parameter.default_value)
    raise KeyError(name)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Give the node's operator another argument."""
    names = [p.name for p in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    args = [*node.args, *(argument(node, n) for n in names[len(node.args) : place + 1])]
    node.args = (*args[:place], value, *args[place + 1 :])
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in names[: len(node.args)]}


def tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its dotted name."""
    owner, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(owner), last)
    assert isinstance(found, Tensor)
    return found


def observe(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> Values:
    """What every node computes for the inputs: shapes and types, without the numbers."""
    values: Values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            values[n] = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), result)
            return result

    with torch.no_grad():
        Recorder(graph).run(*placeholder_values(graph, inputs), enable_io_processing=False)
    return values


def _make_functional(graph: fx.GraphModule) -> None:
    """Operators that write into their input become those that do not; what reads the written tensor reads their result already."""
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        packet, overload = schema.name.removeprefix("aten::"), schema.overload_name or "default"
        plain = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
        if not packet.endswith("_") or plain is None:
            raise ValueError(f"the model writes into a tensor with aten.{packet}, which has no form that does not; write x = f(x) instead")
        if _shares_memory(node.args[0]):
            raise ValueError(f"the model writes into a part of a tensor with aten.{packet} ({node.name}); build a new tensor instead")
        node.target = plain


def _shares_memory(node: Any) -> bool:
    """Whether a tensor is a view of one that something else reads."""
    while isinstance(node, fx.Node) and _is_view(node):
        if len(node.args[0].users) > 1:  # type: ignore[union-attr]
            return True
        node = node.args[0]
    return False


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def _fold_batchnorm(graph: fx.GraphModule) -> None:
    for node in graph.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        layer = node.args[0]
        if layer.target in FOLDABLE and len(layer.users) == 1 and _is_own(layer.args[1]):
            _fold(graph, layer, node)


def _is_own(weight: Any) -> bool:
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1


def _fold(graph: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    """Put the affine map of a BatchNorm in eval mode into the weight and bias of the layer before it, computed in float64."""

    def read(node: Any, default: float) -> Tensor:
        return (
            tensor(graph, str(node.target)).detach().double() if isinstance(node, fx.Node) else torch.tensor(default, dtype=torch.float64)
        )

    name_of_weight = str(layer.args[1].target)  # type: ignore[union-attr]
    weight = tensor(graph, name_of_weight)
    gamma, beta, mean, variance = (
        read(argument(norm, n), d) for n, d in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))
    )
    factor = gamma / (variance + argument(norm, "eps")).sqrt()
    bias = (read(argument(layer, "bias"), 0.0) - mean) * factor + beta
    with torch.no_grad():
        weight.copy_(weight.double() * factor.reshape([-1, *[1] * (weight.dim() - 1)]))
    name = f"{name_of_weight.rpartition('.')[0]}.bias".removeprefix(".")
    setattr(
        graph.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
    )
    with graph.graph.inserting_before(layer):
        set_argument(layer, "bias", graph.graph.get_attr(name))
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    """Attention as its two products and the softmax between them, so that each product can be quantized."""
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    mask, causal, scale = argument(node, "attn_mask"), argument(node, "is_causal"), argument(node, "scale")
    if argument(node, "dropout_p"):
        raise ValueError(f"attention {node.name} has dropout in eval mode; set dropout_p to 0 where the model is not training")
    scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    with graph.inserting_before(node):
        if argument(node, "enable_gqa"):
            repeats = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
            key, value = (graph.call_function(aten.repeat_interleave.self_int, (t, repeats, -3)) for t in (key, value))
        transposed = graph.call_function(aten.transpose.int, (key, -2, -1))
        scores = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.matmul.default, (query, transposed)), scale))
        if causal:
            mask = _causal_mask(graph, scores, query)
        if mask is not None:
            scores = _masked(graph, scores, mask)
        weights = graph.call_function(aten.softmax.int, (scores, -1))
        product = graph.call_function(aten.matmul.default, (weights, value))
    for new in graph.nodes:
        new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {})) if new.op == "call_function" else None
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _causal_mask(graph: fx.Graph, scores: fx.Node, query: fx.Node) -> fx.Node:
    ones = graph.call_function(aten.ones_like.default, (scores,), {"dtype": torch.bool})
    return graph.call_function(aten.tril.default, (ones,))


def _masked(graph: fx.Graph, scores: fx.Node, mask: fx.Node) -> fx.Node:
    if "val" in mask.meta and mask.meta["val"].dtype != torch.bool:
        return graph.call_function(aten.add.Tensor, (scores, mask))
    hidden = graph.call_function(aten.logical_not.default, (mask,))
    return graph.call_function(aten.masked_fill.Scalar, (scores, hidden, -1e30))


def _let_dropout_follow(graph: fx.GraphModule) -> None:
    nodes = graph.graph.find_nodes(op="call_function", target=aten.dropout.default)
    if nodes:
        first = next(n for n in graph.graph.nodes if n.op != "placeholder")
        with graph.graph.inserting_before(first):
            training = graph.graph.create_node("get_attr", "training")
        for node in nodes:
            node.update_arg(2, training)


def _tidy(graph: fx.GraphModule) -> None:
    """Drop what is no longer read: nodes, and tensors that only a folded BatchNorm used."""
    graph.graph.eliminate_dead_code()
    drop_unused(graph)
    graph.graph.lint()
    graph.recompile()


def drop_unused(graph: fx.GraphModule) -> None:
    """Delete parameters and buffers of the graph that no node reads; those of its quantizers stay."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in graph.graph.nodes if node.op == "call_module")
    own = [*dict(graph.named_parameters(remove_duplicate=False)), *dict(graph.named_buffers(remove_duplicate=False))]
    for name in own:
        if name not in read and not name.startswith(called):
            delattr(graph.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])


def _refuse_not_finite(name: str, value: Any, way_out: str) -> None:
    wrong = int((~value.isfinite()).sum()) if isinstance(value, Tensor) and value.is_floating_point() else 0
    if wrong:
        raise ValueError(f"{name} holds NaN or infinities ({wrong} of {value.numel()} values); {way_out}")


def _compare(graph: fx.GraphModule, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a graph that computes something else than the model does."""
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        wanted = [t for t in tree_leaves(call(model.eval(), inputs)) if isinstance(t, Tensor)]
        found = [t for t in tree_leaves(call(graph.eval(), inputs)) if isinstance(t, Tensor)]
    for part, mode in modes:
        part.training = mode
    for w, f in zip(wanted, found, strict=True):
        _refuse_not_finite("what the model computes for the example", w, "give inputs of the size that it was trained on")
        apart, largest = (w - f).abs().max().item() if prod(w.shape) else 0.0, max(w.abs().max().item() if prod(w.shape) else 0.0, 1e-6)
        if not apart <= TOLERANCE * largest:
            raise ValueError(
                f"the exported graph differs from the model by {apart / largest:.2g} of its largest output; "
                "is the model random in eval mode?"
            )


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results of another."""
    return node.target is operator.getitem
