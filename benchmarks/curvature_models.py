"""Networks for the measurements on accelerators: random weights from a seed, and inputs of their kind.

Wide residual networks are those of Zagoruyko and Komodakis, 2016; the vision transformer that of Dosovitskiy et al., 2021, in the
small size of Touvron et al., 2021; the encoder that of Devlin et al., 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress_recipes.resnet import ResNet


class Wide(nn.Module):
    """A wide residual network of ``depth`` = 6n + 4 layers, ``factor`` times as wide, for 32x32 images; returns ``[batch, 10]``."""

    def __init__(self, depth: int, factor: int) -> None:
        super().__init__()
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks = []
        for stage in range(3):
            for i in range((depth - 4) // 6):
                before = widths[stage] if i == 0 else widths[stage + 1]
                blocks.append(WideBlock(before, widths[stage + 1], 2 if stage and i == 0 else 1))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, 10]``."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice, and a shortcut that is a convolution where the shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(before, width, 1, stride, bias=False) if before != width or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths."""
        y = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + (self.shortcut(y) if self.shortcut else x)


class Layer(nn.Module):
    """Self-attention and two linear layers; norms come before them (``first``) or after the sums."""

    def __init__(self, width: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same shape."""
        if self.first:
            x = x + self._attention(self.norm1(x))
            return x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        x = self.norm1(x + self._attention(x))
        return self.norm2(x + self.narrow(F.gelu(self.wide(x))))

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Patches(nn.Module):
    """Images in patches of 16x16 as tokens, after a class token, with positions; ``[batch, 1 + patches, width]``."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // 16) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[batch, 1 + patches, width]``."""
        tokens = self.project(x).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.positions


class Words(nn.Module):
    """Embeddings of tokens and positions and a norm; ``[batch, tokens, width]``."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.words, self.positions, self.norm = nn.Embedding(vocabulary, width), nn.Embedding(length, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Embedded tokens ``[batch, tokens, width]``."""
        return self.norm(self.words(x) + self.positions(torch.arange(x.shape[1], device=x.device)))


class First(nn.Module):
    """The first token of each example, ``[batch, width]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to ``[batch, width]``."""
        return x[:, 0]


def vision_transformer(side: int = 224, width: int = 384, depth: int = 12, heads: int = 6, classes: int = 1000) -> nn.Module:
    """ViT-S/16; returns ``[batch, classes]``."""
    layers = [Layer(width, heads, first=True) for _ in range(depth)]
    return nn.Sequential(Patches(side, width), *layers, nn.LayerNorm(width), First(), nn.Linear(width, classes))


def encoder(vocabulary: int = 30_522, width: int = 768, depth: int = 12, heads: int = 12, classes: int = 2) -> nn.Module:
    """BERT-base with a pooler and a head for sentences; returns ``[batch, classes]``."""
    layers = [Layer(width, heads, first=False) for _ in range(depth)]
    return nn.Sequential(Words(vocabulary, 512, width), *layers, First(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))


@dataclass(frozen=True)
class Subject:
    """How a network and a batch of its inputs are made; ``classes`` is the width of the output."""

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Tensor]
    classes: int = 10

    def make(self, seed: int, device: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The network in eval mode and ``(inputs, labels)`` on ``device``."""
        torch.manual_seed(seed)
        chance = torch.Generator().manual_seed(seed)
        inputs = self.inputs(chance)
        labels = torch.randint(self.classes, (len(inputs),), generator=chance)
        return self.model().eval().to(device), (inputs.to(device), labels.to(device))


def _images(count: int, side: int) -> Callable[[torch.Generator], Tensor]:
    return lambda chance: torch.randn(count, 3, side, side, generator=chance)


def _sentences(count: int, length: int, vocabulary: int = 30_522) -> Callable[[torch.Generator], Tensor]:
    return lambda chance: torch.randint(vocabulary, (count, length), generator=chance)


SUBJECTS: dict[str, Subject] = {
    "resnet32": Subject(lambda: ResNet(32), _images(128, 32)),
    "resnet56": Subject(lambda: ResNet(56), _images(128, 32)),
    "wrn28-8": Subject(lambda: Wide(28, 8), _images(128, 32)),
    "vit-s": Subject(vision_transformer, _images(64, 224), 1000),
    "bert-base": Subject(encoder, _sentences(32, 128), 2),
}
SMALL: dict[str, Subject] = {
    "resnet32": Subject(lambda: ResNet(8), _images(2, 16)),
    "resnet56": Subject(lambda: ResNet(14), _images(2, 16)),
    "wrn28-8": Subject(lambda: Wide(10, 1), _images(2, 16)),
    "vit-s": Subject(lambda: vision_transformer(32, 16, 2, 2, 10), _images(4, 32)),
    "bert-base": Subject(lambda: encoder(50, 16, 2, 2), _sentences(4, 6, 50), 2),
}
"""The same networks in a size for tests."""
