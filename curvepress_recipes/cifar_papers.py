"""CIFAR-10 or CIFAR-100 and the networks that HAP and EHAP prune on them, trained once from nothing; their sizes are for a GPU.

    python -m benchmarks.gpu_training --network resnet56 --recipe ehap     # trains and keeps the weights
    curvepress reproduce ehap cifar_papers --option network=resnet56 --params 0.1 --out runs/ehap

The data is found as that of the recipe ``cifar10`` is, CIFAR-100 in ``cifar100`` or ``cifar-100-binary`` beside it; where the weights are
kept says ``weights``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvepress_recipes import weights
from curvepress_recipes.cifar10 import MEAN, SPLITS, STD, augmented, example, folder_of, loss
from curvepress_recipes.cifar10_files import decode, find
from curvepress_recipes.images import Minibatches, accuracy
from curvepress_recipes.papers_nets import NETWORKS

__all__ = ["RECOVERY", "batches", "evaluate", "example", "loss", "model"]

RECOVERY: dict[str, Any] = {"epochs": 1, "lr": 0.01, "weight_decay": 1e-4}


def model(trained: bool = True, network: str = "resnet32", classes: int = 10) -> nn.Module:
    """One of :data:`~.papers_nets.NETWORKS` in eval mode; ``trained``: with the weights that ``benchmarks.gpu_training`` made.

    Raises:
        ValueError: if there is no such network, or its weights were not made yet.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}; got {network!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = NETWORKS[network](classes=classes)
    return (weights.fill(made, name_of(network, classes)) if trained else made).eval()


def name_of(network: str, classes: int) -> str:
    """Under which name the weights of a network are kept."""
    return f"cifar{classes}_{network}"


def batches(split: str, seed: int = 0, classes: int = 10, batch_size: int = 128, data: str | None = None) -> Minibatches:
    """As those of the recipe ``cifar10``.

    Raises:
        ValueError: if there is no such split, or the data is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    pixels, labels = images(folder_of(data), "train" if split == "calibration" else split, classes)
    return Minibatches(
        pixels, labels, batch_size, MEAN, STD, split in ("train", "calibration"), augmented if split == "train" else None, seed
    )


def evaluate(model: nn.Module, split: str, classes: int = 10, batch_size: int = 250, data: str | None = None) -> dict[str, float]:
    """``accuracy`` in percent and ``loss`` in nats over a split."""
    return accuracy(model, batches(split, classes=classes, batch_size=batch_size, data=data))


@lru_cache(maxsize=3)
def images(folder: Path, split: str, classes: int) -> tuple[Tensor, Tensor]:
    """Pixels ``[images, 32, 32, 3]`` from 0 to 255 and labels of ``train`` (nine tenths), ``validation`` or ``test``."""
    part = find(folder, "test" if split == "test" else "train", classes)
    border = len(part.labels) - (len(part.labels) // 10 if split != "test" else 0)
    found, labels = decode(part, slice(border, None) if split == "validation" else slice(border))
    return torch.from_numpy(found), torch.from_numpy(labels)
