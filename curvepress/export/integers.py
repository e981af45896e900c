"""ONNX files that store integers and run on integer kernels: read back and compared with the quantized module on real data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxscript import opset21 as op
from onnxscript.function_libs.torch_lib.ops.common import constant
from torch import Tensor, nn
from torch.utils import _pytree

from ..objective import Batches
from ..quantization.quantized.lowering import DEQUANTIZE, ROUND, lower
from .comparison import compare, example_of, refuse_disagreement, take
from .kernels import Kernels, count_kernels, name_products
from .onnx import Inputs, evaluating, feeds, first_line, input_names, of_any_size, onnx_program, open_session, quiet, temporary, versions

OPSET = 21
"""The first operator set in which DequantizeLinear takes int4 and groups."""


@dataclass(frozen=True)
class IntegerAgreement:
    """How closely a file of integers, run in ONNX Runtime, computes what the quantized module does.

    Over ``examples`` real examples: ``same`` is the percentage with the same largest output, ``error`` the largest absolute difference
    of an output, and ``mean`` the mean one.  ``kernels`` counts the products that run on integers, by kind.
    """

    examples: int
    same: float
    error: float
    mean: float
    kernels: Kernels
    bytes: int
    opset: int
    versions: Mapping[str, str]


def to_integer_onnx(
    module: nn.Module, batches: Batches, path: str | Path, *, examples: int = 256, least_same: float = 99.5, threads: int = 1
) -> IntegerAgreement:
    """Write a quantized module to ``path`` as ONNX with QuantizeLinear and DequantizeLinear, for any batch size.

    Weights are stored as int8 (int4 where a runtime multiplies by them as they are), biases of integer products as int32.  The file
    is run in ONNX Runtime on the batches until ``examples`` were seen; it gets its name only if it agrees.

    Deep networks agree less: where a value lies between two levels, the last bit of a sum decides, and every later rounding makes such
    a difference larger, up to a part of what quantization itself changes.

    Raises:
        ValueError: if a site was not calibrated, the graph cannot be exported, outputs differ by more than quantization changes
            them on average, or by more than half of that and fewer than ``least_same`` percent of the predictions are the
            same; no file is left then.
    """
    path = Path(path)
    data = take(batches, examples)
    with temporary(path) as written:
        onnx.save(_integer_model(module, data[0]), written)
        found = _agreement(module, written, data, threads)
        refuse_disagreement("ONNX Runtime", module, data, found.same, found.mean, least_same)
        os.replace(written, path)
    return found


def _integer_model(module: nn.Module, inputs: Inputs) -> onnx.ModelProto:
    graph = lower(module)
    example = example_of(inputs)
    try:
        with evaluating(graph), quiet(), torch.no_grad():
            program, _ = of_any_size(graph, example, partial(onnx_program, opset=OPSET, custom_translation_table=TABLE))
        model = program.model_proto
    except Exception as error:  # the exporter raises whatever it meets
        raise ValueError(
            f"the quantized graph cannot be exported to ONNX: {first_line(error)}; write that part of the model in other operators, "
            "or use it in PyTorch, from the packed file"
        ) from error
    _strip(model)
    _store_int4(model.graph)
    _write_zero_points(model.graph)
    _pad_within(model.graph)
    name_products(model.graph, module)
    onnx.checker.check_model(model, full_check=True)
    return model


def _round(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
    """QuantizeLinear, limits on integers (limits on floats would keep the product before it in float), DequantizeLinear."""
    step: Any = constant(scale, dtype=onnx.TensorProto.FLOAT)
    zero, least, most = (_level(n) for n in (zero_point, low, high))
    levels: Any = op.QuantizeLinear(x, step, zero)
    if low > 0 or high < 255:
        levels = op.Clip(levels, least, most)
    return op.DequantizeLinear(levels, step, zero)


def _level(number: int) -> Any:
    return constant(number, dtype=onnx.TensorProto.UINT8)


def _dequantize(levels: Any, scale: Any, axis: int, group: int) -> Any:
    if not group:
        return op.DequantizeLinear(levels, scale, axis=axis)
    if axis == 1:
        scale = op.Transpose(scale, perm=[1, 0])
    return op.DequantizeLinear(levels, scale, axis=1 - axis, block_size=group)


TABLE = {ROUND: _round, DEQUANTIZE: _dequantize}
"""What the operators of :mod:`curvepress.quantization.quantized.lowering` are in ONNX."""


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter noted down for people to read."""
    graph = model.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for part in (model, graph, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.value_info[:]


def _store_int4(graph: onnx.GraphProto) -> None:
    """Weights with a scale for each group of inputs in four bits, where they have no more: runtimes multiply by them as they are."""
    grouped = {
        n.input[0] for n in graph.node if n.op_type == "DequantizeLinear" and any(a.name == "block_size" and a.i for a in n.attribute)
    }
    for stored in graph.initializer:
        levels = numpy_helper.to_array(stored) if stored.name in grouped else np.zeros(0, np.int8)
        if levels.dtype == np.int8 and levels.size and levels.min() >= -8 and levels.max() <= 7:
            four = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)
            stored.CopyFrom(numpy_helper.from_array(levels.astype(four), stored.name))


def _write_zero_points(graph: onnx.GraphProto) -> None:
    """Zero points of weights and biases in full: ONNX Runtime's Gemm stays in float without them.  Equal ones are stored once."""
    stored = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 2 and set(node.input) <= set(stored):
            levels, scale = (stored[name] for name in node.input)
            name = f"zeros_{levels.data_type}_{'x'.join(map(str, scale.dims))}"
            if name not in stored:
                zeros = np.zeros(tuple(scale.dims), onnx.helper.tensor_dtype_to_np_dtype(levels.data_type))
                stored[name] = numpy_helper.from_array(zeros, name)
                graph.initializer.append(stored[name])
            node.input.append(name)


def _pad_within(graph: onnx.GraphProto) -> None:
    """Zeros around an image become padding of the convolution that reads it: by itself ONNX Runtime's Pad is done in float."""
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        pad = made.get(node.input[0]) if node.op_type == "Conv" else None
        while pad is not None and pad.op_type in ("QuantizeLinear", "DequantizeLinear"):
            pad = made.get(pad.input[0])  # on the grid that the padded image is on already
        widths = _zeros_around(graph, pad, made) if pad is not None and pad.op_type == "Pad" else None
        given = next((a for a in node.attribute if a.name == "pads"), None)
        if pad is not None and widths is not None and given is not None and len(given.ints) == len(widths):
            node.input[0] = pad.input[0]
            given.ints[:] = [a + b for a, b in zip(given.ints, widths, strict=True)]
    _drop_unread(graph)


def _zeros_around(graph: onnx.GraphProto, pad: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> list[int] | None:
    """Rows and columns of zeros before and after, in the order of a convolution; None for any other padding."""
    stored = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    stored |= {
        name: numpy_helper.to_array(n.attribute[0].t)
        for name, n in made.items()
        if n.op_type == "Constant" and n.attribute[0].HasField("t")
    }
    numbers = [stored.get(name) for name in pad.input[1:3] if name]
    mode = next((a.s for a in pad.attribute if a.name == "mode"), b"constant")
    if (
        mode != b"constant"
        or any(n is None for n in numbers)
        or len(pad.input) > 3
        or any(bool(n.any()) for n in numbers[1:] if n is not None)
    ):
        return None
    assert numbers[0] is not None
    before, after = np.split(numbers[0].astype(int), 2)
    return [*before[2:].tolist(), *after[2:].tolist()] if not (before[:2].any() or after[:2].any() or (numbers[0] < 0).any()) else None


def _drop_unread(graph: onnx.GraphProto) -> None:
    read = {o.name for o in graph.output} | {name for node in graph.node for name in node.input}
    while dead := [node for node in graph.node if not read & set(node.output)]:
        for node in dead:
            graph.node.remove(node)
        read = {o.name for o in graph.output} | {name for node in graph.node for name in node.input}


def _agreement(module: nn.Module, path: Path, data: list[Inputs], threads: int) -> IntegerAgreement:
    session = open_session(path, threads)
    names = input_names(session)
    found = compare(module, data, lambda inputs: session.run(None, feeds(path.name, names, _pytree.tree_map(Tensor.numpy, inputs))))
    return IntegerAgreement(*found, count_kernels(path, module), path.stat().st_size, OPSET, versions())
