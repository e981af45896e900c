"""The best weight of low rank, or of 1x1 filters, for what a layer computes on data.

The squared error of a layer's output, weighted by an output curvature C, is tr(C D G D') for a change D of its weight ``[out, inputs]``,
where G is the Gram matrix of its inputs: the loss's rise up to a factor where the curvature of the weight is ``G x C`` (Martens & Grosse,
"Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 1e-3


@dataclass(frozen=True, eq=False)
class Truncation:
    """All ranks of a weight ``[out, inputs]`` at once; ``gram`` ``[inputs, inputs]`` and ``curvature`` ``[out, out]`` are one if None.

    With ``B = C^1/2 W G^1/2 = U S V'`` the best weight of rank r is ``C^-1/2 U_r U_r' C^1/2 W`` (Eckart & Young 1936): a projection,
    so that G is never inverted, and nothing changes at full rank.  C is damped by ``DAMPING`` times the mean of its diagonal.
    """

    weight: Tensor
    gram: Tensor | None = None
    curvature: Tensor | None = None

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """``C^1/2`` and ``C^-1/2``."""
        if self.curvature is None:
            one = torch.eye(len(self.weight), dtype=torch.float64, device=self.weight.device)
            return one, one
        values, vectors = torch.linalg.eigh(_damped(self.curvature))
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor]:
        """Left singular vectors of B in columns, and singular values."""
        whitened = self._roots[0] @ self.weight.detach().double()
        if self.gram is not None:
            values, vectors = torch.linalg.eigh(_damped(self.gram, 1e-9))
            whitened = whitened @ (vectors * values.clamp_min(0).sqrt())
        u, s, _ = torch.linalg.svd(whitened, full_matrices=False)
        return _signed(u), s

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """``up`` ``[out, rank]`` and ``down`` ``[rank, inputs]``, float64, balanced, whose product is the best weight of this rank."""
        u = self._svd[0][:, :rank]
        up, down = self._roots[1] @ u, u.T @ self._roots[0] @ self.weight.detach().double()
        balance = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-30)).clamp_min(1e-30).sqrt()
        return up * balance, down / balance[:, None]

    def residual(self, rank: int) -> Tensor:
        """``W_r - W``, float64."""
        up, down = self.factors(rank)
        return up @ down - self.weight.detach().double()

    def error(self, rank: int) -> float:
        """``tr(C D G D')`` of the residual D: the sum of the squares of the singular values left out."""
        return float(self._svd[1][rank:].square().sum())


def centre(weight: Tensor, gram: Tensor | None = None) -> Tensor:
    """The 1x1 filters ``[filters, in]`` for ``weight`` ``[filters, in, *kernel]`` (odd): its centres, or a least-squares fit.

    With ``gram`` ``[in * kernel, in * kernel]``, of the patches that the kernel sees, it is ``w G[:, c] G[c, c]^-1`` for the centres c.
    """
    filters, read = weight.shape[:2]
    taps = weight[0, 0].numel()
    middle = torch.arange(read, device=weight.device) * taps + taps // 2
    flat = weight.detach().double().reshape(filters, -1)
    if gram is None:
        return flat[:, middle]
    seen = flat @ gram[:, middle]
    return torch.linalg.solve(_damped(gram[middle][:, middle], 1e-6), seen, left=False)


def _damped(matrix: Tensor, damping: float = DAMPING) -> Tensor:
    level = float(matrix.diagonal().mean()) or 1.0
    return matrix.double() + damping * level * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)


def _signed(u: Tensor) -> Tensor:
    """Columns whose largest entry is positive, so that the factors do not depend on the solver."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    return u * torch.where(largest < 0, -1.0, 1.0)
