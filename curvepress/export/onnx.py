"""ONNX: one file with any batch size, run in ONNX Runtime and compared with the model before it gets its name."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree

OPSET = 18
"""The operator set of the files: the one PyTorch's exporter is written in, so that nothing is converted afterwards."""

Example = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Agreement:
    """How closely an exported file computes what the model computes.

    ``error`` is the largest absolute difference of any output and ``relative`` the largest difference of an output
    divided by that output's largest absolute value, over inputs of each of ``sizes`` examples (0 where the inputs do not
    share their first dimension).  ``batch`` is
    ``dynamic`` (the file takes any number of examples) or ``static`` (only inputs shaped like the example).  ``bytes`` is the size of
    the file.
    """

    error: float
    relative: float
    tolerance: float
    batch: str
    sizes: tuple[int, ...]
    bytes: int
    opset: int
    versions: Mapping[str, str]


def to_onnx(model: nn.Module, example: Example, path: str | Path, *, tolerance: float = 1e-4) -> Agreement:
    """Write ``model`` to ``path`` as ONNX and return how closely the file agrees with it.

    The file is run in ONNX Runtime on the example and on random inputs of the example's and of another batch size.
    It gets its name only if every output agrees.  Dimension 0 of every input counts examples.  A model that takes
    one batch size only is written with that size: a warning says why and ``batch`` is ``static``.

    Args:
        model: a module, or the graph module of an exported program.  It runs in eval mode and gets its modes back.
        tolerance: largest difference allowed, relative to the largest absolute value of the output.

    Raises:
        ValueError: if the model cannot be exported, or the file disagrees with it; no file is left then.
    """
    inputs = _checked(example)
    path = Path(path)
    with temporary(path) as written:
        with evaluating(model), quiet():
            program, why = _exported(model, inputs)
        program.save(written, external_data=False)
        with evaluating(model), torch.no_grad():
            agreement = _compare(model, written, _trials(inputs, dynamic=not why), tolerance)
        os.replace(written, path)
    if why:
        warnings.warn(f"{path.name} takes inputs of shape {', '.join(str(tuple(x.shape)) for x in inputs)} only: {why}", stacklevel=2)
    return agreement


def _checked(example: Example) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(x, Tensor) and x.numel() for x in inputs):
        raise ValueError(f"the example must be one or more tensors that are not empty; got {[type(x).__name__ for x in inputs]}")
    return tuple(x.detach().cpu() for x in inputs)


def _batch(inputs: tuple[Tensor, ...]) -> int:
    """The number of examples, or 0 where the inputs do not share their first dimension."""
    sizes = {len(x) if x.ndim else 0 for x in inputs}
    return sizes.pop() if len(sizes) == 1 else 0


def _exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.onnx.ONNXProgram, str]:
    """The program and, where it takes one batch size only, the reason."""
    why = "its inputs do not share their first dimension"
    if size := _batch(inputs):
        several = _resized(inputs, max(2, size))  # the exporter takes a size of 1 for a constant
        try:
            return _program(model, several, any_batch(model, len(inputs))), ""
        except Exception as error:  # the exporter raises whatever the model's own code raises
            why = first_line(error)
    try:
        return _program(model, inputs, None), why
    except Exception as error:
        raise ValueError(
            f"the model cannot be exported to ONNX: {first_line(error)}; the exception that caused this one shows where"
        ) from error


def any_batch(model: nn.Module, inputs: int) -> tuple[Any, ...]:
    """Dimension 0 of every input left open; a parameter like ``*inputs`` counts as one."""
    shapes = tuple({0: Dim("batch")} for _ in range(inputs))
    parameters = inspect.signature(model.forward).parameters.values()
    return (shapes,) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else shapes


def _program(model: nn.Module, inputs: tuple[Tensor, ...], shapes: Any) -> torch.onnx.ONNXProgram:
    graph = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    program = torch.onnx.export(graph, dynamo=True, opset_version=OPSET, verbose=False)
    if program is None:
        raise RuntimeError("PyTorch's exporter returned nothing")
    return program


def _trials(inputs: tuple[Tensor, ...], *, dynamic: bool) -> list[tuple[Tensor, ...]]:
    """The example itself, random inputs like it and, where the file takes them, random inputs of another batch size."""
    generator = torch.Generator().manual_seed(0)
    like = [tuple(_random_like(x, generator) for x in inputs)]
    if dynamic:
        like.append(tuple(_random_like(x, generator) for x in _resized(inputs, _batch(inputs) + 3)))
    return [inputs, *like]


def _compare(model: nn.Module, path: Path, trials: list[tuple[Tensor, ...]], tolerance: float) -> Agreement:
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]
    absolute, relative = [0.0], [0.0]
    for inputs in trials:
        wanted = [x.detach().numpy() for x in _pytree.tree_leaves(model(*inputs)) if isinstance(x, Tensor)]
        found = _run(session, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
        if [w.shape for w in wanted] != [f.shape for f in found]:
            raise ValueError(
                f"the file's outputs have shapes {[f.shape for f in found]}, the model's {[w.shape for w in wanted]}; no file was left"
            )
        for w, f in zip(wanted, found, strict=True):
            a, r = _difference(w, f)
            absolute.append(a)
            relative.append(r)
    if not max(relative) <= tolerance:
        raise ValueError(
            f"the file disagrees with the model by {max(relative):.2g} of the largest output, more than the tolerance of {tolerance:g}; "
            "is the model random in eval mode, or does it act on the values of its inputs?  No file was left"
        )
    sizes = tuple(sorted({_batch(t) for t in trials}))
    batch = "dynamic" if len(sizes) > 1 else "static"
    return Agreement(max(absolute), max(relative), tolerance, batch, sizes, path.stat().st_size, OPSET, versions())


def _difference(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Largest absolute difference, and the same relative to the largest absolute value wanted; infinite for a lone NaN or infinity."""
    w, f = wanted.astype(np.float64), found.astype(np.float64)
    apart = np.where((w == f) | (np.isnan(w) & np.isnan(f)), 0.0, np.abs(w - f))
    apart = np.nan_to_num(apart, nan=np.inf, posinf=np.inf)
    largest = np.abs(w[np.isfinite(w)]).max(initial=0.0)
    error = float(apart.max(initial=0.0))
    return error, error / max(float(largest), float(np.finfo(np.float32).tiny))


def session_options(threads: int = 1) -> onnxruntime.SessionOptions:
    """Options for ``threads`` threads of the processor, which sleep while they wait."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(
    model: str | Path | bytes, threads: int = 1, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """A file, or the content of one, opened in ONNX Runtime on ``threads`` threads of the processor, or with other ``options``."""
    given = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(given, options or session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no public base
        name = "the model" if isinstance(model, bytes) else Path(model).name
        raise ValueError(f"{name} cannot be opened in ONNX Runtime: {first_line(error)}") from error


def _run(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    try:
        return list(session.run(None, feeds))
    except Exception as error:
        raise ValueError(f"the file fails in ONNX Runtime on inputs {[x.shape for x in feeds.values()]}: {first_line(error)}") from error


def _resized(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    rows = torch.arange(size) % len(inputs[0])
    return tuple(x[rows].contiguous() for x in inputs)


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the mean and deviation of ``x``, or, for integers, values drawn from those that ``x`` holds."""
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x.double().mean() + noise * x.double().std(correction=0)).to(x.dtype)
    return x.flatten()[torch.randint(x.numel(), x.shape, generator=generator)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode for a while; every part gets its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    with suppress(NotImplementedError):  # of an exported program's graph, which holds its mode
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages it does not need, and on PyTorch's own use of its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A file next to ``path`` that is gone afterwards unless it was renamed."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {str(path.parent)!r} to write {path.name} in; make it first")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """What went wrong first: the exporter wraps one exception in another."""
    while error.__cause__:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def versions() -> dict[str, str]:
    """Versions of all that takes part in an export."""
    return {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")}
