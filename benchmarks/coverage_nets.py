"""Convolutional networks at their published depths and a quarter or so of their widths.

Each is written from the table of its paper: VGG (Simonyan and Zisserman 2014), ResNet (He et al. 2015), DenseNet (Huang et al. 2016),
MobileNetV2 (Sandler et al. 2018), MobileNetV3 (Howard et al. 2019), EfficientNet (Tan and Le 2019), ShuffleNet (Zhang et al. 2017),
ShuffleNetV2 (Ma et al. 2018), U-Net (Ronneberger et al. 2015), RegNetY (Radosavovic et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.coverage_vits import CLASSES, SelfAttention, ViT, encoder, fused


def unit(i: int, o: int, k: int = 1, *, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Classifier(nn.Module):
    """Features, averaged over positions, and a linear layer."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Sum(nn.Module):
    """The sum of what two branches make of the input, then an activation."""

    def __init__(self, main: nn.Module, short: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.main, self.short, self.act = main, short, act

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.act(self.main(x) + self.short(x))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int, squash: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.down, self.up, self.squash = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1), squash

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * self.squash(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def vgg16() -> nn.Module:
    """VGG-16 with batch norms and its classifier of three layers."""
    layers: list[nn.Module] = []
    width = 3
    for o, depth in ((16, 2), (32, 2), (64, 3), (96, 3), (96, 3)):
        for _ in range(depth):
            layers.append(unit(width, o, 3))
            width = o
        layers.append(nn.MaxPool2d(2))
    head = (nn.Flatten(), nn.Linear(width, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    return nn.Sequential(*layers, *head)


def resnet50(groups: int = 1) -> nn.Module:
    """ResNet-50 of bottlenecks; with ``groups`` ResNeXt."""
    layers: list[nn.Module] = [unit(3, 16, 3)]
    width = 16
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner, out = 16 * 2**stage, 64 * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            main = nn.Sequential(unit(width, inner), unit(inner, inner, 3, stride=stride, groups=groups), unit(inner, out, act=None))
            short = nn.Identity() if block else unit(width, out, stride=stride, act=None)
            layers.append(Sum(main, short, nn.ReLU()))
            width = out
    return Classifier(nn.Sequential(*layers), width)


class Dense(nn.Module):
    """A layer of DenseNet: its output is appended to its input."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(width), nn.Sequential(unit(width, 4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([x, self.body(F.relu(self.norm(x)))], 1)


def densenet121(growth: int = 8) -> nn.Module:
    """DenseNet-121 with compressing transitions."""
    layers: list[nn.Module] = [unit(3, 2 * growth, 3)]
    width = 2 * growth
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            layers.append(Dense(width, growth))
            width += growth
    return Classifier(nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU()), width)


def inverted(i: int, wide: int, o: int, k: int, stride: int, *, gate: int = 0, act: type[nn.Module] = nn.ReLU6) -> nn.Module:
    """An inverted residual: expand, depthwise, squeeze and excitation, project."""
    squash = F.hardsigmoid if act is nn.Hardswish else torch.sigmoid
    main = [unit(i, wide, act=act)] if wide != i else []
    main += [
        unit(wide, wide, k, stride=stride, groups=wide, act=act),
        *([Gate(wide, gate, squash)] if gate else []),
        unit(wide, o, act=None),
    ]
    body = nn.Sequential(*main)
    return Sum(body, nn.Identity(), nn.Identity()) if stride == 1 and i == o else body


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 of half width."""
    layers: list[nn.Module] = [unit(3, 16, 3, act=nn.ReLU6)]
    width = 16
    for expand, o, depth, stride in (
        (1, 8, 1, 1),
        (6, 12, 2, 2),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 1),
        (6, 160, 1, 1),
    ):
        for block in range(depth):
            layers.append(inverted(width, expand * width, o, 3, 1 if block else stride))
            width = o
    return Classifier(nn.Sequential(*layers, unit(width, 320, act=nn.ReLU6)), 320)


def mobilenet_v3() -> nn.Module:
    """MobileNetV3-Small of half width: kernel, expansion, output, gate, h-swish, stride."""
    table = (
        (3, 8, 8, 1, 0, 2), (3, 36, 12, 0, 0, 2), (3, 44, 12, 0, 0, 1), (5, 48, 20, 1, 1, 2), (5, 120, 20, 1, 1, 1), (5, 120, 20, 1, 1, 1),
        (5, 60, 24, 1, 1, 1), (5, 72, 24, 1, 1, 1), (5, 144, 48, 1, 1, 1), (5, 288, 48, 1, 1, 1), (5, 288, 48, 1, 1, 1),
    )  # fmt: skip
    layers: list[nn.Module] = [unit(3, 8, 3, act=nn.Hardswish)]
    width = 8
    for k, wide, o, gated, swish, stride in table:
        layers.append(inverted(width, wide, o, k, stride, gate=gated * wide // 4, act=nn.Hardswish if swish else nn.ReLU))
        width = o
    return Classifier(nn.Sequential(*layers, unit(width, 288, act=nn.Hardswish)), 288)


def efficientnet() -> nn.Module:
    """EfficientNet-B0 of half width."""
    layers: list[nn.Module] = [unit(3, 16, 3, act=nn.SiLU)]
    width = 16
    table = ((1, 8, 1, 1, 3), (6, 12, 2, 2, 3), (6, 20, 2, 2, 5), (6, 40, 3, 2, 3), (6, 56, 3, 1, 5), (6, 96, 4, 1, 5), (6, 160, 1, 1, 3))
    for expand, o, depth, stride, k in table:
        for block in range(depth):
            layers.append(inverted(width, expand * width, o, k, 1 if block else stride, gate=max(width // 4, 1), act=nn.SiLU))
            width = o
    return Classifier(nn.Sequential(*layers, unit(width, 320, act=nn.SiLU)), 320)


def regnet() -> nn.Module:
    """RegNetY-400MF of half width: groups of eight channels, gated bottlenecks."""
    layers: list[nn.Module] = [unit(3, 16, 3)]
    width = 16
    for o, depth in ((24, 1), (48, 3), (104, 6), (208, 6)):
        for block in range(depth):
            stride = 1 if block else 2
            inner = unit(o, o, 3, stride=stride, groups=o // 8)
            main = nn.Sequential(unit(width, o), inner, Gate(o, width // 4), unit(o, o, act=None))
            layers.append(Sum(main, nn.Identity() if block else unit(width, o, stride=stride, act=None), nn.ReLU()))
            width = o
    return Classifier(nn.Sequential(*layers), width)


class Shuffle(nn.Module):
    """A channel shuffle written with a view and a transposition."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shortened(nn.Module):
    """A block of ShuffleNet with stride two: averaged input and new channels side by side."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), self.body(x)], 1))


def shufflenet_v1(groups: int = 3) -> nn.Module:
    """ShuffleNet of grouped 1x1 convolutions with channel shuffles between them."""
    layers: list[nn.Module] = [unit(3, 12, 3)]
    width = 12
    for o, depth in ((60, 4), (120, 8), (240, 4)):
        for block in range(depth):
            made, inner, stride = (o, o // 4, 1) if block else (o - width, o // 4, 2)
            first = unit(width, inner - inner % groups, groups=groups)
            inner -= inner % groups
            last = [unit(inner, inner, 3, stride=stride, groups=inner, act=None), unit(inner, made, groups=groups, act=None)]
            body = nn.Sequential(first, Shuffle(groups), *last)
            layers.append(Sum(body, nn.Identity(), nn.ReLU()) if block else Shortened(body))
            width = o
    return Classifier(nn.Sequential(*layers), width)


class Halves(nn.Module):
    """A block of ShuffleNetV2: one half passes by, or both are worked on at stride two; then a shuffle."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        inner = o // 2
        self.stride, source = stride, i if stride == 2 else i // 2
        ends = unit(inner, inner, 3, stride=stride, groups=inner, act=None), unit(inner, inner)
        self.right = nn.Sequential(unit(source, inner), *ends)
        self.left = nn.Sequential(unit(i, i, 3, stride=2, groups=i, act=None), unit(i, inner)) if stride == 2 else nn.Identity()
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        left, right = (x, x) if self.stride == 2 else x.chunk(2, dim=1)
        return self.shuffle(torch.cat([self.left(left), self.right(right)], 1))


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2 0.5x."""
    layers: list[nn.Module] = [unit(3, 24, 3)]
    width = 24
    for o, depth in ((48, 4), (96, 8), (192, 4)):
        for block in range(depth):
            layers.append(Halves(width, o, 1 if block else 2))
            width = o
    return Classifier(nn.Sequential(*layers, unit(width, 256)), 256)


class UNet(nn.Module):
    """U-Net of four levels with transposed convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        sizes = [width * 2**n for n in range(5)]
        self.down = nn.ModuleList(nn.Sequential(unit(i, o, 3), unit(o, o, 3)) for i, o in zip([3, *sizes], sizes, strict=False))
        pairs = list(zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in pairs)
        self.merge = nn.ModuleList(nn.Sequential(unit(2 * o, o, 3), unit(o, o, 3)) for _, o in pairs)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        skips = [self.down[0](x)]
        for level in list(self.down)[1:]:
            skips.append(level(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


IMAGE, LARGE = (3, 16, 16), (3, 32, 32)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "VGG-16": (vgg16, LARGE),
    "ResNet-50": (resnet50, LARGE),
    "ResNeXt-50": (lambda: resnet50(groups=8), LARGE),
    "DenseNet-121": (densenet121, LARGE),
    "MobileNetV2": (mobilenet_v2, LARGE),
    "MobileNetV3": (mobilenet_v3, LARGE),
    "EfficientNet-B0": (efficientnet, LARGE),
    "RegNetY": (regnet, LARGE),
    "ShuffleNet": (shufflenet_v1, LARGE),
    "ShuffleNetV2": (shufflenet_v2, LARGE),
    "U-Net": (UNet, IMAGE),
    **{f"ViT, fused qkv by {way}": (fused(way), IMAGE) for way in ("chunk", "split", "reshape", "unflatten")},
    "ViT, nn.MultiheadAttention": (lambda: ViT(nn.Sequential(SelfAttention(), SelfAttention())), IMAGE),
    "ViT, nn.TransformerEncoderLayer": (lambda: ViT(encoder()), IMAGE),
}
