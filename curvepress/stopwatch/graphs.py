"""Single layers as ONNX: what the runtimes that read ONNX are timed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..latency import FLOAT, Layer

OPSET, IR = 18, 10
STEP = 0.02
"""The quantization step of all numbers of an integer layer; times do not depend on it."""


@dataclass(frozen=True)
class Case:
    """One layer at given widths and bits, to be timed."""

    layer: Layer
    out: int
    into: int
    bits: int = FLOAT

    def weight(self) -> tuple[int, ...]:
        """The shape of its weight, outputs first."""
        return (self.out, self.into, *self.layer.kernel)

    def input(self, batch: int) -> tuple[int, ...]:
        """The shape of what it reads."""
        if self.layer.kind == "linear":
            return (batch, *self.layer.size, self.into)
        return (batch, self.out if self.layer.depthwise else self.into, *self.layer.size)


def prefix(number: int) -> str:
    """What all names of a case in a graph of several begin with."""
    return f"b{number}_"


def graph_of(cases: Sequence[Case], batch: int) -> onnx.ModelProto:
    """The cases side by side: each with an input of its own, a nonlinearity behind it, and random weights."""
    rng = np.random.default_rng(0)
    parts = [_branch(case, prefix(n), batch, rng) for n, case in enumerate(cases)]
    nodes, stored = ([x for part in parts for x in part[k]] for k in (0, 1))
    inputs = [helper.make_tensor_value_info(f"{prefix(n)}x", TensorProto.FLOAT, c.input(batch)) for n, c in enumerate(cases)]
    outputs = [helper.make_tensor_value_info(f"{prefix(n)}y", TensorProto.FLOAT, None) for n in range(len(cases))]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _branch(case: Case, p: str, batch: int, rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    weight = rng.standard_normal(case.weight()).astype(np.float32) * 0.1
    stored = [numpy_helper.from_array(np.zeros(case.out, np.float32), f"{p}bias")]
    if case.bits == FLOAT:
        stored.append(numpy_helper.from_array(_turned(case, weight), f"{p}w"))
        return [*_product(case, f"{p}x", f"{p}w", f"{p}bias", p), helper.make_node("Relu", [f"{p}c"], [f"{p}y"], f"{p}relu")], stored
    levels = np.clip(np.round(weight / STEP), -127, 127).astype(np.int8)
    zeros = np.zeros(case.out, np.int32)
    constants = {"w": _turned(case, levels), "s": np.float32(STEP), "s2": np.float32(STEP**2), "u": np.uint8(0), "z": np.int8(0),
                 "z2": np.int32(0), "bias": zeros}  # fmt: skip
    stored = [numpy_helper.from_array(np.asarray(v), f"{p}{k}") for k, v in constants.items()]
    nodes = [
        helper.make_node("QuantizeLinear", [f"{p}x", f"{p}s", f"{p}u"], [f"q{p}x"], f"quantize_{p}x"),
        helper.make_node("DequantizeLinear", [f"q{p}x", f"{p}s", f"{p}u"], [f"{p}xf"], f"{p}dx"),
        helper.make_node("DequantizeLinear", [f"{p}w", f"{p}s", f"{p}z"], [f"{p}wf"], f"{p}dw"),
        helper.make_node("DequantizeLinear", [f"{p}bias", f"{p}s2", f"{p}z2"], [f"{p}bf"], f"{p}db"),
        *_product(case, f"{p}xf", f"{p}wf", f"{p}bf", p),
        helper.make_node("QuantizeLinear", [f"{p}c", f"{p}s", f"{p}u"], [f"{p}q"], f"{p}qc"),
        helper.make_node("DequantizeLinear", [f"{p}q", f"{p}s", f"{p}u"], [f"{p}y"], f"dequantize_{p}y"),
    ]
    return nodes, stored


def _turned(case: Case, weight: np.ndarray) -> np.ndarray:
    """Gemm and MatMul read the weight with its inputs first."""
    return np.ascontiguousarray(weight.T) if case.layer.kind == "linear" else weight


def _product(case: Case, x: str, w: str, bias: str, p: str) -> list[Any]:
    layer = case.layer
    if layer.kind == "conv":
        form: dict[str, Any] = {
            "kernel_shape": layer.kernel,
            "strides": layer.stride,
            "pads": layer.padding * 2,
            "dilations": layer.dilation,
        }
        return [helper.make_node("Conv", [x, w, bias], [f"{p}c"], f"{p}conv", group=case.out if layer.depthwise else 1, **form)]
    if not layer.size:
        return [helper.make_node("Gemm", [x, w, bias], [f"{p}c"], f"{p}gemm")]
    return [
        helper.make_node("MatMul", [x, w], [f"{p}m"], f"{p}matmul"),
        helper.make_node("Add", [f"{p}m", bias], [f"{p}c"], f"{p}add"),
    ]
