"""Torch-Pruning at a parameter budget, as far as it can prune a network with padded shortcuts."""

from __future__ import annotations

import copy

import torch
import torch_pruning as tp
from torch import nn


def failure(model: nn.Module, example: torch.Tensor) -> str:
    """What happens when Torch-Pruning is let loose on the whole network; empty if the result runs."""
    try:
        _pruned(model, example, 0.3, ignored=[model.linear])(example)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def prune(model: nn.Module, example: torch.Tensor, share: float) -> nn.Module:
    """The network with at most ``share`` of its parameters, by global group L2 magnitude over the inner channels of the blocks.

    Torch-Pruning crashes on the groups that a padded shortcut couples, so the residual stream is left whole.
    """
    residual = [m for n, m in model.named_modules() if n in ("conv1", "linear") or n.endswith("conv2")]
    whole = sum(p.numel() for p in model.parameters())
    low, high = 0.0, 0.99
    for _ in range(12):
        middle = (low + high) / 2
        left = sum(p.numel() for p in _pruned(model, example, middle, residual).parameters())
        low, high = (low, middle) if left <= share * whole else (middle, high)
    return _pruned(model, example, high, residual)


def _pruned(model: nn.Module, example: torch.Tensor, ratio: float, ignored: list[nn.Module]) -> nn.Module:
    names = {id(m): n for n, m in model.named_modules()}
    small = copy.deepcopy(model)
    kept = [small.get_submodule(names[id(m)]) for m in ignored]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        small, example, importance, pruning_ratio=ratio, global_pruning=True, max_pruning_ratio=0.95, ignored_layers=kept
    )
    pruner.step()
    return small
