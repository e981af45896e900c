"""Rank-one terms ``u u'`` of a loss's curvature in the model's outputs, one class for each form of loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EIGEN = 64
"""Most classes for which the terms are eigenvectors; beyond, one term a class."""


class Terms:
    """Rank-one terms of the output curvature of ``examples`` examples: ``sum_k u_nk u_nk'`` for each example ``n``.

    ``mass`` ``[examples, terms]`` is ``|u|^2``; ``term(n, k)`` gives rows ``[rows, *shape]`` for index vectors ``n`` and
    ``k``; ``sketch`` one row an example whose outer product has the whole sum as its mean; ``drawn`` the gradient at labels
    drawn from the model's own predictive distribution, with the same mean (McAllister & Martens' "true" Fisher).
    ``follows`` says whether the terms are known at other outputs too, where ``at`` then gives them.
    """

    form: str
    mass: Tensor
    shape: tuple[int, ...]
    follows: bool

    def at(self, n: Tensor, outputs: Tensor) -> Terms:
        """The terms of examples ``n`` where the model returns ``outputs`` for them."""
        raise NotImplementedError

    def term(self, n: Tensor, k: Tensor) -> Tensor:
        """Terms ``k`` of examples ``n``."""
        raise NotImplementedError

    def sketch(self, generator: torch.Generator) -> Tensor:
        """One random row for each example."""
        raise NotImplementedError

    def drawn(self, generator: torch.Generator) -> Tensor:
        """The gradient at drawn labels."""
        raise ValueError(f"labels cannot be drawn for a loss of the form {self.form!r}; choose another estimator")


@dataclass(frozen=True, eq=False)
class Softmax(Terms):
    """``weight * (diag(p) - pp')`` for each position: cross-entropy, with label smoothing, class indices or soft labels."""

    logits: Tensor
    dim: int
    weight: Tensor
    temperature: float = 1.0
    form = "softmax cross-entropy"
    follows = True

    def at(self, n: Tensor, outputs: Tensor) -> Softmax:
        """See :class:`Terms`."""
        return Softmax(outputs, self.dim, self.weight[n], self.temperature)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the outputs of one example."""
        return tuple(self.logits.shape[1:])

    @cached_property
    def p(self) -> Tensor:
        """Predicted probabilities ``[examples, positions, classes]`` at the temperature."""
        moved = self.logits.double().movedim(self.dim, -1)
        return torch.softmax(moved / self.temperature, -1).reshape(len(moved), -1, moved.shape[-1])

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[examples, positions, classes - 1]`` and eigenvectors in columns: the largest first, the constant left out."""
        values, vectors = torch.linalg.eigh(torch.diag_embed(self.p) - self.p[..., None] * self.p[..., None, :])
        return values.flip(-1)[..., :-1].clamp_min(0), vectors.flip(-1)[..., :-1]

    @cached_property
    def small(self) -> bool:
        """Whether there are few enough classes for eigenvectors."""
        return self.p.shape[-1] <= EIGEN

    @cached_property
    def mass(self) -> Tensor:  # type: ignore[override]
        """``|u|^2``: the eigenvalues, or ``p_c |e_c - p|^2`` with one term a class (the Fisher form of the same matrix)."""
        own = self.eigen[0] if self.small else self.p * (1 - 2 * self.p + self.p.square().sum(-1, keepdim=True))
        return (self.weight[..., None] * own).flatten(1)

    def term(self, n: Tensor, k: Tensor) -> Tensor:
        """Rows ``[rows, *shape]``."""
        width = self.mass.shape[1] // self.p.shape[1]
        t, c = k // width, k % width
        if self.small:
            values, vectors = self.eigen
            return self.placed(n, t, vectors[n, t, :, c] * (self.weight[n, t] * values[n, t, c]).sqrt()[:, None])
        one = torch.nn.functional.one_hot(c, self.p.shape[-1])
        return self.placed(n, t, (one - self.p[n, t]) * (self.weight[n, t] * self.p[n, t, c]).sqrt()[:, None])

    def placed(self, n: Tensor, t: Tensor, vectors: Tensor) -> Tensor:
        """Rows that are zero but for ``vectors`` at positions ``t``."""
        rows = vectors.new_zeros(len(n), *self.p.shape[1:])
        rows[torch.arange(len(n), device=rows.device), t] = vectors
        return self.shaped(rows)

    def shaped(self, rows: Tensor) -> Tensor:
        """``[rows, positions, classes]`` in the layout of the logits."""
        moved = self.logits.movedim(self.dim, -1)
        return rows.reshape(len(rows), *moved.shape[1:]).movedim(-1, self.dim)

    def sketch(self, generator: torch.Generator) -> Tensor:
        """``sqrt(weight) (sqrt(p) e - p (sqrt(p) . e))`` with random signs ``e``: ``SS' = diag(p) - pp'``."""
        signed = self.p.sqrt() * signs(self.p, generator)
        return self.shaped((signed - self.p * signed.sum(-1, keepdim=True)) * self.weight.sqrt()[..., None])

    def drawn(self, generator: torch.Generator) -> Tensor:
        """``sqrt(weight) (p - onehot(y))`` with ``y`` drawn from ``p``."""
        flat = self.p.flatten(0, 1)
        y = torch.multinomial(flat.cpu(), 1, generator=generator).to(flat.device).view(self.p.shape[:2])
        return self.shaped((self.p - torch.nn.functional.one_hot(y, self.p.shape[-1])) * self.weight.sqrt()[..., None])


@dataclass(frozen=True, eq=False)
class Elementwise(Terms):
    """A diagonal curvature ``[examples, *shape]``: squared error, binary cross-entropy and whatever treats outputs one by one.

    ``odds`` holds the logits of a binary cross-entropy, divided by the ``temperature``.
    """

    diagonal: Tensor
    odds: Tensor | None = None
    temperature: float = 1.0
    form = "separate outputs"

    @property
    def follows(self) -> bool:  # type: ignore[override]
        """Only a binary cross-entropy is known elsewhere."""
        return self.odds is not None

    def at(self, n: Tensor, outputs: Tensor) -> Elementwise:
        """See :class:`Terms`."""
        assert self.odds is not None
        odds = outputs.double() / self.temperature
        return Elementwise(self.diagonal[n] / spread(self.odds[n]) * spread(odds), odds, self.temperature)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the outputs of one example."""
        return tuple(self.diagonal.shape[1:])

    @cached_property
    def mass(self) -> Tensor:  # type: ignore[override]
        """The diagonal, flat."""
        return self.diagonal.reshape(len(self.diagonal), -1)

    def term(self, n: Tensor, k: Tensor) -> Tensor:
        """Rows ``[rows, *shape]``."""
        rows = self.diagonal.new_zeros(len(n), self.mass.shape[1])
        rows[torch.arange(len(n), device=rows.device), k] = self.mass[n, k].sqrt()
        return rows.reshape(len(n), *self.shape)

    def sketch(self, generator: torch.Generator) -> Tensor:
        """Random signs times the root of the diagonal."""
        return self.diagonal.sqrt() * signs(self.diagonal, generator)

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Normal residuals for squared error; ``p - y`` with ``y`` drawn from ``p`` for binary cross-entropy."""
        if self.odds is None:
            noise = torch.randn(self.diagonal.shape, generator=generator, dtype=torch.float64)
            return self.diagonal.sqrt() * noise.to(self.diagonal.device)
        p = torch.sigmoid(self.odds)
        y = torch.bernoulli(p.cpu(), generator=generator).to(p.device)
        return (p - y) * (self.diagonal / spread(self.odds)).sqrt()


@dataclass(frozen=True, eq=False)
class Dense(Terms):
    """Any curvature ``[examples, outputs, outputs]`` without coupling between examples, by its eigenvectors."""

    matrices: Tensor
    shape: tuple[int, ...]
    form = "dense"
    follows = False

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors, the largest first."""
        values, vectors = torch.linalg.eigh(self.matrices)
        return values.flip(-1).clamp_min(0), vectors.flip(-1)

    @cached_property
    def mass(self) -> Tensor:  # type: ignore[override]
        """The eigenvalues."""
        return self.eigen[0]

    def term(self, n: Tensor, k: Tensor) -> Tensor:
        """Rows ``[rows, *shape]``."""
        values, vectors = self.eigen
        return (vectors[n, :, k] * values[n, k].sqrt()[:, None]).reshape(len(n), *self.shape)

    def sketch(self, generator: torch.Generator) -> Tensor:
        """Eigenvectors under random signs."""
        values, vectors = self.eigen
        return torch.einsum("nok,nk->no", vectors, values.sqrt() * signs(values, generator)).reshape(len(values), *self.shape)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Rademacher signs of the shape, type and device of ``like``, drawn on the CPU so that devices agree."""
    return (torch.randint(2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(like)


def spread(logits: Tensor) -> Tensor:
    """``p (1 - p)`` of the probability that belongs to each logit, never quite 0."""
    return (torch.sigmoid(logits) * torch.sigmoid(-logits)).clamp_min(torch.finfo(torch.float64).tiny)
