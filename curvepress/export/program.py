"""A quantized module as a program of ``torch.export``: integers in a file that needs nothing but PyTorch to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree

from ..objective import Batches, call
from ..quantization.quantized.lowering import DECOMPOSITIONS, lower
from .comparison import compare, example_of, take
from .onnx import Inputs, evaluating, first_line, of_any_size, quiet, temporary


@dataclass(frozen=True)
class ProgramAgreement:
    """How closely a program read back computes what the module does, over ``examples`` real ones: see :class:`IntegerAgreement`."""

    examples: int
    same: float
    error: float
    mean: float
    bytes: int


def to_program(module: nn.Module, batches: Batches, path: str | Path, *, examples: int = 64, tolerance: float = 1e-5) -> ProgramAgreement:
    """Write a quantized module to ``path`` (``.pt2``) for any batch size, in ATen operators alone; weights are int8.

    The file is read back and run on the batches; it gets its name only if no output differs by more than ``tolerance``.

    Raises:
        ValueError: if the graph cannot be exported or the program disagrees; no file is left then.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"programs of torch.export are written to files that end in .pt2, got {path.name}")
    data = take(batches, examples)
    with temporary(path.with_suffix("")) as without:
        written = without.with_suffix(".pt2")
        try:
            torch.export.save(_program(module, data[0]), written)
            read = torch.export.load(written).module()
            found = compare(module, data, lambda inputs: [x.numpy() for x in _pytree.tree_leaves(call(read, inputs))])
            if not found[2] <= tolerance:
                raise ValueError(f"the program differs from the module by {found[2]:.2g}, more than {tolerance:g}; no file was left")
            os.replace(written, path)
        finally:
            written.unlink(missing_ok=True)
    return ProgramAgreement(*found, path.stat().st_size)


def _program(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    graph, example = lower(module), example_of(inputs)
    try:
        with evaluating(graph), quiet(), torch.no_grad():
            return of_any_size(graph, example, lambda program: program.run_decompositions(dict(DECOMPOSITIONS)))[0]
    except Exception as error:  # the exporter raises whatever it meets
        raise ValueError(f"the quantized graph cannot be exported: {first_line(error)}") from error
