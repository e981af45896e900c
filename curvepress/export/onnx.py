"""ONNX: one file with any batch size, run in ONNX Runtime and compared with the model before it gets its name."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from ..objective import Example, arguments, call, in_a_tuple

OPSET = 18
"""The operator set of the files: the one PyTorch's exporter is written in, so that nothing is converted afterwards."""

Inputs = tuple[Any, ...]
"""An example as a tuple, which may end in a mapping of keyword inputs."""
Written = TypeVar("Written")


@dataclass(frozen=True)
class Agreement:
    """How closely an exported file computes what the model computes.

    ``error`` is the largest absolute difference of any output and ``relative`` the largest difference of an output
    divided by that output's largest absolute value, over inputs of each of ``sizes`` examples (0 where the inputs do not
    share their first dimension).  ``batch`` is
    ``dynamic`` (the file takes any number of examples) or ``static`` (only inputs shaped like the example).  ``bytes`` is the size of
    the file.  ``lengths`` are those of the sequences tried: two where the file takes sequences of any length, none without sequences.
    """

    error: float
    relative: float
    tolerance: float
    batch: str
    sizes: tuple[int, ...]
    bytes: int
    opset: int
    versions: Mapping[str, str]
    lengths: tuple[int, ...] = ()


def to_onnx(model: nn.Module, example: Example, path: str | Path, *, tolerance: float = 1e-4) -> Agreement:
    """Write ``model`` to ``path`` as ONNX and return how closely the file agrees with it.

    The file is run in ONNX Runtime on the example and on random inputs of the example's and of another batch size.
    It gets its name only if every output agrees.  Dimension 0 of every input counts examples.  A model that takes
    one batch size only is written with that size: a warning says why and ``batch`` is ``static``.  Dimension 1 of inputs of whole
    numbers that all share it counts positions of a sequence: where the model allows it, the file takes any length too.

    Args:
        example: a tensor, keyword inputs by name (the file's inputs have these names), or several in order, the last of
            which may be such a mapping.
        model: a module, or the graph module of an exported program.  It runs in eval mode and gets its modes back.
        tolerance: largest difference allowed, relative to the largest absolute value of the output.

    Raises:
        ValueError: if the model cannot be exported, or the file disagrees with it; no file is left then.
    """
    inputs = _checked(example)
    path = Path(path)
    with temporary(path) as written:
        with evaluating(model), quiet():
            program, why, lengths = _exported(model, inputs)
        program.save(written, external_data=False)
        with evaluating(model), torch.no_grad():
            agreement = _compare(model, written, _trials(inputs, dynamic=not why, lengths=lengths), tolerance)
        os.replace(written, path)
    if why:
        shapes = ", ".join(str(tuple(x.shape)) for x in _pytree.tree_leaves(inputs))
        warnings.warn(f"{path.name} takes inputs of shape {shapes} only: {why}", stacklevel=2)
    return agreement


def _checked(example: Example) -> Inputs:
    inputs = in_a_tuple(example)
    tensors = _pytree.tree_leaves(inputs)
    if not tensors or not all(isinstance(x, Tensor) and x.numel() for x in tensors):
        raise ValueError(f"the example must be one or more tensors that are not empty; got {[type(x).__name__ for x in tensors]}")
    return _each(inputs, lambda x: x.detach().cpu())


def _each(inputs: Inputs, change: Callable[[Tensor], Any]) -> Inputs:
    return _pytree.tree_map(change, inputs)


def _batch(inputs: Inputs) -> int:
    """The number of examples, or 0 where the inputs do not share their first dimension."""
    sizes = {len(x) if x.ndim else 0 for x in _pytree.tree_leaves(inputs)}
    return sizes.pop() if len(sizes) == 1 else 0


def _length(inputs: Inputs) -> int:
    """The number of positions of sequences of whole numbers, or 0 where there are none or of several lengths."""
    sizes = {x.shape[1] for x in _pytree.tree_leaves(inputs) if _sequence(x)}
    return sizes.pop() if len(sizes) == 1 else 0


def _sequence(x: Tensor) -> bool:
    return x.ndim == 2 and not x.is_floating_point() and not x.is_complex()


def _exported(model: nn.Module, inputs: Inputs) -> tuple[torch.onnx.ONNXProgram, str, bool]:
    """The program; where it takes one batch size only, the reason; and whether it takes sequences of any length."""
    why = "its inputs do not share their first dimension"
    if size := _batch(inputs):
        several = _resized(inputs, max(2, size))  # the exporter takes a size of 1 for a constant
        try:
            program, lengths = of_any_size(model, several, onnx_program)
            return program, "", lengths
        except Exception as error:  # the exporter raises whatever the model's own code raises
            why = first_line(error)
    try:
        return onnx_program(exported(model, inputs, None)), why, False
    except Exception as error:
        raise ValueError(
            f"the model cannot be exported to ONNX: {first_line(error)}; the exception that caused this one shows where"
        ) from error


def of_any_size(model: nn.Module, inputs: Inputs, write: Callable[[ExportedProgram], Written]) -> tuple[Written, bool]:
    """What ``write`` makes of the exported model with the batch size left open, and whether the length of sequences is open too."""
    if _length(inputs) > 1:
        with suppress(Exception):  # of a model whose code holds the length; the exporter raises whatever that raises
            return write(exported(model, inputs, _open(model, inputs, lengths=True))), True
    return write(exported(model, inputs, _open(model, inputs, lengths=False))), False


def exported(model: nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    """The model as a program of ``torch.export`` with these dimensions left open."""
    positional, named = arguments(inputs)
    return torch.export.export(model, positional, named, dynamic_shapes=shapes, strict=False)


def _open(model: nn.Module, inputs: Inputs, *, lengths: bool) -> dict[str, Any]:
    """Dimension 0 of every input left open, and with ``lengths`` dimension 1 of sequences, by the parameters of ``forward``."""
    batch = {0: Dim("batch")}
    shape = lambda x: {**batch, 1: Dim.DYNAMIC} if lengths and _sequence(x) else batch  # noqa: E731
    positional, named = _pytree.tree_map(shape, arguments(inputs))
    return dict(inspect.signature(model.forward).bind(*positional, **named).arguments)


def onnx_program(program: ExportedProgram, opset: int = OPSET, **options: Any) -> torch.onnx.ONNXProgram:
    """The ONNX program of an exported one."""
    found = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, **options)
    if found is None:
        raise RuntimeError("PyTorch's exporter returned nothing")
    return found


def _trials(inputs: Inputs, *, dynamic: bool, lengths: bool) -> list[Inputs]:
    """The example itself, random inputs like it and, where the file takes them, of another batch size and another length."""
    generator = torch.Generator().manual_seed(0)
    like = [_each(inputs, lambda x: _random_like(x, generator))]
    if dynamic:
        other = _resized(inputs, _batch(inputs) + 3)
        other = _each(other, lambda x: torch.cat([x, x[:, :3]], 1) if lengths and _sequence(x) else x)
        like.append(_each(other, lambda x: _random_like(x, generator)))
    return [inputs, *like]


def _compare(model: nn.Module, path: Path, trials: list[Inputs], tolerance: float) -> Agreement:
    session = open_session(path)
    absolute, relative = [0.0], [0.0]
    for inputs in trials:
        wanted = [x.detach().numpy() for x in _pytree.tree_leaves(call(model, inputs)) if isinstance(x, Tensor)]
        found = _run(session, feeds(path.name, input_names(session), _each(inputs, Tensor.numpy)))
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
    sizes, lengths = (tuple(sorted({count(t) for t in trials} - {0})) for count in (_batch, _length))
    batch = "dynamic" if len(sizes) > 1 else "static"
    return Agreement(max(absolute), max(relative), tolerance, batch, sizes or (0,), path.stat().st_size, OPSET, versions(), lengths)


def feeds(file: str, wanted: Sequence[str], inputs: Any) -> dict[str, Any]:
    """What a file with these names of inputs is given: keyword inputs under their names, the others in order.

    Raises:
        ValueError: if the file takes others.
    """
    positional, named = arguments(inputs)
    rest = [name for name in wanted if name not in named]
    if len(rest) != len(positional) or len(wanted) != len(positional) + len(named):
        given = [*(["unnamed"] * len(positional)), *named]
        raise ValueError(f"{file} takes {len(wanted)} inputs ({', '.join(wanted)}), the example has {len(given)} ({', '.join(given)})")
    return {**dict(zip(rest, positional, strict=True)), **named}


def input_names(session: onnxruntime.InferenceSession) -> list[str]:
    """The names of a file's inputs, in order."""
    return [i.name for i in session.get_inputs()]


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


def _resized(inputs: Inputs, size: int) -> Inputs:
    return _each(inputs, lambda x: x[torch.arange(size) % len(x)].contiguous())


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the mean and deviation of ``x``; for integers, values drawn from those that ``x`` holds; rows of a mask."""
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x.double().mean() + noise * x.double().std(correction=0)).to(x.dtype)
    if _sequence(x) and not ((x != 0) & (x != 1)).any():  # at random, all of an example might be masked
        return x[torch.randint(len(x), x.shape[:1], generator=generator)]
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
