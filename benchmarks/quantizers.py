"""Other quantizers, given the same network and calibration images, and OpenVINO's latency."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from benchmarks.quantization_table import IN_ONNXRUNTIME
from curvepress.export.integers import OPSET
from curvepress.export.kernels import FLOAT, INTEGER, optimised
from curvepress.export.onnx import feeds, input_names, open_session
from curvepress.export.openvino import compiled_in_openvino

ROUNDS, LASTING = 20, 0.05


class Missing(Exception):
    """A package that is not installed."""


def by_onnxruntime(model: nn.Module, path: Path, images: Sequence[Tensor], out: Path) -> None:
    """ONNX Runtime's static quantization with its defaults: QDQ, weights per channel, min-max calibration."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"x": x.numpy()} for x in self.left), None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(prepared), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)


def by_nncf(model: nn.Module, path: Path, images: Sequence[Tensor], out: Path) -> None:
    """NNCF's post-training quantization of the ONNX file, with its defaults."""
    try:
        import nncf
        import onnx
    except ImportError as error:
        raise Missing(str(error)) from None
    data = nncf.Dataset([x.numpy() for x in images], lambda x: {"x": x})
    onnx.save(nncf.quantize(onnx.load(path), data, subset_size=len(images)), out)


def by_torchao(model: nn.Module, path: Path, images: Sequence[Tensor], out: Path) -> None:
    """torchao's PT2E with its quantizer for x86 and its defaults, converted, and exported to ONNX as it is."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise Missing(str(error)) from None
    example, sizes = (images[0][:2],), ({0: Dim("batch")},)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, example, dynamic_shapes=sizes).module(), quantizer)
    with torch.no_grad():
        for x in images:
            prepared(x)
    program = torch.export.export(convert_pt2e(prepared), example, dynamic_shapes=sizes)
    exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
    assert exported is not None
    exported.save(str(out), external_data=False)


PEERS = {"onnxruntime": by_onnxruntime, "nncf": by_nncf, "torchao": by_torchao}


def kernels(path: Path) -> str:
    """How many products of a file ONNX Runtime executes on integers."""
    nodes = [node.op_type for node in optimised(path).graph.node]
    total = Counter(INTEGER.get(n) or FLOAT[n] for n in nodes if n in INTEGER or n in FLOAT)
    integer = Counter(INTEGER[n] for n in nodes if n in INTEGER)
    return ", ".join(f"{integer[kind]} of {count} {kind} integer" for kind, count in total.items())


def compare_in_openvino(paths: Mapping[str, Path], x: Any, batch: int) -> dict[str, np.ndarray]:
    """Seconds ``[rounds, 2]``, by the clock and of the processor, of each file, and of the first in ONNX Runtime; in turns, one thread.

    Nothing where OpenVINO is missing.
    """
    try:
        runs = {name: partial(_infer, compiled_in_openvino(path)[0].create_infer_request()) for name, path in paths.items()}
    except ValueError as error:
        print(error)
        return {}
    first = next(iter(paths.values()))
    session = open_session(first)
    runs[IN_ONNXRUNTIME] = lambda inputs: session.run(None, feeds(first.name, input_names(session), inputs))
    inputs = tree_map(lambda a: a[np.arange(batch) % len(a)], x)
    readings = np.array([[_reading(partial(run, inputs)) for run in runs.values()] for _ in range(ROUNDS)])
    return {name: readings[:, n] for n, name in enumerate(runs)}


def executed_in_openvino(path: Path, x: Any, rounds: int = 40) -> dict[str, tuple[int, float]]:
    """By kind of layer and the kernel that OpenVINO runs for it: how many there are, and their least milliseconds together."""
    compiled = compiled_in_openvino(path, PERF_COUNT=True)[0]
    request, least = compiled.create_infer_request(), {}
    for _ in range(rounds):
        _infer(request, x)
        for n, layer in enumerate(request.profiling_info):
            spent, key = 1000 * layer.cpu_time.total_seconds(), (n, f"{layer.node_type}, {layer.exec_type}")
            least[key] = min(least.get(key, np.inf), spent)
    kinds = dict.fromkeys(kind for (_, kind), spent in least.items() if spent)
    found = {kind: [spent for (_, other), spent in least.items() if other == kind and spent] for kind in kinds}
    return {kind: (len(times), sum(times)) for kind, times in found.items()}


def _infer(request: Any, inputs: Any) -> None:
    request.infer(inputs if isinstance(inputs, dict) else [inputs])


def _reading(run: Callable[[], Any]) -> tuple[float, float]:
    run()
    start, cpu, runs = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < LASTING or not runs:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs, (time.process_time() - cpu) / runs
