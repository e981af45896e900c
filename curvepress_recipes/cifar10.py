"""CIFAR-10 and the residual networks of He et al. for it: 32x32 colour photographs of ten classes.

The data and the trained weights are yours to bring: name their folder with the option ``data`` or in the
environment variable ``CURVEPRESS_DATA``.  It holds CIFAR-10 in one of the usual layouts (see
``cifar10_files``) and ``weights/cifar10_resnet{depth}.safetensors``.  The last tenth of the training images, 5,000
of 50,000, is for validation; the rest is for training and calibration.  Weights that were trained elsewhere have
usually seen all 50,000: to them the validation images are not new, only the test images are.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress_recipes.cifar10_files import LAYOUT, decode, find
from curvepress_recipes.images import Minibatches, accuracy, flipped, shifted
from curvepress_recipes.resnet import ResNet

RECOVERY: dict[str, Any] = {"epochs": 1, "lr": 0.01, "weight_decay": 1e-4, "distill": 0.9}
SPLITS = ("train", "calibration", "validation", "test")
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406])
STD = 255 * torch.tensor([0.229, 0.224, 0.225])


def model(trained: bool = True, depth: int = 20, data: str | None = None) -> nn.Module:
    """A residual network of ``depth`` layers in eval mode; ``trained``: with the weights in the data folder.

    Raises:
        ValueError: if the depth is not 6n + 2, or its weights are missing or damaged.
    """
    network = ResNet(depth).eval()
    if trained:
        _load(network, folder_of(data) / "weights" / f"cifar10_resnet{depth}.safetensors")
    return network


def example() -> Tensor:
    """Two images of noise, ``[2, 3, 32, 32]``."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats."""
    return F.cross_entropy(output, targets)


def batches(split: str, seed: int = 0, batch_size: int = 128, data: str | None = None) -> Minibatches:
    """Normalised images ``[batch, 3, 32, 32]`` and labels ``[batch]``.

    ``train`` is flipped at random and cropped from a border of 4 zeros; ``calibration`` is the same images as they are.

    Raises:
        ValueError: if there is no such split, or the data is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    pixels, labels = _images(folder_of(data), "train" if split == "calibration" else split)
    learning, augment = split in ("train", "calibration"), augmented if split == "train" else None
    return Minibatches(pixels, labels, batch_size, MEAN, STD, learning, augment, seed)


def evaluate(model: nn.Module, split: str, batch_size: int = 250, data: str | None = None) -> dict[str, float]:
    """``accuracy`` in percent and ``loss`` in nats over a split."""
    return accuracy(model, batches(split, batch_size=batch_size, data=data))


def augmented(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Images mirrored at random and cropped from a border of 4 zeros."""
    return shifted(4)(flipped(pixels, chance), chance)


def folder_of(data: str | None) -> Path:
    """The data folder.

    Raises:
        ValueError: if none is named, or it does not exist.
    """
    named = data or os.environ.get("CURVEPRESS_DATA")
    if not named:
        raise ValueError(f"name the folder of CIFAR-10 with the option data, or in the environment variable CURVEPRESS_DATA. {LAYOUT}")
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist. {LAYOUT}")
    return folder


@lru_cache(maxsize=3)
def _images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pixels ``[images, 32, 32, 3]`` from 0 to 255 and labels of ``train``, ``validation`` or ``test``."""
    part = find(folder, "test" if split == "test" else "train")
    held_out = len(part.labels) // 10 if split != "test" else 0
    border = len(part.labels) - held_out
    images, labels = decode(part, slice(border, None) if split == "validation" else slice(border))
    return torch.from_numpy(images), torch.from_numpy(labels)


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"there are no trained weights at {path}. Put them there as safetensors, with the names conv1, bn1, "
            f"layer{{1,2,3}}.{{i}}.{{conv1,bn1,conv2,bn2}} and linear, or begin with trained=False and train it"
        )
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} does not hold this network or is damaged: {error}") from None
