"""The models of the coverage table: transformers with small random configurations, and convolutional networks of full depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage_nets import NETS
from tests.hf_zoo import HF_ZOO, make_hf


@dataclass(frozen=True)
class Case:
    """A model in float64 and evaluation mode; ``inputs(count, seed)`` makes inputs for it."""

    name: str
    model: nn.Module
    inputs: Callable[[int, int], tuple[Any, ...]]


CASES = (*HF_ZOO, *NETS)


def make(name: str, seed: int = 0) -> Case:
    """The named model with random weights and statistics."""
    if name in HF_ZOO:
        case = make_hf(name, seed)
        return Case(name, case.model, case.inputs)
    torch.manual_seed(seed)
    build, shape = NETS[name]
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return Case(name, model, lambda count, seed: (_normal(count, seed, shape),))


def _normal(count: int, seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
