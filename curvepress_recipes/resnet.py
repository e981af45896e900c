"""The residual networks for CIFAR-10 of He, Zhang, Ren and Sun, 2016 (section 4.2), with shortcuts that have no parameters."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the width grows, the shortcut is strided and padded with zeros (option A)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.padding = 0 if width_in == width else width // 4
        self.conv1 = nn.Conv2d(width_in, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, not below zero."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ResNet(nn.Module):
    """A residual network of ``depth`` = 6n + 2 layers for images ``[batch, 3, height, width]``; returns logits ``[batch, classes]``.

    Raises:
        ValueError: if no number of blocks gives that depth.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 with n at least 1 (8, 14, 20, 32, 56 ...); got {depth!r}")
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], depth // 6)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], depth // 6)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], depth // 6)
        self.linear = nn.Linear(WIDTHS[2], classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(width_in: int, width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(width_in, width), *(Block(width, width) for _ in range(blocks - 1)))


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(layer.weight)
