"""What the tensors of a model become where it is quantized, so that the cost of bits is known without it; and bits for its graph."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import nn

from ..bitplan import Multiplication, Wiring
from ..costs import STORED
from ..objective import Example
from ..plan import Plan
from ..quantization.quantized import Bits, Layout, Product, layout, quantize
from ..structure import Structure, TensorSpec


def wiring(model: nn.Module, structure: Structure, example: Example) -> Wiring:
    """How the model is stored and what it multiplies, once it is quantized.

    Raises:
        ValueError: if the model cannot be quantized.
    """
    graph = quantize(model, Bits(weight=None, product=None, sum=None), example, learn=False)
    what, own = layout(graph), {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    axes = {w.name: w.axis for w in what.weights if w.name in structure.tensors}
    stored = {n for n, t in structure.tensors.items() if t.kind in STORED}
    added = {n: t for n, t in own.items() if n not in stored}
    makers = {f"{w.rpartition('.')[0]}.bias".removeprefix("."): w for w in axes}
    biases = {n: makers[n] for n, t in added.items() if n in makers and t.shape == (structure.tensors[makers[n]].shape[axes[makers[n]]],)}
    constants = sum(t.numel() * t.element_size() for n, t in added.items() if n not in biases)
    return Wiring(
        tuple(_products(what, structure)), axes, tuple(n for n in structure.tensors if n in stored - own.keys()), biases, constants
    )


def _products(what: Layout, structure: Structure) -> Iterator[Multiplication]:
    """The products of the layout whose multiply-accumulates the structure counts too; all others stay in float."""
    tensors = dict(structure.tensors)
    paired = [(n, t) for n, t in tensors.items() if t.kind == "activation"]
    for product in what.products:
        tensor = product.weight if product.weight in tensors else _taken(paired, product)
        if tensor and product.macs and prod(tensors[tensor].shape):
            first, second, *_ = (*([product.weight] if product.weight else []), *product.inputs, "", "")
            if not product.weight and len(product.inputs) == 1:
                second = first  # a tensor times itself
            yield Multiplication(tensor, product.macs // prod(tensors[tensor].shape), (first, second))


def _taken(paired: list[tuple[str, TensorSpec]], product: Product) -> str:
    """The next product of two activations with as many multiply-accumulates."""
    for place, (name, t) in enumerate(paired):
        if product.weight is None and prod(t.shape) * t.positions == product.macs:
            del paired[place]
            return name
    return ""


def bits_of_plan(plan: Plan) -> Bits:
    """The bits of a plan for the graph of its model, which refuses those for what it does not have.

    Raises:
        ValueError: if the plan has none.
    """
    if plan.bits is None:
        raise ValueError("the plan has no bits; make one with --bits")
    return Bits(dict(plan.bits.weights), dict(plan.bits.activations), weight=None, product=None, sum=None)
