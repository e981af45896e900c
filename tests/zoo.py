"""Small networks of every kind, in float64, with norms that are not at their initial values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o))


class Residual(nn.Module):
    """A basic block with a projection, an option-A padded or an identity shortcut."""

    def __init__(self, i: int, o: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(i, o, 3, stride), conv_bn(o, o)
        self.out, self.widens, self.padded = o, i != o, padded
        self.short = conv_bn(i, o, 1, stride) if self.widens and not padded else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.widens and self.padded:
            return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.out // 4, self.out // 4)))
        return F.relu(y + self.short(x))


class ResNet(nn.Module):
    def __init__(self, padded: bool) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.blocks = nn.Sequential(Residual(8, 8, 1, padded), Residual(8, 16, 2, padded), Residual(16, 16, 1, padded))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 3, padding=1)
        self.bn3, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn1(x), inplace=True)
        x = x + self.conv2(F.relu(self.bn2(self.conv1(y))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.bn3(x)), 1).flatten(1))


class VGG(nn.Module):
    """Convolutions with biases, max pooling, and a flatten into linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(8 * 4, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class ConstantView(VGG):
    """The same, flattened by a constant in user code."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, 32))


class DenseNet(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * n) for n in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * n, 4, 3, padding=1, bias=False) for n in range(3))
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, r: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(c, r, 1), nn.Conv2d(r, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class MobileNet(nn.Module):
    """Inverted residuals: expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.expand, self.depthwise = conv_bn(8, 16, 1), conv_bn(16, 16, 3, groups=16)
        self.gate, self.project = SqueezeExcite(16, 4), conv_bn(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = self.gate(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        return self.head((x + self.project(y)).mean((2, 3)))


class ResNeXt(nn.Module):
    """Grouped convolutions that are not depthwise, with a channel multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 12), conv_bn(12, 24, 3, groups=4), conv_bn(24, 12, 1)
        self.multiply = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.c(F.relu(self.b(x))) + x)
        return self.head(F.relu(self.multiply(x)).mean((2, 3)))


class ShuffleNet(nn.Module):
    """Grouped 1x1 convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 12), conv_bn(12, 12, 1, groups=3), conv_bn(12, 12, 1, groups=3)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(F.relu(self.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.b(x)).mean((2, 3)))


class ShuffleNetV2(nn.Module):
    """Half of the channels pass by, and nn.ChannelShuffle mixes the halves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch1, self.branch2 = conv_bn(3, 16), conv_bn(8, 8), conv_bn(8, 8)
        self.shuffle, self.head = nn.ChannelShuffle(2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for branch in (self.branch1, self.branch2):
            left, right = x.chunk(2, dim=1)
            x = self.shuffle(torch.cat([left, F.relu(branch(right))], 1))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Skip concatenation, transposed convolution, upsampling; per-pixel outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 6), conv_bn(6, 8, 3, 2), conv_bn(8, 10, 3, 2)
        self.up2, self.merge2 = nn.ConvTranspose2d(10, 8, 2, 2), conv_bn(16, 8)
        self.merge1, self.head = conv_bn(14, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(a))
        c = F.relu(self.bottom(b))
        b = F.relu(self.merge2(torch.cat([self.up2(c), b], 1)))
        b = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(F.relu(self.merge1(torch.cat([b, a], 1))))


class Inception(nn.Module):
    """Branches concatenated, then flattened: several groups in one dimension, each in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.mix = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.head = nn.Linear(10 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(torch.cat([self.a(x), self.b(x)], 1)).relu().flatten(1))


class ConvNeXt(nn.Module):
    """Depthwise convolution, channels-last layer norm, an inverted MLP and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale, self.head = nn.Parameter(torch.rand(8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.silu(self.norm(self.a(x))))).mean((2, 3)))


class GroupedView(nn.Module):
    """Grouped convolution and group norm in front of a constant of user code, so that only a rewritten graph will do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 2, 1, groups=4)
        self.norm, self.head = nn.GroupNorm(4, 12), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.b(F.relu(self.a(x))))).view(-1, 48))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.GELU(), nn.Linear(20, 12), nn.PReLU(12), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GatedMLP(nn.Module):
    """A fused gate and value projection, split in halves, with layer norm and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(24, 10), nn.LayerNorm(10)
        self.up, self.down, self.head = nn.Linear(10, 32), nn.Linear(16, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).flatten(1)[:, :24])
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return self.head(x + self.down(F.silu(gate) * value))


class Shared(nn.Module):
    """One convolution used twice in a row, so that its inputs and outputs are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.twice(F.relu(self.twice(self.stem(x))))).mean((2, 3)))


class Tied(nn.Module):
    """Two layers that hold the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.c = nn.Linear(8, 8)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x.flatten(1))))))))


class Volume(nn.Module):
    """One- and three-dimensional convolutions and an in-place addition."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.cube = nn.Conv1d(3, 6, 3, padding=1), nn.Conv3d(6, 8, 3, padding=1)
        self.norm, self.skip, self.head = nn.BatchNorm3d(8), nn.Conv3d(6, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.line(x.flatten(2))).unflatten(2, (4, 4, 4))
        y = self.norm(self.cube(x))
        y += self.skip(x)
        return self.head(F.adaptive_max_pool3d(y.relu_(), 1).flatten(1))


class Attention(nn.Module):
    """A transformer block with a fused qkv projection, reshaped into heads by constants."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 4, 16))
        self.norm1, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.norm1(x)).view(-1, 4, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 4, 16)
        x = x + self.out(y)
        return self.head((x + self.down(F.gelu(self.up(self.norm2(x)))))[:, 0])


class Odd(nn.Module):
    """A cumulative sum over channels has no rule: what it touches must be frozen, not guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Linear(6, 5)
        self.spare = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).cumsum(1)).mean((2, 3)))


PLAIN = (
    PreActivation, VGG, ConstantView, DenseNet, MobileNet, ResNeXt, ShuffleNet, ShuffleNetV2, UNet, Inception, ConvNeXt, GroupNormNet,
    GroupedView, MLP, GatedMLP, Shared, Tied, Volume, Attention, Odd,
)  # fmt: skip
ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: ResNet(padded=False),
    "resnet_padded": lambda: ResNet(padded=True),
    **{f.__name__.lower(): f for f in PLAIN},
}


@dataclass(frozen=True)
class Case:
    """A network of the zoo and inputs for it."""

    name: str
    model: nn.Module
    example: tuple[Tensor, ...]


def make(name: str, seed: int = 0) -> Case:
    """The named network with random weights and statistics, in float64 and evaluation mode."""
    torch.manual_seed(seed)
    model = ZOO[name]().double()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Case(name, model.eval(), (torch.randn(4, 3, 8, 8, dtype=torch.float64),))
