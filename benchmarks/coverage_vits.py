"""Small vision transformers (Dosovitskiy et al. 2020) whose queries, keys and values come out of one projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


class Block(nn.Module):
    """A pre-norm transformer block whose fused projection is taken apart in the given way."""

    def __init__(self, way: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.way, self.heads, self.width = way, heads, width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.up, self.down = (
            nn.Linear(i, o) for i, o in ((width, 3 * width), (width, width), (width, 48), (48, width))
        )

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value ``[batch, heads, positions, width]``."""
        n, t, _ = x.shape
        if self.way == "chunk":
            return tuple(p.view(n, t, self.heads, -1).transpose(1, 2) for p in x.chunk(3, dim=-1))
        if self.way == "split":
            return tuple(p.view(n, t, self.heads, self.width // self.heads).transpose(1, 2) for p in x.split(self.width, dim=-1))
        if self.way == "reshape":
            return x.reshape(n, t, 3, self.heads, self.width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return x.unflatten(-1, (3, self.heads, self.width // self.heads)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self.parts(self.qkv(self.norm1(x)))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token, blocks, and a linear layer on the class token."""

    def __init__(self, blocks: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.patch, self.blocks, self.norm, self.head = nn.Conv2d(3, width, 4, 4), blocks, nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with a residual connection."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def encoder() -> nn.Module:
    """Two layers of nn.TransformerEncoderLayer."""
    return nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True) for _ in range(2)))


def fused(way: str) -> Callable[[], nn.Module]:
    """A small ViT with the projection taken apart in this way."""
    return lambda: ViT(nn.Sequential(Block(way), Block(way)))
