"""Ten classes of ImageNet and EfficientNet-Lite0, which tells a thousand: photographs of 224x224, few enough to measure with in minutes.

The data and the trained weights are yours to bring: the folder named by the option ``data`` or in the environment variable
``CURVEPRESS_DATA`` holds ``imagenette/calibration.parquet`` and ``imagenette/validation.parquet``, with columns ``image`` (encoded,
224x224) and ``label`` (of the thousand classes), and ``weights/imagenet_efficientnet_lite0.safetensors``.  ``validation.parquet`` is the
test split: images the network was not trained on.  The first four fifths of ``calibration.parquet`` are for training and calibration,
the rest for validation; to trained weights those images are not new.
"""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress_recipes.efficientnet import EfficientNetLite
from curvepress_recipes.images import Minibatches, accuracy, flipped, shifted

RECOVERY: dict[str, Any] = {"epochs": 4, "lr": 0.002, "weight_decay": 1e-5, "distill": 0.9}
SPLITS = ("train", "calibration", "validation", "test")
SIDE, CLASSES = 224, 1000
MEAN, STD = torch.full((3,), 127.0), torch.full((3,), 128.0)
INSTALL = "pip install 'curvepress[cifar10]'"


def model(trained: bool = True, data: str | None = None) -> nn.Module:
    """EfficientNet-Lite0 in eval mode; ``trained``: with the weights in the data folder.

    Raises:
        ValueError: if its weights are missing or damaged.
    """
    network = EfficientNetLite(CLASSES).eval()
    if trained:
        _load(network, _folder(data) / "weights" / "imagenet_efficientnet_lite0.safetensors")
    return network


def example() -> Tensor:
    """Two images of noise, ``[2, 3, 224, 224]``."""
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats."""
    return F.cross_entropy(output, targets)


def batches(split: str, seed: int = 0, batch_size: int = 32, data: str | None = None) -> Minibatches:
    """Normalised images ``[batch, 3, 224, 224]`` and labels ``[batch]``.

    ``train`` is flipped at random and cropped from a border of 16 zeros; ``calibration`` is the same images as they are.

    Raises:
        ValueError: if there is no such split, or the data is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    pixels, labels = _images(_folder(data) / "imagenette" / f"{'validation' if split == 'test' else 'calibration'}.parquet")
    border = len(labels) * 4 // 5
    rows = {"test": slice(None), "validation": slice(border, None)}.get(split, slice(border))
    learning, augment = split in ("train", "calibration"), _augmented if split == "train" else None
    return Minibatches(pixels[rows], labels[rows], batch_size, MEAN, STD, learning, augment, seed)


def evaluate(model: nn.Module, split: str, batch_size: int = 50, data: str | None = None) -> dict[str, float]:
    """``accuracy`` in percent, of a thousand classes, and ``loss`` in nats over a split."""
    return accuracy(model, batches(split, batch_size=batch_size, data=data))


def _augmented(pixels: Tensor, chance: torch.Generator) -> Tensor:
    return shifted(16)(flipped(pixels, chance), chance)


def _folder(data: str | None) -> Path:
    named = data or os.environ.get("CURVEPRESS_DATA")
    if not named:
        raise ValueError("name the folder of imagenette/ and weights/ with the option data, or in the environment variable CURVEPRESS_DATA")
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist; it should hold imagenette/ and weights/")
    return folder


@lru_cache(maxsize=2)
def _images(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels ``[images, 224, 224, 3]`` from 0 to 255 and labels of a file."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is not installed: {INSTALL}") from None
    try:
        table = pq.read_table(path)
        encoded, labels = table["image"].to_pylist(), table["label"].to_numpy()
        pixels = np.stack([_pixels(row["bytes"], path) for row in encoded])
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing, damaged, or without columns image and label ({error})") from None
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path}: labels must be whole numbers from 0 to {CLASSES - 1}; found {np.unique(labels)[:20].tolist()}")
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


def _pixels(image: bytes, source: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"the images of {source} need Pillow, which is not installed: {INSTALL}") from None
    try:
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"an image of {source} cannot be decoded ({error}); get the file again") from None
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"an image of {source} is {pixels.shape[1]}x{pixels.shape[0]}; {SIDE}x{SIDE} is expected")
    return pixels


def _load(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"there are no trained weights at {path}; put them there as safetensors, or begin with trained=False and train it")
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{path} does not hold EfficientNet-Lite0 or is damaged: {error}") from None
