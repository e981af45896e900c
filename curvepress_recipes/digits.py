"""Handwritten digits: 1,797 images of 8x8 pixels that come with scikit-learn, and a small residual network trained on the spot.

No files, no downloads: the place to begin.  The images are split at random, once and for all: 60 % are for
training, 20 % for validation, 20 % for the test.
"""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress.training.fitting import fit
from curvepress_recipes.images import Minibatches, accuracy, shifted

RECOVERY: dict[str, Any] = {"epochs": 5, "lr": 0.02, "distill": 0.9}
SHARES = {"train": (0.0, 0.6), "calibration": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}


def model(trained: bool = True, seed: int = 0) -> nn.Module:
    """A residual network of 78,000 parameters in eval mode, trained in seconds (once a process) from the weights ``seed`` draws."""
    return deepcopy(_trained(seed)) if trained else _untrained(seed).eval()


def example() -> Tensor:
    """Two images of noise, ``[2, 1, 8, 8]``."""
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats."""
    return F.cross_entropy(output, targets)


def batches(split: str, seed: int = 0, batch_size: int = 64) -> Minibatches:
    """Images ``[batch, 1, 8, 8]`` and labels ``[batch]``; ``train`` is shifted by up to a pixel, ``calibration`` the same images unmoved.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SHARES:
        raise ValueError(f"split must be one of {', '.join(SHARES)}; got {split!r}")
    pixels, labels = _digits()
    first, last = (round(share * len(labels)) for share in SHARES[split])
    learning, augment = split in ("train", "calibration"), shifted(1) if split == "train" else None
    mean, std = torch.tensor([4.9]), torch.tensor([6.0])  # of all pixels, which are 0 to 16
    return Minibatches(pixels[first:last], labels[first:last], batch_size, mean, std, learning, augment, seed)


def evaluate(model: nn.Module, split: str) -> dict[str, float]:
    """``accuracy`` in percent and ``loss`` in nats over a split."""
    return accuracy(model, batches(split, batch_size=512))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        shape = width_in, width, 1, stride
        self.shortcut = nn.Identity() if width_in == width else nn.Sequential(nn.Conv2d(*shape, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, not below zero."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Network(nn.Module):
    """Three residual stages of widths 16, 32 and 64 on 8x8, 4x4 and 2x2 pixels; logits ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.layer3 = Block(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` of images ``[batch, 1, 8, 8]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _untrained(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


@lru_cache(maxsize=4)
def _trained(seed: int) -> nn.Module:
    return fit(_untrained(seed), loss, lambda s: batches("train", s), epochs=20, lr=0.1, weight_decay=5e-3, seed=seed).model


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Pixels ``[1797, 8, 8, 1]`` from 0 to 16 and labels, in the order the splits are taken from."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    return torch.from_numpy(pixels.reshape(-1, 8, 8, 1)).to(torch.uint8)[order], torch.from_numpy(labels).long()[order]
