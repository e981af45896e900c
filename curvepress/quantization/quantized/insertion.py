"""Quantizing a model: quantizers put into its graph, where :mod:`.placement` found room for them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

from ...objective import Example
from ..quantizer import Scheme, fit_grid
from .graphs import argument, float_graph, set_argument, tensor
from .layout import Bits, Layout, Site, check_names, weight_scheme
from .modules import ActivationQuantizer, BiasQuantizer, Quantizer, TokenQuantizer, WeightQuantizer, quantizers
from .placement import CONVOLUTIONS, MATRIX, Operand, Place, Placement, moves, operator_name, place

LINEAR = {"linear", "addmm", *MATRIX}
FOLDER = "quantizers"
"""The submodule that holds all quantizers; dots in the names of weights and sites become slashes."""


def quantize(model: nn.Module, bits: Bits, example: Example, *, learn: bool = True) -> fx.GraphModule:
    """A copy of the model that computes with weights and activations on grids of the given bits, for any batch size.

    Its weights keep their names; BatchNorm is folded into the layer before it and its weights have their grids (least squared
    error).  Activations have theirs after :func:`calibrate`.  It trains like any other module, and then learns the scales unless
    ``learn`` is false.  Biases of convolutions and of linear layers on ``[examples, features]`` are rounded to int32.
    ``layout(module)`` and ``bits(module)`` say what it is made of.

    Raises:
        ValueError: if the model cannot be exported, bits are given for what it does not have, or a weight has no usable range.
    """
    graph = prepare(model, bits, example, learn=learn)
    for quantizer in quantizers(graph):
        if isinstance(quantizer, WeightQuantizer):
            quantizer.grid = fit_grid(tensor(graph, quantizer.name).detach(), quantizer.scheme, name=quantizer.name)
    return graph


def prepare(model: nn.Module, bits: Bits, example: Example, *, learn: bool = True) -> fx.GraphModule:
    """What :func:`quantize` returns before weights have their grids: to be given those of a file."""
    graph, values = float_graph(model, example)
    placement = place(graph, values)
    check_names(bits, placement.layout)
    graph.add_submodule(FOLDER, nn.Module())
    for quantizer in (*_quantize_weights(graph, bits, placement), *_quantize_activations(graph, bits, placement)):
        if isinstance(quantizer, Quantizer):
            quantizer.scale.requires_grad_(learn)
    _quantize_biases(graph, placement, {n: len(v.shape) for n, v in values.items() if isinstance(v, Tensor)})
    graph.graph.lint()
    graph.recompile()
    graph.meta.update(layout=placement.layout, bits=bits)
    return graph.train(model.training)


def layout(module: nn.Module) -> Layout:
    """All that can be quantized in a module that :func:`quantize` returned, whether it is or not.

    Raises:
        ValueError: if it is another module.
    """
    found = getattr(module, "meta", {}).get("layout")
    if not isinstance(found, Layout):
        raise ValueError(f"a module that quantize() returned is needed, got a {type(module).__name__}")
    return found


def sites(module: nn.Module) -> tuple[Site, ...]:
    """The sites of a quantized module, in the order in which they are computed."""
    return layout(module).sites


def bits_of(module: nn.Module) -> Bits:
    """The bits that a module was quantized with."""
    layout(module)
    bits = module.meta["bits"]  # type: ignore[index]
    assert isinstance(bits, Bits)
    return bits


def _add(graph: fx.GraphModule, kind: str, name: str, module: nn.Module) -> str:
    target = f"{FOLDER}.{kind}:{name.replace('.', '/')}"
    graph.add_submodule(target, module)
    return target


def _quantize_weights(graph: fx.GraphModule, bits: Bits, placement: Placement) -> Iterator[WeightQuantizer]:
    nodes = {str(o.weight.target): o.weight for o in placement.operands.values() if o.weight is not None}
    for weight in placement.layout.weights:
        width = bits.of_weight(weight.name)
        if width is None:
            continue
        readers = [operator_name(o.node) for o in placement.operands.values() if o.weight is nodes[weight.name]]
        group = bits.group if set(readers) <= LINEAR and len(weight.shape) == 2 else None
        quantizer = WeightQuantizer(
            weight.name, weight_scheme(width, None if bits.per_tensor else weight.axis, group=group, asymmetric=bits.asymmetric)
        )
        _call_after(nodes[weight.name], _add(graph, "weight", weight.name, quantizer))
        yield quantizer


def _call_after(node: fx.Node, target: str) -> fx.Node:
    """Let all that reads a node read what a module makes of it."""
    with node.graph.inserting_after(node):
        new = node.graph.call_module(target, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    new.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
    return new


def _quantize_activations(graph: fx.GraphModule, bits: Bits, placement: Placement) -> Iterator[ActivationQuantizer | TokenQuantizer]:
    now: dict[fx.Node, fx.Node] = {}
    widths: dict[tuple[fx.Node, ...], int] = {}
    tokens = _read_by_linear_layers(placement)
    for spot in placement.places:
        width = bits.of_site(spot.site)
        narrower = not spot.reads or (width is not None and width < widths.get(spot.roots, 9))
        if width is None or not narrower or _all_float(spot.site, bits):
            continue
        widths[spot.roots] = width
        kind = TokenQuantizer if bits.dynamic and spot.site.name in tokens else ActivationQuantizer
        quantizer = kind(spot.site.name, Scheme(width, symmetric=False))
        target = _add(graph, "site", spot.site.name, quantizer)
        if spot.reads:
            _narrow(placement, spot, target, now)
        else:
            now.update({root: _call_after(root, target) for root in spot.roots})
        yield quantizer


def _read_by_linear_layers(placement: Placement) -> set[str]:
    """The sites of role ``product`` that linear layers read, and nothing else."""
    products = placement.layout.products
    others = {i for p in products if p.operator not in LINEAR or p.weight is None for i in p.inputs}
    return {s.name for s in placement.layout.sites if s.role == "product"} - others


def _all_float(site: Site, bits: Bits) -> bool:
    return site.role == "product" and bool(site.weights) and all(bits.of_weight(w) is None for w in site.weights)


def _narrow(placement: Placement, spot: Place, target: str, now: dict[fx.Node, fx.Node]) -> None:
    """Let the products that read a tensor, and nothing else, read it on a grid of fewer bits."""
    products = {o.node for o in placement.operands.values()}
    for tensor_read in spot.reads:
        given = now.get(tensor_read, tensor_read)
        with given.graph.inserting_after(given):
            new = given.graph.call_module(target, (given,))
        new.meta = {k: v for k, v in given.meta.items() if k == "nn_module_stack"}
        given.replace_all_uses_with(new, delete_user_cb=lambda user: user in products)


def _quantize_biases(graph: fx.GraphModule, placement: Placement, dims: dict[fx.Node, int]) -> None:
    for name, operand in placement.operands.items():
        bias = _rounded_bias(operand, dims)
        factors = [_quantizer_of(graph, n) for n in _factors(operand.node)] if bias is not None else []
        match factors:
            case [ActivationQuantizer() as activation, WeightQuantizer() as weight] if weight.scheme.group is None:
                target = _add(graph, "bias", name, BiasQuantizer(weight, activation))
                with graph.graph.inserting_before(operand.node):
                    set_argument(operand.node, _bias_name(operand), graph.graph.call_module(target, (bias,)))


def _bias_name(operand: Operand) -> str:
    return "self" if operator_name(operand.node) == "addmm" else "bias"


def _rounded_bias(operand: Operand, dims: dict[fx.Node, int]) -> fx.Node | None:
    """The bias that the runtime keeps as int32, if there is one."""
    kind = operator_name(operand.node)
    if kind not in (*CONVOLUTIONS, "linear", "addmm") or operand.weight is None or (kind == "linear" and dims[operand.node] != 2):
        return None
    bias = argument(operand.node, _bias_name(operand))
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    read, weight = node.args[1:3] if operator_name(node) == "addmm" else node.args[:2]
    return read, weight  # type: ignore[return-value]


def _quantizer_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The quantizer whose values a node holds."""
    while moves(node) or operator_name(node) == "cat":
        node = node.args[0][0] if operator_name(node) == "cat" else node.args[0]  # type: ignore[index, assignment]
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None
