"""Gradients of single examples, from what one backward pass over many examples leaves at each use of a parameter.

A :class:`Factor` stands for the gradients of one operand, example by example, without holding them all: ``block`` makes
those of a few examples, ``squares`` the sum of their squares.  One rule for each operation says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .graph import Use, saved

CHUNK = 1 << 19
"""Elements of per-example gradients held at a time: 2 MiB, which caches hold, and which the C library keeps for the next ones; what is
larger it may give back to the system, page by page."""
WINDOWS = 8
"""Positions for each channel up to which a convolution in bfloat16 is better laid out as windows of its input."""


@dataclass(frozen=True, eq=False)
class Factor:
    """Gradients ``[examples, *shape]`` of one operand."""

    examples: int
    shape: tuple[int, ...]

    def block(self, start: int, stop: int) -> Tensor:
        """The gradients of examples ``start`` to ``stop``: ``[stop - start, *shape]``."""
        raise NotImplementedError

    def blocks(self, held: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of examples that together cover all, each small enough for ``held`` elements an example (by default a gradient's)."""
        step = max(1, CHUNK // max(1, held or torch.Size(self.shape).numel()))
        return ((a, min(a + step, self.examples)) for a in range(0, self.examples, step))

    def squares(self) -> Tensor:
        """Sum over the examples of the squared gradients: float64 ``[*shape]``."""
        return sum((summed_squares(self.block(a, b)) for a, b in self.blocks()), torch.zeros((), dtype=torch.float64))

    def row_squares(self) -> Tensor:
        """The same summed over each row too: float64 ``[rows, 1, ...]``."""
        return sum((squared_rows(self.block(a, b)) for a, b in self.blocks()), torch.zeros((), dtype=torch.float64))


def summed_squares(gradients: Tensor) -> Tensor:
    """Sum over the first dimension of squares, as float64; half precision is widened before it is squared."""
    wide = gradients if gradients.dtype == torch.float64 else gradients.float()
    return wide.square().sum(0).double()


def squared_rows(gradients: Tensor) -> Tensor:
    """Sum of squares over all dimensions but the second, which is kept first: float64 ``[rows, 1, ...]``."""
    wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(gradients, dim=tuple(range(2, gradients.ndim)), dtype=wide)
    return norms.double().square().sum(0).reshape(-1, *[1] * (gradients.ndim - 2))


@dataclass(frozen=True, eq=False)
class Given(Factor):
    """Gradients that are there already."""

    gradients: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        """See :class:`Factor`."""
        return self.gradients[start:stop]


@dataclass(frozen=True, eq=False)
class Outer(Factor):
    """``left' right`` for each example: ``left`` ``[examples, positions, rows]``, ``right`` ``[examples, positions, columns]``."""

    left: Tensor
    right: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        """See :class:`Factor`."""
        return torch.bmm(self.left[start:stop].transpose(1, 2), self.right[start:stop])

    def squares(self) -> Tensor:
        """With one position the squares of an outer product are the outer product of squares, and nothing need be held."""
        if self.left.shape[1] > 1:
            return super().squares()
        wide = torch.float64 if self.left.dtype == torch.float64 else torch.float32
        return (self.left[:, 0].to(wide).square().T @ self.right[:, 0].to(wide).square()).double()


@dataclass(frozen=True, eq=False)
class Convolved(Factor):
    """The weight of a convolution, for several output vectors an example: ``gradient`` is ``[examples, vectors, *of the result]``.

    One grouped convolution makes the gradients of many examples, a group an example with all of its vectors.
    """

    gradient: Tensor
    inputs: Tensor
    use: Use

    def blocks(self, held: int = 0) -> Iterator[tuple[int, int]]:
        """See :class:`Factor`."""
        return super().blocks(held or self.gradient.shape[1] * torch.Size(self.shape).numel())

    def block(self, start: int, stop: int) -> Tensor:
        """The gradients of examples ``start`` to ``stop``, those of an example's vectors side by side: ``[*, *shape]``."""
        if self.narrow:
            found = torch.bmm(self._slopes(start, stop), self._seen(start, stop))
            return found.view(-1, self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 2)
        g, x, node = self.gradient[start:stop], self.inputs[start:stop], self.use.node
        like = x.new_empty(g.shape[:2].numel() * self.shape[0], *self.shape[1:])
        more = (saved(node, "transposed"), list(saved(node, "output_padding")), len(g) * saved(node, "groups"), [False, True, False])
        g, x = g.flatten(0, 2)[None], x.flatten(0, 1)[None]
        return torch.ops.aten.convolution_backward(g, x, like, None, *self._geometry, *more)[1].view(-1, *self.shape)

    def row_squares(self) -> Tensor:
        """With few positions a row's square goes by the products of what these see, and the gradients need not be made."""
        if not self.few:
            return super().row_squares()
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.gradient.device)
        for a, b in self.blocks(self._positions * self._width):
            slopes, seen = self._slopes(a, b), self._seen(a, b)
            squares = (torch.bmm(slopes, torch.bmm(seen, seen.transpose(1, 2))) * slopes).sum(2)
            total += squares.clamp_min(0).double().view(-1, self.shape[0]).sum(0)
        return total.reshape(-1, *[1] * (len(self.shape) - 1))

    @cached_property
    def few(self) -> bool:
        """Whether there are so few positions that their products with each other cost less than the gradients."""
        rows = self.gradient.shape[1] * self.shape[0]
        fine = plain(self.use) and self.gradient.dtype in (torch.float32, torch.float64)
        return fine and 2 * self._positions * (rows + self._width) < rows * self._width

    @cached_property
    def narrow(self) -> bool:
        """Whether products of matrices are faster: in bfloat16 on a processor, where positions are few for the channels there are."""
        kind = self.gradient.dtype == torch.bfloat16 and self.gradient.device.type == "cpu"
        return kind and plain(self.use) and self._positions <= WINDOWS * self.shape[1]

    @property
    def _positions(self) -> int:
        return self.gradient.shape[3:].numel()

    @property
    def _width(self) -> int:
        return torch.Size(self.shape[1:]).numel()

    @property
    def _geometry(self) -> list[list[int]]:
        return [list(saved(self.use.node, k)) for k in ("stride", "padding", "dilation")]

    def _slopes(self, start: int, stop: int) -> Tensor:
        """``[examples, vectors * rows, positions]``."""
        return self.gradient[start:stop].flatten(1, 2).flatten(2)

    def _seen(self, start: int, stop: int) -> Tensor:
        """What each position of the result sees: ``[examples, positions, kernel height * kernel width * channels]``."""
        return _windows(self.inputs[start:stop], self.shape[2:], self.gradient.shape[3:], self._geometry)


def _windows(x: Tensor, kernel: Sequence[int], result: Sequence[int], geometry: Sequence[Sequence[int]]) -> Tensor:
    (down, across), (top, left), (below, beside) = geometry
    padded = F.pad(x.movedim(1, -1), (0, 0, left, left, top, top))
    n, (high, wide), step = len(x), result, padded.stride()
    shape = (n, high, wide, *kernel, x.shape[1])
    strides = (step[0], down * step[1], across * step[2], below * step[1], beside * step[2], step[3])
    return padded.as_strided(shape, strides).reshape(n, high * wide, -1)


@dataclass(frozen=True, eq=False)
class Looked(Factor):
    """The table of an embedding: ``rows`` ``[examples, positions]`` were looked up and got ``gradient`` ``[..., width]``."""

    rows: Tensor
    gradient: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        """See :class:`Factor`."""
        n = stop - start
        out = self.gradient.new_zeros(n * self.shape[0], self.shape[1])
        out.index_add_(0, self._places(start, stop).flatten(), self.gradient[start:stop].flatten(0, 1))
        return out.view(n, *self.shape)

    def squares(self) -> Tensor:
        """Only rows that were looked up are touched."""
        places, inverse = self._places(0, self.examples).flatten().unique(return_inverse=True)
        sums = self.gradient.new_zeros(len(places), self.shape[1], dtype=torch.float64)
        sums.index_add_(0, inverse, self.gradient.flatten(0, 1).double())
        out = sums.new_zeros(self.shape)
        return out.index_add_(0, places % self.shape[0], sums.square())

    def narrowed(self) -> tuple[Tensor, Factor]:
        """The numbers of the rows that were looked up, and the gradients of these alone; all others are zero."""
        rows, places = self.rows.unique(return_inverse=True)
        return rows, Looked(self.examples, (len(rows), *self.shape[1:]), places, self.gradient)

    def _places(self, start: int, stop: int) -> Tensor:
        first = torch.arange(stop - start, device=self.rows.device)[:, None] * self.shape[0]
        return self.rows[start:stop] + first


Rule = Callable[[Use, Tensor, int, int], Factor | None]
"""``(use, gradient of the operation's result, examples, axis) -> Factor``; None where the rule does not apply.

``axis`` says where the examples are: 0, the first dimension (of a matrix of rows: example by example), or 1, the second
(rows: position by position), as in attention over ``[positions, examples, width]``.
"""
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enters a rule for operations by the names autograd gives them."""
    return lambda function: RULES.update(dict.fromkeys(names, function)) or function


def factor(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """The gradients of ``use``'s operand by example; None if no rule knows the operation or the layout.

    Raises:
        RuntimeError: if the layout does not fit.
    """
    known = RULES.get(use.operation)
    return known(use, gradient, examples, axis) if known else None


def _rows(matrix: Tensor, examples: int, axis: int) -> Tensor:
    """``[examples, positions, width]`` of a matrix whose rows are examples times positions, in the order ``axis`` says."""
    return matrix.reshape(examples, -1, matrix.shape[-1]) if axis == 0 else matrix.reshape(-1, examples, matrix.shape[-1]).transpose(0, 1)


def _reduced(gradient: Tensor, use: Use, examples: int, axis: int) -> Factor | None:
    """A gradient of the result's shape, summed over all that was broadcast, but for the examples."""
    if gradient.ndim <= axis or gradient.shape[axis] % examples or (axis and gradient.shape[axis] != examples):
        return None
    lead = gradient.movedim(axis, 0)
    shape = [1] * (gradient.ndim - len(use.shape)) + list(use.shape)
    shape.insert(0, shape.pop(axis))
    if shape[0] != 1:
        return None
    lead = lead.reshape(examples, -1, *lead.shape[1:])
    shared = [1, *(d + 1 for d, n in enumerate(shape) if n == 1 and d)]
    return Given(examples, use.shape, lead.sum(shared).reshape(examples, *use.shape))


@rule("Addmm")
def addmm(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """``bias + x @ w``: linear layers, and those that store the weight transposed."""
    if saved(use.node, "alpha") != 1 or saved(use.node, "beta") != 1:
        return None
    if use.position == 0:
        return _bias(use, gradient, examples, axis)
    return mm(use, gradient, examples, axis) if use.position == 2 else None


@rule("Mm")
def mm(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """``x @ w``."""
    inputs = saved(use.node, "mat1" if use.operation == "Addmm" else "self")
    if use.position == 0 or inputs is None:
        return None
    return Outer(examples, use.shape, _rows(inputs, examples, axis), _rows(gradient, examples, axis))


@rule("Convolution")
def convolution(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """Convolutions of any dimension, grouped, dilated or transposed."""
    if axis != 0 or len(gradient) != examples:
        return None
    if use.position == 2:
        return Given(examples, use.shape, gradient.flatten(2).sum(2))
    return convolved(use, [gradient]) if use.position == 1 and saved(use.node, "input") is not None else None


def convolved(use: Use, gradients: Sequence[Tensor]) -> Convolved:
    """The gradients of a convolution's weight for several output vectors an example, if it is :func:`plain`; for one in any case."""
    alone, inputs = len(gradients) == 1, saved(use.node, "input")
    return Convolved(len(inputs), use.shape, gradients[0][:, None] if alone else torch.stack(list(gradients), 1), inputs, use)


def plain(use: Use) -> bool:
    """Whether a convolution is of two dimensions, of one group and not transposed."""
    return len(saved(use.node, "stride")) == 2 and saved(use.node, "groups") == 1 and not saved(use.node, "transposed")


@rule("Embedding")
def embedding(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """Lookups in a table."""
    looked = saved(use.node, "indices")
    if saved(use.node, "scale_grad_by_freq") or looked.ndim <= axis or looked.shape[axis] != examples:
        return None
    keep = looked != saved(use.node, "padding_idx")
    places, g = looked.movedim(axis, 0).reshape(examples, -1), (gradient * keep[..., None]).movedim(axis, 0)
    return Looked(examples, use.shape, places, g.reshape(examples, -1, g.shape[-1]))


@rule("NativeLayerNorm")
def layer_norm(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """Weight and bias of layer normalisation."""
    if use.position == 1:
        gradient = gradient * (saved(use.node, "input") - saved(use.node, "result1")) * saved(use.node, "result2")
    return _reduced(gradient, use, examples, axis)


@rule("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
def batch_norm(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """Weight and bias of batch normalisation in evaluation mode."""
    if saved(use.node, "training") or axis != 0 or len(gradient) != examples:
        return None
    if use.position == 1:
        mean, variance = (_channelwise(saved(use.node, k), gradient) for k in ("running_mean", "running_var"))
        gradient = gradient * (saved(use.node, "input") - mean) * (variance + _epsilon(use)).rsqrt()
    return Given(examples, use.shape, gradient.flatten(2).sum(2) if gradient.ndim > 2 else gradient)


@rule("NativeGroupNorm")
def group_norm(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """Weight and bias of group normalisation."""
    if axis != 0 or len(gradient) != examples:
        return None
    if use.position == 1:
        x, mean, rstd = (saved(use.node, k) for k in ("input", "result1", "result2"))
        grouped = x.reshape(*mean.shape, -1)
        gradient = gradient * ((grouped - mean[..., None]) * rstd[..., None]).view_as(x)
    return Given(examples, use.shape, gradient.reshape(*gradient.shape[:2], -1).sum(2))


@rule("Mul")
def mul(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """A parameter times an activation: layer scale, the gain of RMS normalisation."""
    other = saved(use.node, "self" if use.position == 1 else "other")
    return None if other is None else _reduced(gradient * other, use, examples, axis)


@rule("Add")
def add(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """A parameter added to an activation: bias, position embedding."""
    return _reduced(gradient, use, examples, axis) if use.position == 0 or saved(use.node, "alpha") == 1 else None


@rule("Expand")
def expand(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor | None:
    """A parameter laid out once for each example: class tokens."""
    return _reduced(gradient, use, examples, axis)


def _bias(use: Use, gradient: Tensor, examples: int, axis: int) -> Factor:
    return Given(examples, use.shape, _rows(gradient, examples, axis).sum(1))


def _channelwise(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _epsilon(use: Use) -> float:
    own = saved(use.node, "eps")
    return float(own if own is not None else saved(use.node, "epsilon"))
