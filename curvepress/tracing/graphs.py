"""A model as a graph of ATen operators, with the model's own names and its own tensors."""

from __future__ import annotations

import inspect
import io
import warnings
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..objective import arguments
from .watching import quiet_evaluation


def export_graph(model: nn.Module, example: tuple[Any, ...]) -> fx.GraphModule:
    """The model as a graph of ATen operators for any batch size, with the model's own names and its own tensors.

    Raises:
        ValueError: if ``torch.export`` cannot follow the model.
    """
    try:
        exported = _exported(model, example, lengths=True)
    except Exception:
        exported = None
    try:
        exported = exported or _exported(model, example, lengths=False)
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


def _exported(model: nn.Module, example: tuple[Any, ...], *, lengths: bool) -> Any:
    """The exported model for any batch size and, where ``lengths``, for sequences of whole numbers of any length."""
    positional, named = arguments(torch.utils._pytree.tree_map_only(Tensor, _twice, example))

    def free(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return None
        further = range(1, x.ndim) if lengths and not x.is_floating_point() else ()
        return {0: torch.export.Dim.DYNAMIC, **dict.fromkeys(further, torch.export.Dim.AUTO)}

    shapes = _by_name(model, *torch.utils._pytree.tree_map(free, (positional, named)))
    with quiet_evaluation(model), torch.no_grad(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # the graph up to an error
        warnings.simplefilter("ignore")
        return torch.export.export(model, positional, named, dynamic_shapes=shapes).module()


def _simplify_calling(graph: fx.Graph) -> None:
    """Positional tensors in and one tensor out need no tree of arguments around the graph's code."""
    (output,) = graph.find_nodes(op="output")
    spec = getattr(graph._codegen, "pytree_info", None)
    if spec is not None and spec.out_spec == torch.utils._pytree.tree_structure(0):
        output.args = (output.args[0][0],)
        graph.set_codegen(fx.graph.CodeGen())


def _twice(x: Tensor) -> Tensor:
    """A batch of one becomes two: torch.export takes a size of one for a constant."""
    return torch.cat([x, x]) if x.ndim and len(x) == 1 else x


def _by_name(model: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Shapes of inputs by the names of the arguments of ``forward``."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return {next(p.name for p in parameters if p.kind is p.VAR_POSITIONAL): positional, **named}
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = {p.name for p in parameters}
    extra = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), "")
    unnamed = {k: v for k, v in named.items() if k not in taken}
    known = {k: v for k, v in named.items() if k in taken}
    return {**dict(zip(names, positional, strict=False)), **known, **({extra: unnamed} if unnamed else {})}


def _restore(graph: fx.GraphModule, model: nn.Module) -> None:
    """Tensors the graph does not use (counters, spare parameters) stay part of the model."""
    have = graph_tensors(graph)
    stored = model.state_dict().keys()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name not in have:
            _owner(graph, name).register_parameter(name.rpartition(".")[2], tensor)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        _owner(graph, name).register_buffer(name.rpartition(".")[2], have.get(name, buffer), persistent=name in stored)


def _owner(module: nn.Module, name: str) -> nn.Module:
    for part in name.split(".")[:-1]:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module


def graph_tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Tensors of the graph under all their names."""
    return {**dict(graph.named_parameters(remove_duplicate=False)), **dict(graph.named_buffers(remove_duplicate=False))}


def placeholder_values(graph: fx.GraphModule, example: tuple[Any, ...]) -> list[Any]:
    """The inputs in the order of the graph's placeholders."""
    positional, named = arguments(example)
    spec = getattr(graph.graph._codegen, "pytree_info", None)
    if not named:
        return [*positional]
    if spec is None:
        names = [str(p.target) for p in graph.graph.find_nodes(op="placeholder")]
        return [*positional, *(named[n] for n in names[len(positional) :])]
    order = spec.in_spec.child(1).context
    return torch.utils._pytree.tree_leaves((positional, {k: named[k] for k in order}))
