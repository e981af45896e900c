"""What is asked of the curvature: traces of blocks, the curvature along directions, traces with respect to activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Some elements of one parameter, each under a label.

    ``labels`` is an integer array that broadcasts to the parameter's shape; -1 leaves an element out.
    """

    tensor: str
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Trace:
    """The trace of the curvature's diagonal block of each label ``0 .. size-1``: the sum of its diagonal over the label's elements."""

    parts: tuple[Part, ...]
    size: int


@dataclass(frozen=True, eq=False)
class Direction:
    """``d_c' C d_c`` for each label ``c``: the curvature ``C`` along the displacement ``d`` restricted to the label's elements.

    ``moves`` holds the displacement of each tensor; those not in it move by themselves, or as given to :func:`estimate`.  Parts
    may lie in several tensors: their slopes are added before they are squared, so the coupling between tensors counts.
    """

    parts: tuple[Part, ...]
    size: int
    moves: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Activation:
    """Trace with respect to what the module named ``module`` returns, summed over its elements and averaged over examples.

    With ``dim`` the trace of each index of that dimension instead (1 for the channels of an image).  Source: HAWQ-V2 (Dong
    et al., NeurIPS 2020), section 3.4: the Hessian of the mean loss is block-diagonal over examples, so its trace per
    example is a mean over examples and asks for no fixed input size (with ``dim``, that dimension must be fixed).
    """

    module: str
    dim: int | None = None


Measure = Trace | Direction | Activation


def along(tensor: str, shape: Sequence[int], dim: int, labels: Sequence[int] | np.ndarray | None = None) -> Part:
    """The elements of ``tensor`` labelled by their index in dimension ``dim``, or by ``labels[index]``."""
    own = np.arange(shape[dim]) if labels is None else np.asarray(labels)
    if own.shape != (shape[dim],):
        raise ValueError(f"dimension {dim} of {tensor!r} has {shape[dim]} indices but {own.shape} labels; give one label for each")
    return Part(tensor, own.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]))


def _one(part: Part) -> Trace:
    return Trace((part,), int(part.labels.max()) + 1)


def output_channels(tensor: str, weight: Tensor) -> Trace:
    """One trace for each output channel (row of a linear layer, filter of a convolution) of ``weight``."""
    return _one(along(tensor, weight.shape, 0))


def input_channels(tensor: str, weight: Tensor) -> Trace:
    """One trace for each input channel (column of a linear layer) of ``weight``."""
    return _one(along(tensor, weight.shape, 1))


def blocks(tensor: str, weight: Tensor, count: int, dim: int = 0) -> Trace:
    """One trace for each of ``count`` equal runs of indices of ``dim``: the heads of a projection.

    Raises:
        ValueError: if the dimension cannot be divided so.
    """
    size = weight.shape[dim]
    if size % count:
        raise ValueError(f"dimension {dim} of {tensor!r} has {size} indices, which {count} blocks cannot share equally")
    return _one(along(tensor, weight.shape, dim, np.arange(size) // (size // count)))


def elements(tensor: str, weight: Tensor) -> Trace:
    """The diagonal itself: one trace for each element of ``weight``, in row-major order."""
    return _one(Part(tensor, np.arange(weight.numel()).reshape(weight.shape)))


def layer(*tensors: str) -> Trace:
    """One trace over all elements of ``tensors``: of a layer, or of the whole network if all are named."""
    return Trace(tuple(Part(t, np.zeros((), dtype=int)) for t in tensors), 1)


def watched(measures: Mapping[str, Measure]) -> list[str]:
    """The parameters that ``measures`` ask about, sorted."""
    return sorted({p.tensor for m in measures.values() if not isinstance(m, Activation) for p in m.parts})


def by_rows(measures: Mapping[str, Measure], shapes: Mapping[str, Sequence[int]]) -> frozenset[str]:
    """The parameters of which no trace tells one element of a row, an index of the first dimension, from another."""
    parts = [p for m in measures.values() if isinstance(m, Trace) for p in m.parts]
    fine = {p.tensor for p in parts if len(shapes[p.tensor]) < 2 or any(n > 1 for n in p.labels.shape[1 - len(shapes[p.tensor]) :])}
    return frozenset(p.tensor for p in parts) - fine


def gathered(values: Tensor, labels: np.ndarray, size: int, lead: int = 0) -> Tensor:
    """Sums of ``values`` ``[*lead, *shape]`` over the elements of each label: float64 ``[*lead, size]``."""
    where = torch.as_tensor(labels, device=values.device)
    where = where.reshape([1] * (values.ndim - lead - where.ndim) + list(where.shape))
    shared = [lead + d for d, n in enumerate(where.shape) if n == 1]
    sums = (values.sum(shared, keepdim=True, dtype=torch.float64) if shared else values.double()).flatten(lead).movedim(-1, 0)
    flat = where.flatten()
    out = torch.zeros(size, *sums.shape[1:], dtype=torch.float64, device=values.device)
    return out.index_add_(0, flat[flat >= 0], sums[flat >= 0]).movedim(0, -1)
