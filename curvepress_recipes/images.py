"""Minibatches of images kept in memory, their augmentation, and the accuracy of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress.objective import Batches, batch_size, output

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""From pixels ``[batch, height, width, channels]`` and a source of chance to other pixels of the same shape."""


@dataclass(frozen=True)
class Minibatches:
    """A sized iterable of ``(inputs [batch, channels, height, width], labels [batch])``, the same at every pass.

    The inputs are ``(pixels - mean) / std`` in the default dtype, their memory in channels-last order, which
    convolutions on a CPU read fastest.  With ``shuffle`` the order follows from ``seed``.  With ``augment``
    the images change too, and a last batch that is not full is left out, unless it is the only one.
    """

    pixels: Tensor  # [images, height, width, channels]
    labels: Tensor  # [images]
    size: int
    mean: Tensor  # [channels], in units of a pixel
    std: Tensor  # [channels], in units of a pixel
    shuffle: bool = False
    augment: Augmentation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"batch_size must be a whole number, 1 or more; got {self.size!r}")

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.size)
        return whole + bool(rest and not (whole and self.augment))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chance = torch.Generator().manual_seed(self.seed)
        count = len(self.labels)
        order = torch.randperm(count, generator=chance) if self.shuffle else torch.arange(count)
        for rows in order.split(self.size)[: len(self)]:
            pixels = self.augment(self.pixels[rows], chance) if self.augment else self.pixels[rows]
            normal = (pixels.to(torch.get_default_dtype()) - self.mean) / self.std
            yield normal.permute(0, 3, 1, 2), self.labels[rows]


def shifted(padding: int) -> Augmentation:
    """Each image padded with ``padding`` zeros on every side and cropped to its size at a random place."""

    def shift(pixels: Tensor, chance: torch.Generator) -> Tensor:
        count, height, width, _ = pixels.shape
        padded = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        corner = torch.randint(2 * padding + 1, (2, count, 1), generator=chance)
        rows, columns = corner[0] + torch.arange(height), corner[1] + torch.arange(width)
        return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]

    return shift


def flipped(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    heads = torch.rand(len(pixels), generator=chance) < 0.5
    return torch.where(heads[:, None, None, None], pixels.flip(2), pixels)


def accuracy(model: nn.Module, batches: Batches) -> dict[str, float]:
    """``accuracy``, the percentage classified rightly, and ``loss``, the mean cross-entropy in nats, of ``model`` in eval mode.

    The modes of the model's parts are as before afterwards.
    """
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    right, loss, count = 0, 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            logits, labels = output(model, batch), batch[1]
            right += int((logits.argmax(1) == labels).sum())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            count += batch_size(batch)
    for part, training in modes:
        part.training = training
    return {"accuracy": 100 * right / count if count else math.nan, "loss": loss / count if count else math.nan}
