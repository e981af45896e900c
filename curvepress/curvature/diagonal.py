"""Unbiased samples of the diagonal of the Hessian, by Hutchinson's probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..objective import Batch, Loss, batch_loss


def gradient(model: nn.Module, loss: Loss, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Gradient of the batch's loss with respect to the named parameters."""
    parameters = _leaves(model, names)
    slopes = torch.autograd.grad(_loss_at(model, loss, batch, parameters), list(parameters.values()), allow_unused=True)
    return _filled(parameters, slopes)


def hessian_diagonal(
    model: nn.Module, loss: Loss, batch: Batch, names: Sequence[str], *, probes: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """An unbiased sample of the diagonal of the Hessian of the batch's loss, by name: the mean of ``v * Hv`` over probes.

    ``v`` is Rademacher (Hutchinson, "A stochastic estimator of the trace", 1989): ``E[v_i (Hv)_i] = H_ii`` as the
    off-diagonal terms have mean zero.  Sums over a block are unbiased for the trace of that block.
    """
    parameters = _leaves(model, names)
    slopes = torch.autograd.grad(_loss_at(model, loss, batch, parameters), list(parameters.values()), create_graph=True, allow_unused=True)
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    for _ in range(probes):
        v = {n: _rademacher(p, generator) for n, p in parameters.items()}
        for n, hv in _product(parameters, slopes, v).items():
            total[n] += (v[n] * hv).double() / probes
    return total


def _product(parameters: dict[str, Tensor], slopes: Sequence[Tensor | None], v: dict[str, Tensor]) -> dict[str, Tensor]:
    curved = [(s, v[n]) for (n, _), s in zip(parameters.items(), slopes, strict=True) if s is not None and s.requires_grad]
    if not curved:
        return {n: torch.zeros_like(p) for n, p in parameters.items()}
    outputs, vectors = zip(*curved, strict=True)
    hv = torch.autograd.grad(outputs, list(parameters.values()), vectors, retain_graph=True, allow_unused=True)
    return _filled(parameters, hv)


def _leaves(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    return {n: own[n].detach().requires_grad_() for n in names}


def _loss_at(model: nn.Module, loss: Loss, batch: Batch, parameters: dict[str, Tensor]) -> Tensor:
    return batch_loss(lambda *inputs: functional_call(model, parameters, inputs), loss, batch)


def _filled(parameters: dict[str, Tensor], values: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if g is None else g.detach() for (n, p), g in zip(parameters.items(), values, strict=True)}


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return (signs * 2 - 1).to(like)
