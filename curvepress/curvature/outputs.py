"""The curvature of a loss with respect to the model's outputs, example by example, as a sum of rank-one terms ``u u'``.

The generalised Gauss-Newton matrix is ``sum_u (J'u)(J'u)'`` over these terms (Schraudolph, "Fast curvature matrix-vector
products", 2002), so whoever has them needs only first-order passes.  The form of the loss is not declared but recognised:
its products with random vectors are compared, in double precision, with those of each known form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objective import checked_loss
from .terms import Dense, Elementwise, Softmax, Terms, spread
from .trees import leaves, mapped, rebuilt

DENSE = 256
"""Largest output of one example whose curvature is found column by column when the loss has no known form."""
TOLERANCE = 1e-5


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

    @property
    def follows(self) -> bool:
        """Whether the curvature at other outputs of the same examples is known too."""
        return all(t.follows for t in self.terms.values())

    def at(self, n: Tensor, tensors: Sequence[Tensor]) -> Outputs:
        """The output curvature of examples ``n`` where ``tensors`` is what the model returns for them."""
        terms = {leaf: t.at(n, tensors[leaf].detach()) for leaf, t in self.terms.items()}
        return Outputs(terms, torch.cat([t.mass for t in terms.values()], 1))

    def each(self, make: Callable[[Terms], Tensor]) -> dict[int, Tensor]:
        """``make(terms)`` for each output tensor."""
        return {leaf: make(terms) for leaf, terms in self.terms.items()}


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
    binary = _close(flat * spread(_calm(z)), calm) and not _close(flat, 4 * calm)
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
        return Elementwise(terms.diagonal / spread(terms.odds) * spread(soft), soft, temperature)
    raise ValueError(f"a loss of the form {terms.form!r} has no temperature, got {temperature}; leave it at 1")


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp_min(1e-300))
