"""EfficientNet-Lite0 (Tan and Le, 2019, without squeeze and excitation, and with ReLU6): inverted residuals around depthwise convolutions.

Parts have the names under which converted weights of it are found: ``_conv_stem``, ``_blocks.{i}._depthwise_conv``, ``_fc`` and so on.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

STEM, HEAD = 32, 1280
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
"""Blocks, kernel, stride of the first block, expansion and width of each stage."""


class Conv(nn.Conv2d):
    """A convolution without bias; its output has ``ceil(size / stride)`` rows, and odd padding has one more below and to the right."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, width, kernel, stride, 0 if stride > 1 else kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, width, ceil(rows / stride), ceil(columns / stride)]``."""
        if self.stride[0] > 1:
            above, below = self._around(x.shape[2])
            left, right = self._around(x.shape[3])
            x = F.pad(x, (left, right, above, below))
        return super().forward(x)

    def _around(self, size: int) -> tuple[int, int]:
        missing = max((-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
        return missing // 2, missing - missing // 2


class Block(nn.Module):
    """Expanded by a pointwise convolution, filtered channel by channel, and projected; added to its input where shapes agree."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == width
        if self.expands:
            self._expand_conv, self._bn0 = Conv(channels, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = Conv(inner, inner, kernel, stride, inner), _norm(inner)
        self._project_conv, self._bn2 = Conv(inner, width, 1), _norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, width, rows / stride, columns / stride]``."""
        out = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(out)))
        out = self._bn2(self._project_conv(out))
        return out + x if self.adds else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 for images ``[batch, 3, rows, columns]``; returns logits ``[batch, classes]``."""

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Conv(3, STEM, 3, 2), _norm(STEM)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head, self._bn1 = Conv(STAGES[-1][-1], HEAD, 1), _norm(HEAD)
        self._dropout, self._fc = nn.Dropout(dropout), nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(self._dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _blocks() -> list[Block]:
    found, channels = [], STEM
    for count, kernel, stride, expansion, width in STAGES:
        for n in range(count):
            found.append(Block(channels, width, kernel, 1 if n else stride, expansion))
            channels = width
    return found
