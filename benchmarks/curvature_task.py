"""What curvature is measured on: a trained network and real training images in one fixed order, decoded once into a cache."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from curvepress.files import write_bytes
from curvepress_recipes import cifar10 as recipe
from curvepress_recipes.images import Minibatches

POPULATION = 16_384
ORDER = 7

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A trained network in eval mode and training images without augmentation, in an order drawn once.

    The first 16,384 images stand for the population and are never given to an estimator; the others are its pool.
    """

    model: nn.Module
    pixels: Tensor  # [images, height, width, channels]
    labels: Tensor  # [images]

    def population(self, start: int, stop: int) -> Batch:
        """Images and labels ``start`` to ``stop`` of the population."""
        return self._batch(start, min(stop, POPULATION))

    def pool(self, size: int, start: int = 0) -> Batch:
        """``size`` images of the pool and their labels; the first 128 are the fixed batch of the comparison."""
        return self._batch(POPULATION + start, POPULATION + start + size)

    def _batch(self, start: int, stop: int) -> Batch:
        rows = slice(start, stop)
        return next(iter(Minibatches(self.pixels[rows], self.labels[rows], stop - start, recipe.MEAN, recipe.STD)))


def task(depth: int, cache: Path) -> Task:
    """The residual network of ``depth`` layers for CIFAR-10; images come from ``cache``, which is filled at the first call."""
    names = [cache / "pixels.npy", cache / "labels.npy"]
    if not all(name.is_file() for name in names):
        _decode(*names)
    pixels, labels = (torch.from_numpy(np.load(name, mmap_mode="c")) for name in names)
    return Task(recipe.model(depth=depth), pixels, labels)


def _decode(pixels: Path, labels: Path) -> None:
    images = recipe.batches("calibration")
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(ORDER))
    save(pixels, images.pixels[order].numpy())
    save(labels, images.labels[order].numpy())


def save(path: Path, array: np.ndarray) -> None:
    """Write an array in NumPy's format, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue())


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions and linear layers by name, in the order of the network; their rows are the channels."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return {f"{n}.weight": m.weight for n, m in layers}


def sensitivity(model: nn.Module, traces: np.ndarray) -> np.ndarray:
    """HAP's ``tr(H_cc) / p_c * ||w_c||^2`` of every channel, from ``traces`` ``[channels]`` in the order of ``weights``."""
    rows = [w.detach().double().flatten(1) for w in weights(model).values()]
    return traces * torch.cat([r.square().mean(1) for r in rows]).numpy()


def sizes(model: nn.Module) -> np.ndarray:
    """The number of weights ``p_c`` of every channel; as traces they make the sensitivity ``||w_c||^2``."""
    return np.concatenate([np.full(len(w), w[0].numel(), dtype=float) for w in weights(model).values()])
