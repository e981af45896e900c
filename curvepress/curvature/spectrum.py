"""Spectra of the curvature as diagnostics: largest eigenvalues and densities, from products with vectors alone.

C = curvature.matrix(model, loss, batches, ["conv1.weight"])
curvature.top_eigenvalue(C).value, curvature.spectral_density(C).mean(np.abs)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

from ..objective import Batch, Batches, Loss
from .measures import layer
from .products import Kind, Product, differentiable, gap, gauss_newton, hessian, pieces
from .recording import View
from .setup import evaluating, view_of
from .sharding import check
from .trees import examples, mapped

MATRICES: Mapping[str, Kind] = {k.__name__: k for k in (hessian, gauss_newton, gap)}
"""Which matrix: the Hessian, the Gauss-Newton matrix, or the Hessian minus it."""


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue: some eigenvalue of the matrix lies within ``residual`` of ``value``, found with ``products`` products."""

    value: float
    residual: float
    products: int


@dataclass(frozen=True, eq=False)
class Density:
    """Eigenvalues of a matrix of order ``size`` as weighted points, several independent sets of them.

    Attributes:
        nodes: one float64 array for each random start, of at most ``steps`` points.
        weights: of the points; those of one start sum to 1.
    """

    nodes: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    size: int

    def mean(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """The mean of ``function`` over the eigenvalues, ``tr f(C) / size``, and its standard error over the starts."""
        rows = [float(w @ function(x)) for x, w in zip(self.nodes, self.weights, strict=True)]
        stderr = float(np.std(rows, ddof=1)) / len(rows) ** 0.5 if len(rows) > 1 else float("nan")
        return float(np.mean(rows)), stderr

    def at(self, points: np.ndarray, width: float) -> np.ndarray:
        """The density at ``points``, each eigenvalue widened to a Gaussian of standard deviation ``width``; it integrates to 1."""
        x, w = np.concatenate(self.nodes), np.concatenate(self.weights) / len(self.weights)
        bells = np.exp(-0.5 * np.square((np.asarray(points)[..., None] - x) / width)) / (width * np.sqrt(2 * np.pi))
        return bells @ w


def matrix(
    model: nn.Module, loss: Loss, batches: Batches, parameters: Sequence[str], *, kind: str = "hessian", micro: int = 32
) -> LinearOperator:
    """The curvature of the mean loss over ``batches`` in ``parameters``, as a float64 operator of order of their total size.

    The elements follow one another parameter by parameter, in the order given, row-major.  The model is used in evaluation mode.
    Products run ``micro`` examples at a time; where that is all there are, one recorded graph serves every product.

    Args:
        parameters: names: one for a block, all for the whole matrix.
        kind: one of :data:`MATRICES`.

    Raises:
        ValueError: if the kind or a parameter is unknown, a parameter is named twice, there are no batches, or the loss does not
            depend on the parameters.
    """
    if kind not in MATRICES:
        raise ValueError(f"matrix {kind!r} is unknown; choose one of {', '.join(MATRICES)}")
    if len(set(parameters)) < len(parameters):
        raise ValueError(f"a parameter is named twice: {', '.join(parameters)}; name each once")
    check(model, first_order=False, half=None)
    view = view_of(model, {n: layer(n) for n in parameters}, {}, "full")
    parts = _Parts(view, loss, [mapped(lambda t: t.to(view.device), b) for b in batches], MATRICES[kind], micro)
    if not parts.batches:
        raise ValueError("there are no batches; give at least one pair of inputs and targets")
    size = sum(view.parameters[n].numel() for n in parameters)
    return LinearOperator((size, size), matvec=lambda v: _product(parts, parameters, v), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Parts:
    view: View
    loss: Loss
    batches: list[Batch]
    kind: Kind
    micro: int

    def products(self) -> Iterable[tuple[float, Product]]:
        """The products of the parts of the batches, each with the weight of its batch in the mean."""
        single = len(self.batches) == 1 and examples(self.batches[0][0]) <= self.micro
        return self.kept if single else self.recorded()

    @cached_property
    def kept(self) -> list[tuple[float, Product]]:
        """All of them, for as long as the operator lives."""
        return list(self.recorded())

    def recorded(self) -> Iterator[tuple[float, Product]]:
        """Records them one at a time."""
        sizes = [examples(inputs) for inputs, _ in self.batches]
        for batch, size in zip(self.batches, sizes, strict=True):
            for record in pieces(self.view, self.loss, batch, self.micro):
                piece = record(1.0)
                if not any(t.requires_grad for t in piece.outputs):
                    raise ValueError(f"the outputs do not depend on {', '.join(self.view.parameters)}; leave these out")
                yield size / sum(sizes), self.kind(piece, list(piece.parameters.values()))


def _product(parts: _Parts, parameters: Sequence[str], v: np.ndarray) -> np.ndarray:
    own = parts.view.parameters
    split = torch.as_tensor(np.asarray(v).ravel()).split([own[n].numel() for n in parameters])
    moved = {n: x.reshape(own[n].shape).to(own[n]) for n, x in zip(parameters, split, strict=True)}
    total = {n: torch.zeros(own[n].shape, dtype=torch.float64, device=own[n].device) for n in parameters}
    with evaluating(parts.view.model), differentiable(parts.view, parts.kind):
        for weight, product in parts.products():
            for name, found in zip(own, product([moved[n] for n in own]), strict=True):
                total[name] += weight * found.double()
    return torch.cat([_flat(total[n]) for n in parameters]).numpy()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().cpu()


def top_eigenvalue(operator: LinearOperator, *, tolerance: float = 1e-4, steps: int = 1000, seed: int = 0) -> Eigenvalue:
    """The eigenvalue of largest magnitude of a symmetric ``operator``, by restarted Lanczos iterations (ARPACK).

    HAWQ (Dong et al., "Hessian AWare Quantization of neural networks with mixed precision", ICCV 2019, section 3.1) finds the
    same value of each block by power iterations.

    Args:
        tolerance: relative, of the eigenvalue.
        steps: restarts at most.
        seed: of the random start.

    Raises:
        ValueError: if it has not converged by then, or a product is not finite.
    """
    counted = _Counted(operator)
    start = np.random.default_rng(seed).choice((-1.0, 1.0), operator.shape[0])
    first = counted(start)
    if not first.any() or len(start) == 1:
        return Eigenvalue(float(first[0] * start[0]) if first.any() else 0.0, 0.0, counted.products)
    try:
        wrapped = LinearOperator(operator.shape, matvec=counted, dtype=np.float64)
        (value,), vectors = eigsh(wrapped, k=1, which="LM", v0=start, tol=tolerance, maxiter=steps)
    except ArpackNoConvergence as error:
        raise ValueError(f"no top eigenvalue is found in {steps} restarts; allow more steps or a tolerance above {tolerance}") from error
    residual = float(np.linalg.norm(counted(vectors[:, 0]) - value * vectors[:, 0]))
    return Eigenvalue(float(value), residual, counted.products)


class _Counted:
    """Products with an operator, counted and checked."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator, self.products = operator, 0

    def __call__(self, v: np.ndarray) -> np.ndarray:
        self.products += 1
        found = self.operator.matvec(v)
        if not np.isfinite(found).all():
            raise ValueError("a product of the curvature is not finite; look for overflow in the weights or the data")
        return found


def spectral_density(operator: LinearOperator, *, starts: int = 8, steps: int = 64, seed: int = 0) -> Density:
    """The density of the eigenvalues of a symmetric ``operator``, by stochastic Lanczos quadrature.

    Each of ``starts`` vectors of random signs gives the Gauss quadrature of its own spectral measure, exact for polynomials of
    degree up to ``2 steps - 1`` (Golub & Welsch 1969); over the signs its mean is the density of the eigenvalues.
    Source: Ghorbani, Krishnan & Xiao, "An investigation into neural net optimization via Hessian eigenvalue density", ICML
    2019, algorithm 1; PyHessian (Yao et al. 2020) does the same.

    Raises:
        ValueError: if a product is not finite.
    """
    generator = np.random.default_rng(seed)
    runs = [_quadrature(_Counted(operator), generator.choice((-1.0, 1.0), operator.shape[0]), steps) for _ in range(starts)]
    return Density(tuple(x for x, _ in runs), tuple(w for _, w in runs), operator.shape[0])


def _quadrature(product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights after at most ``steps`` Lanczos steps with full reorthogonalisation."""
    basis, diagonal, beside = [start / np.linalg.norm(start)], [], []
    for _ in range(min(steps, len(start))):
        found = product(basis[-1])
        diagonal.append(float(basis[-1] @ found))
        size = float(np.linalg.norm(found))
        for _ in range(2):  # twice is enough (Parlett, "The symmetric eigenvalue problem", section 6.9)
            found = found - np.stack(basis).T @ (np.stack(basis) @ found)
        rest = float(np.linalg.norm(found))
        if rest <= 1e-10 * size or not size:  # the start lies in an invariant subspace, and the quadrature is exact
            break
        beside.append(rest)
        basis.append(found / rest)
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]))
    return values, np.square(vectors[0])
