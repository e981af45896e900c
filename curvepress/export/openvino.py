"""The integer ONNX file in OpenVINO: run, compared, and its integer kernels counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..objective import Batches
from .comparison import compare, refuse_disagreement, take
from .onnx import feeds, first_line

KINDS = {"Convolution": "convolutions", "Deconvolution": "convolutions", "FullyConnected": "linear layers", "MatMul": "matrix products"}
INTEGERS = ("u8", "i8")


@dataclass(frozen=True)
class OpenVinoAgreement:
    """As :class:`IntegerAgreement`, in OpenVINO: ``integer`` and ``total`` count products by kind as its profile tells them."""

    examples: int
    same: float
    error: float
    mean: float
    integer: Mapping[str, int]
    total: Mapping[str, int]
    version: str


def check_in_openvino(
    path: str | Path, module: nn.Module, batches: Batches, *, examples: int = 256, least_same: float = 99.0, threads: int = 1
) -> OpenVinoAgreement:
    """How closely an ONNX file of integers computes in OpenVINO what the quantized module does.

    OpenVINO fuses operators and may round at other places than the file does: on small networks outputs differed by more than
    quantization changes them where nearly all predictions were the same.

    Raises:
        ValueError: if OpenVINO is not installed or cannot read the file; if fewer than ``least_same`` percent of the predictions are the
            same and outputs differ by more than in :func:`to_integer_onnx`.
    """
    compiled, version = compiled_in_openvino(path, threads)
    names = [i.get_any_name() for i in compiled.inputs]
    given = partial(feeds, Path(path).name, names)
    data = take(batches, examples)
    found = compare(module, data, lambda inputs: list(compiled(given(tree_map(Tensor.numpy, inputs))).values()))
    if found[1] < least_same:
        refuse_disagreement("OpenVINO", module, data, found[1], found[3], least_same)
    integer, total = _kernels(compiled)
    return OpenVinoAgreement(*found, integer, total, version)


def compiled_in_openvino(path: str | Path, threads: int = 1, **more: Any) -> tuple[Any, str]:
    """The file compiled for the processor in float32 where it is not integer, with settings of OpenVINO's own, and its version."""
    openvino = _openvino()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, **more}
    try:
        return openvino.Core().compile_model(str(path), "CPU", settings), str(openvino.__version__)
    except RuntimeError as error:
        raise ValueError(f"{Path(path).name} cannot be opened in OpenVINO: {first_line(error)}") from error


def version_of_openvino() -> str:
    """The version that is installed.

    Raises:
        ValueError: if none is.
    """
    return str(_openvino().__version__)


def _openvino() -> Any:
    try:
        import openvino  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise ValueError("OpenVINO is not installed: pip install 'curvepress[openvino]'") from None
    return openvino


def _kernels(compiled: Any) -> tuple[dict[str, int], dict[str, int]]:
    integer: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        about = node.get_rt_info()
        kind = KINDS.get(str(about["layerType"].astype(str)) if "layerType" in about else "")
        if kind is not None:
            total[kind] += 1
            integer[kind] += str(about["runtimePrecision"].astype(str)) in INTEGERS
    return dict(integer), dict(total)
