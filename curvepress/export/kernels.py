"""Which products of a file ONNX Runtime executes on integers, read off the graph that it made of it."""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from torch import nn

from ..quantization.quantized import bits_of, layout
from ..quantization.quantized.modules import TokenQuantizer
from .onnx import first_line

INTEGER = {
    "QLinearConv": "convolutions",
    "ConvInteger": "convolutions",
    "QGemm": "linear layers",
    "MatMulNBits": "linear layers",
    "QLinearMatMul": "matrix products",
    "MatMulInteger": "matrix products",
    "MatMulIntegerToFloat": "matrix products",
    "DynamicQuantizeMatMul": "matrix products",
}
FLOAT = {
    "Conv": "convolutions",
    "FusedConv": "convolutions",
    "NhwcFusedConv": "convolutions",
    "ConvTranspose": "convolutions",
    "Gemm": "linear layers",
    "FusedGemm": "linear layers",
    "MatMul": "matrix products",
    "FusedMatMul": "matrix products",
    "Attention": "matrix products",
    "MultiHeadAttention": "matrix products",
}


@dataclass(frozen=True)
class Kernels:
    """Products in the graph that ONNX Runtime executes, by kind: how many on integers, how many in all; why others are in ``float``."""

    integer: Mapping[str, int]
    total: Mapping[str, int]
    float: Mapping[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{self.integer.get(kind, 0)} of {count} {kind} integer" for kind, count in self.total.items())


def count_kernels(path: str | Path, module: nn.Module) -> Kernels:
    """The kernels of a file that :func:`name_products` prepared, made of a quantized module.

    Raises:
        ValueError: if ONNX Runtime cannot open the file.
    """
    integer: Counter[str] = Counter()
    total: Counter[str] = Counter()
    left: dict[str, str] = {}
    executed = optimised(path).graph.node
    named = {node.output[0]: node.name for node in onnx.load(path).graph.node}
    for node in executed:
        kind = INTEGER.get(node.op_type) or FLOAT.get(node.op_type)
        if kind is None:
            continue
        total[kind] += 1
        integer[kind] += node.op_type in INTEGER
        if node.op_type in FLOAT:
            name = re.sub(r"_token_\d+$|_nchwc$|/.*$", "", node.name)
            name = named.get(name, name)  # a convolution in another memory layout is named after its result
            left[name] = _reason(module, name, node.op_type)
    return Kernels(dict(integer), dict(total), left)


def name_products(graph: onnx.GraphProto, module: nn.Module) -> None:
    """Give the products of a graph the names that they have in the layout of the module it was made of."""
    products = layout(module).products
    by_weight: dict[str, list[str]] = defaultdict(list)
    for product in products:
        by_weight[product.weight or ""].append(product.name)
    made = {output: node for node in graph.node for output in node.output}
    stored = {i.name for i in graph.initializer}
    for node in graph.node:
        if node.op_type in FLOAT:
            names = by_weight[_weight(node, made, stored)]
            node.name = names.pop(0) if names else node.name


def optimised(path: str | Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime executes for a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exceptions share no public base
            raise ValueError(f"{Path(path).name} cannot be opened in ONNX Runtime: {first_line(error)}") from error
        return onnx.load(options.optimized_model_filepath)


def _weight(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], stored: set[str]) -> str:
    """The name of the parameter that a product reads; empty for a product of two activations."""
    name = node.input[1]
    while name in made and made[name].op_type in ("DequantizeLinear", "Transpose", "Reshape"):
        name = made[name].input[0]
    return name.removesuffix("_levels") if name in stored else ""


def _reason(module: nn.Module, name: str, operator: str) -> str:
    bits, found = bits_of(module), layout(module)
    product = next((p for p in found.products if p.name == name), None)
    if product is None:
        return "it is no product of the model's own"
    if product.name in found.unread:
        return found.unread[product.name]
    if operator == "ConvTranspose":
        return "ONNX Runtime has no integer kernel for transposed convolutions"
    if product.weight is not None and bits.of_weight(product.weight) is None:
        return f"its weight {product.weight} was left in float"
    float_inputs = [s.name for s in found.sites if s.name in product.inputs and bits.of_site(s) is None]
    if float_inputs:
        return f"its input {float_inputs[0]} was left in float"
    if any(isinstance(part, TokenQuantizer) and part.name in product.inputs for part in module.modules()):
        return "its input has a grid for each token, for which ONNX Runtime has no integer kernel"
    return "ONNX Runtime did not fuse it with the rounding around it"
