"""CIFAR-10 and a small vision transformer of half a million parameters, trained once from nothing in about ten minutes.

    python -m curvepress_recipes.cifar10_vit              # trains and keeps the weights; interrupted, it goes on
    curvepress compress cifar10_vit --params 0.5 --out runs/vit

The data is that of the recipe ``cifar10``; where the weights are kept says ``weights``.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvepress.training.fitting import Fitted, fit
from curvepress_recipes import weights
from curvepress_recipes.cifar10 import batches, evaluate, example, loss
from curvepress_recipes.vit import ViT

__all__ = ["RECOVERY", "batches", "evaluate", "example", "loss", "model", "train"]

RECOVERY: dict[str, Any] = {"epochs": 1, "lr": 5e-4, "optimizer": "adamw", "weight_decay": 0.05, "distill": 0.5}
BATCH = 64
"""Images a step in training: with few passes over the data, many steps count for more than large ones."""


def model(trained: bool = True) -> nn.Module:
    """The vision transformer in eval mode; ``trained``: with the weights that :func:`train` made.

    Raises:
        ValueError: if they were not made yet, or are damaged.
    """
    network = untrained()
    return (weights.fill(network, "cifar10_vit") if trained else network).eval()


def untrained(seed: int = 0) -> nn.Module:
    """The network with the weights that ``seed`` draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViT()


def train(
    *, epochs: int, examples: int, lr: float, seed: int, data: str = "", checkpoints: Path | None = None, progress: Any = None
) -> Fitted:
    """The network trained from the weights that ``seed`` draws by AdamW, for ``epochs`` of ``examples`` images drawn anew each."""
    folder = data or None
    return fit(
        untrained(seed),
        loss,
        lambda s: list(islice(batches("train", s, batch_size=BATCH, data=folder), max(1, examples // BATCH))),
        epochs=epochs,
        lr=lr,
        optimizer="adamw",
        weight_decay=0.05,
        clip_norm=1.0,
        evaluate=lambda m: evaluate(m, "validation", data=folder),
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
    )


if __name__ == "__main__":
    about = "Train the vision transformer once; some 250 images a second on one core."
    weights.command("cifar10_vit", train, about, epochs=14, examples=9000, lr=1e-3, seed=0)
