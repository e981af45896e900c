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

    Torch-Pruning crashes on the groups that a padded shortcut couples, so the residual stream is left whole.  Beyond some ratio it cuts
    next to nothing, without a word: the least ratio that is enough is looked for from below.

    Raises:
        ValueError: if no ratio is enough.
    """
    residual = [m for n, m in model.named_modules() if n in ("conv1", "linear") or n.endswith("conv2")]
    limit = share * sum(p.numel() for p in model.parameters())

    def enough(ratio: float) -> bool:
        return sum(p.numel() for p in _pruned(model, example, ratio, residual).parameters()) <= limit

    high = next((r / 100 for r in range(1, 100) if enough(r / 100)), None)
    if high is None:
        raise ValueError(f"Torch-Pruning cannot leave {share:.0%} of the parameters by the inner channels; allow more")
    low = high - 0.01
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
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
