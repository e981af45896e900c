"""The networks for CIFAR that HAP and EHAP prune: residual ones with projections for shortcuts, wide ones, pre-activated bottlenecks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


def _conv(width_in: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution with BatchNorm where the shape changes (option B of He et al., 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(width_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        same = width_in == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(width_in, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, not below zero."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class Residual(nn.Module):
    """Three stages of ``blocks`` blocks each behind one convolution of ``stem`` channels; logits ``[batch, classes]``."""

    def __init__(self, blocks: int, widths: tuple[int, int, int] = (16, 32, 64), stem: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, stem, 3), nn.BatchNorm2d(stem)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(width if n else before, width, 2 if stage and not n else 1) for n in range(blocks)))
            for stage, (before, width) in enumerate(zip((stem, *widths), widths, strict=False))
        )
        self.linear = nn.Linear(widths[-1], classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[batch, 3, 32, 32]``."""
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


class Bottleneck(nn.Module):
    """BatchNorm and ReLU before each of a 1x1, a 3x3 and a 1x1 convolution (He et al., 2016b); the shortcut is bare."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), _conv(width_in, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), _conv(width, width, 1)
        self.shortcut = nn.Identity() if width_in == width and stride == 1 else _conv(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths."""
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return self.conv3(F.relu(self.bn3(out))) + self.shortcut(x)


class PreResNet(nn.Module):
    """Three stages of bottlenecks without expansion: ``9 * blocks + 2`` layers, as HAP has them; logits ``[batch, classes]``."""

    def __init__(self, blocks: int = 3, widths: tuple[int, int, int] = (64, 128, 256), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv(3, widths[0], 3)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Bottleneck(width if n else before, width, 2 if stage and not n else 1) for n in range(blocks)))
            for stage, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.bn, self.linear = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[batch, 3, 32, 32]``."""
        out = F.relu(self.bn(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "resnet32": partial(Residual, 5),
    "resnet56": partial(Residual, 9),
    "wideresnet32": partial(Residual, 5, (64, 128, 256), 64),
    "wrn28_8": partial(Residual, 4, (128, 256, 512)),
    "preresnet29": PreResNet,
    "tiny": partial(Residual, 1, (4, 4, 8), 4),
}
"""By name; ``tiny`` is for trying things out."""


def _initialise(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(layer.weight)
