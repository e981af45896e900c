"""The Hutchinson estimators of HAP and EHAP, step by step as their authors released them, on any device.

HAP: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, ``pruner/hessian_fact.py``.  EHAP: Chong, Gupta and
Chen, "Resource Efficient Neural Networks Using Hessian Based Pruning", 2023, ``prune_utils/hutchinson.py``.  Nothing is improved
here: not the loop over single channels, not the graph that is kept, not EHAP's loss scale.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.curvature_task import Batch, weights

DIVISOR = 2**8


@dataclass(frozen=True)
class Probe:
    """``vHv`` of every channel as the code records it, and the loss scale that was in force."""

    channels: np.ndarray  # [channels]
    scale: float


def one_by_one(hv: Sequence[Tensor], v: Sequence[Tensor]) -> np.ndarray:
    """``vHv`` of every channel ``[channels]`` as released: on the CPU, one dot product a channel."""
    pairs = [(a.detach().cpu(), b.detach().cpu()) for a, b in zip(hv, v, strict=True)]
    return np.array([a[c].flatten().dot(b[c].flatten()).item() for a, b in pairs for c in range(len(a))])


def at_once(hv: Sequence[Tensor], v: Sequence[Tensor]) -> np.ndarray:
    """The same summed on the device, to see the passes without the loop."""
    return torch.cat([(a * b).detach().flatten(1).sum(1) for a, b in zip(hv, v, strict=True)]).cpu().numpy()


Sums = Callable[[Sequence[Tensor], Sequence[Tensor]], np.ndarray]


def hap(model: nn.Module, batch: Batch, probes: int, seed: int, *, sums: Sums = one_by_one) -> Iterator[np.ndarray]:
    """``vHv`` of every output channel ``[channels]``, one probe after the other.

    The gradient's graph is built once, by ``backward`` with ``create_graph``, and kept until the last probe.  A probe is one
    Rademacher vector over all weights of convolutions and linear layers at once.
    """
    torch.manual_seed(seed)
    params = _chosen(model)
    inputs, targets = batch
    loss = F.cross_entropy(model(inputs), targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True", UserWarning)
        loss.backward(create_graph=True)
    slopes = [p.grad + 0.0 for p in params]
    for i in range(probes):
        v = _rademacher(params)
        hv = torch.autograd.grad(slopes, params, grad_outputs=v, retain_graph=i < probes - 1)
        yield sums(hv, v)
    model.zero_grad()


def ehap(model: nn.Module, batch: Batch, probes: int, seed: int) -> Iterator[Probe]:
    """The same in float16 with the released loss scaling.

    The forward pass runs under autocast.  The scale is divided by 256 before each probe, multiplies the gradients that are
    differentiated again, and is never taken out of ``Hv``.
    """
    torch.manual_seed(seed)
    params, (inputs, targets) = _chosen(model), batch
    scaler = torch.amp.GradScaler(inputs.device.type)
    with torch.autocast(inputs.device.type, dtype=torch.float16):
        loss = F.cross_entropy(model(inputs), targets)
    slopes = torch.autograd.grad(scaler.scale(loss), params, create_graph=True)
    slopes = [g * (1.0 / scaler.get_scale()) for g in slopes]
    for i in range(probes):
        scaler.update(scaler.get_scale() / DIVISOR)
        v = _rademacher(params)
        hv = torch.autograd.grad(scaler.scale(slopes), params, grad_outputs=v, retain_graph=i < probes - 1)
        yield Probe(one_by_one(hv, v), scaler.get_scale())


def _chosen(model: nn.Module) -> list[nn.Parameter]:
    """The weights of convolutions and linear layers; nothing else is differentiated."""
    model.eval().requires_grad_(False)
    model.zero_grad()
    return [w.requires_grad_() for w in weights(model).values()]


def _rademacher(params: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randint_like(p, high=2) * 2 - 1 for p in params]
