"""The curvature of a loss with respect to the model's outputs, example by example, as a sum of rank-one terms ``u u'``.

The generalised Gauss-Newton matrix is ``sum_u (J'u)(J'u)'`` over these terms (Schraudolph, "Fast curvature matrix-vector
products", 2002), so whoever has them needs only first-order passes.  The form of the loss is not declared but recognised:
its products with random vectors are compared, in double precision, with those of each known form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..objective import checked_loss
from .trees import leaves, mapped, rebuilt

DENSE = 256
"""Largest output of one example whose curvature is found column by column when the loss has no known form."""
EIGEN = 64
"""Most classes for which the terms are eigenvectors; beyond, one term a class."""
TOLERANCE = 1e-5


class Terms:
    """Rank-one terms of the output curvature of ``examples`` examples: ``sum_k u_nk u_nk'`` for each example ``n``.

    ``mass`` ``[examples, terms]`` is ``|u|^2``; ``term(n, k)`` gives rows ``[rows, *shape]`` for index vectors ``n`` and
    ``k``; ``sketch`` one row an example whose outer product has the whole sum as its mean; ``drawn`` the gradient at labels
    drawn from the model's own predictive distribution, with the same mean (McAllister & Martens' "true" Fisher).
    """

    form: str
    mass: Tensor
    shape: tuple[int, ...]

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

    ``odds`` holds the logits of a binary cross-entropy.
    """

    diagonal: Tensor
    odds: Tensor | None = None
    form = "separate outputs"

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
        return (p - y) * (self.diagonal / _spread(self.odds)).sqrt()


@dataclass(frozen=True, eq=False)
class Dense(Terms):
    """Any curvature ``[examples, outputs, outputs]`` without coupling between examples, by its eigenvectors."""

    matrices: Tensor
    shape: tuple[int, ...]
    form = "dense"

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


@dataclass(frozen=True, eq=False)
class Outputs:
    """The output curvature of one batch: ``terms`` by the position of their tensor among the tensors of the model's output."""

    terms: dict[int, Terms]
    mass: Tensor

    @property
    def form(self) -> str:
        """What the loss was recognised as."""
        return " and ".join(dict.fromkeys(t.form for t in self.terms.values()))

    def rows(self, n: Tensor, k: Tensor) -> dict[int, Tensor]:
        """Terms ``k`` of examples ``n`` as rows for each output tensor, zero where the term belongs to another tensor."""
        found, start = {}, 0
        for leaf, terms in self.terms.items():
            width = terms.mass.shape[1]
            mine = (k >= start) & (k < start + width)
            found[leaf] = terms.term(n, torch.where(mine, k - start, 0)) * mine.reshape(-1, *[1] * len(terms.shape))
            start += width
        return found

    def each(self, make: Callable[[Terms], Tensor]) -> dict[int, Tensor]:
        """``make(terms)`` for each output tensor."""
        return {leaf: make(terms) for leaf, terms in self.terms.items()}


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Rademacher signs of the shape, type and device of ``like``, drawn on the CPU so that devices agree."""
    return (torch.randint(2, like.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(like)


def output_curvature(loss: Callable[[Any, Any], Tensor], output: Any, targets: Any, temperature: float = 1.0) -> Outputs:
    """The curvature of ``loss(output, targets)`` with respect to each tensor of ``output``, recognised and verified.

    At a ``temperature`` other than 1 the probabilities of a cross-entropy are those of the softened logits ``z / T``.

    Raises:
        ValueError: if the loss is linear in the outputs, couples examples or outputs in a way that has no known form, is not
            convex in them, or has no temperature; each says what to do instead.
    """
    terms = {}
    probe = torch.Generator().manual_seed(0)
    targets = mapped(_double, targets)
    tensors = [_double(t) for t in leaves(output)]
    read = _read(loss, output, tensors, targets)
    for leaf in read:
        product = _products(loss, output, tensors, targets, leaf)
        found = _recognised(product, tensors[leaf], probe)
        if found is not None:
            terms[leaf] = _softened(found, temperature)
    if not terms:
        raise ValueError(
            "the loss has no curvature with respect to the model's outputs, so the Gauss-Newton matrix is zero; let the model"
            " return what the loss is curved in (logits, not log-probabilities), or choose the estimator 'hessian'"
        )
    _uncoupled(loss, output, tensors, targets, read, probe)
    return Outputs(terms, torch.cat([t.mass for t in terms.values()], 1))


def _double(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach()


def _spread(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * torch.sigmoid(-logits)).clamp_min(torch.finfo(torch.float64).tiny)


Product = Callable[[Tensor, Tensor], Tensor]
"""``(point, v) -> H(point) v`` for one output tensor, the others held."""


def _read(loss: Callable[[Any, Any], Tensor], output: Any, tensors: list[Tensor], targets: Any) -> list[int]:
    floating = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    inputs = [tensors[i].clone().requires_grad_() for i in floating]
    slopes = torch.autograd.grad(
        _value(loss, output, tensors, targets, dict(zip(floating, inputs, strict=True))), inputs, allow_unused=True
    )
    return [i for i, g in zip(floating, slopes, strict=True) if g is not None]


def _value(loss: Callable[[Any, Any], Tensor], output: Any, tensors: list[Tensor], targets: Any, changed: dict[int, Tensor]) -> Tensor:
    value = checked_loss(loss, rebuilt(output, [changed.get(i, t) for i, t in enumerate(tensors)]), targets)
    if not value.requires_grad:
        raise ValueError("the loss does not depend on the model's outputs by differentiable operations; curvature needs one that does")
    return value


def _products(loss: Callable[[Any, Any], Tensor], output: Any, tensors: list[Tensor], targets: Any, leaf: int) -> Product:
    def product(point: Tensor, v: Tensor) -> Tensor:
        z = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_value(loss, output, tensors, targets, {leaf: z}), z, create_graph=True)
        if not slope.requires_grad:
            return torch.zeros_like(z)
        (curved,) = torch.autograd.grad(slope, z, v, allow_unused=True)
        return torch.zeros_like(z) if curved is None else curved

    return product


def _recognised(product: Product, z: Tensor, generator: torch.Generator) -> Terms | None:
    v = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.device)
    if not product(z, v).any() and not product(_calm(z), v).any():
        return None
    for recognise in (_elementwise, _softmax, _dense):
        found = recognise(product, z, v)
        if found is not None:
            return found
    raise ValueError(
        f"the loss couples the outputs of shape {tuple(z.shape)} in a way that has no known form (softmax cross-entropy, squared"
        f" error, binary cross-entropy, or any loss with at most {DENSE} outputs an example and no coupling between examples);"
        " choose the estimator 'hessian', which takes any loss"
    )


def _calm(z: Tensor) -> Tensor:
    """A point where no probability is so near to 0 or 1 that its curvature drowns in rounding."""
    return z / z.abs().max().clamp_min(1)


def _elementwise(product: Product, z: Tensor, v: Tensor) -> Terms | None:
    diagonal, calm = product(z, torch.ones_like(z)), product(_calm(z), torch.ones_like(z))
    if not _close(diagonal * v, product(z, v)) or not _close(calm * v, product(_calm(z), v)):
        return None
    _convex(diagonal)
    flat = 4 * product(torch.zeros_like(z), torch.ones_like(z))
    binary = _close(flat * _spread(_calm(z)), calm) and not _close(flat, 4 * calm)
    return Elementwise(diagonal, z if binary else None)


def _softmax(product: Product, z: Tensor, v: Tensor) -> Terms | None:
    for dim in dict.fromkeys((z.ndim - 1, 1)) if z.ndim > 1 else ():
        moved, flat = v.movedim(dim, -1), product(torch.zeros_like(z), v).movedim(dim, -1)
        centred = (moved - moved.mean(-1, keepdim=True)) / moved.shape[-1]
        weight = (flat * centred).sum(-1) / centred.square().sum(-1).clamp_min(torch.finfo(torch.float64).tiny)
        if _close(weight[..., None] * centred, flat) and not (weight < 0).any():
            calm = Softmax(_calm(z), dim, weight.reshape(len(z), -1))
            kept = moved.reshape(calm.p.shape)
            model = calm.weight[..., None] * calm.p * (kept - (calm.p * kept).sum(-1, keepdim=True))
            if _close(calm.shaped(model), product(_calm(z), v)):
                return Softmax(z, dim, calm.weight)
    return None


def _dense(product: Product, z: Tensor, v: Tensor) -> Terms | None:
    if z[0].numel() > DENSE:
        return None
    units = torch.eye(z[0].numel(), dtype=torch.float64, device=z.device)
    columns = [product(z, u.expand(len(z), -1).reshape(z.shape).contiguous()).reshape(len(z), -1) for u in units]
    matrices = torch.stack(columns, 2)
    if not _close(torch.einsum("nij,nj->ni", matrices, v.reshape(len(z), -1)).view_as(z), product(z, v)):
        return None
    _convex(torch.linalg.eigvalsh(matrices))
    return Dense(matrices, tuple(z.shape[1:]))


def _convex(curvatures: Tensor) -> None:
    if (curvatures < -1e-9 * curvatures.abs().max()).any():
        raise ValueError("the loss is not convex in the model's outputs, so the Gauss-Newton matrix is not positive; use 'hessian'")


def _uncoupled(
    loss: Callable[[Any, Any], Tensor], output: Any, tensors: list[Tensor], targets: Any, found: list[int], generator: torch.Generator
) -> None:
    for leaf in found if len(found) > 1 else ():
        inputs = [tensors[i].clone().requires_grad_() for i in found]
        value = _value(loss, output, tensors, targets, dict(zip(found, inputs, strict=True)))
        slope = torch.autograd.grad(value, inputs, create_graph=True)[found.index(leaf)]
        if not slope.requires_grad:
            continue
        v = torch.randn(slope.shape, generator=generator, dtype=torch.float64).to(slope.device)
        curved = {
            i: c.abs().max() for i, c in zip(found, torch.autograd.grad(slope, inputs, v, allow_unused=True), strict=True) if c is not None
        }
        if any(i != leaf and c > TOLERANCE * max(curved.values()) for i, c in curved.items()):
            raise ValueError("the loss multiplies two of the model's outputs with each other; choose the estimator 'hessian'")


def _softened(terms: Terms, temperature: float) -> Terms:
    if temperature == 1:
        return terms
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if isinstance(terms, Softmax):
        return Softmax(terms.logits, terms.dim, terms.weight, temperature)
    if isinstance(terms, Elementwise) and terms.odds is not None:
        soft = terms.odds / temperature
        return Elementwise(terms.diagonal / _spread(terms.odds) * _spread(soft), soft)
    raise ValueError(f"a loss of the form {terms.form!r} has no temperature, got {temperature}; leave it at 1")


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp_min(1e-300))
