"""Structures, scores and prices of bits to plan with: of small models and drawn at random, nothing to wait for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from curvepress.bitplan import Wiring
from curvepress.implants import RankPrice, ranks, replaceable
from curvepress.planner.wiring import wiring
from curvepress.quantization.bitwidths import BitPrices, Price, layout_of
from curvepress.scores import LOSS_UNIT, Scores
from curvepress.structure import Structure
from curvepress.surgery.layers import refusal
from curvepress.tracing.watching import trace

WIDTHS = (2, 3, 4, 8)


class Residual(nn.Module):
    """A stem, a block with a bottleneck and one depthwise, joined twice, a concatenation, and a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.inner_norm = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.outer = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = x + self.outer(self.deep(self.inner_norm(self.inner(x)).relu()).relu())
        return self.head(torch.cat([x.mean((2, 3)), y.relu().mean((2, 3))], 1))


class Attention(nn.Module):
    """Two heads of width four between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v
        return self.head((x + self.o(mixed.transpose(1, 2).flatten(2))).mean(1))


def residual(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model with other than trivial statistics, and an example."""
    torch.manual_seed(seed)
    model = Residual()
    for norm in (model.norm, model.inner_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.eval(), torch.randn(2, 2, 5, 5)


def attention(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model and an example."""
    torch.manual_seed(seed)
    return Attention().eval(), torch.randn(2, 7, 5)


def chain(widths: tuple[int, ...] = (4, 4, 4), seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Linear layers in a row."""
    torch.manual_seed(seed)
    sizes = (3, *widths, 2)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).eval(), torch.randn(2, 3)


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def blocks(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Two residual blocks on a narrow stream."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), Block(2, 3), Block(2, 2), nn.Linear(2, 2)).eval(), torch.randn(2, 3)


def branch_prices(structure: Structure, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Of every residual branch, over several orders of magnitude."""
    rng = np.random.default_rng(seed + 2)
    return {b.name: (float(10 ** rng.uniform(-3, 0)), 0.01) for b in structure.branches}


def drawn_scores(structure: Structure, seed: int = 0) -> Scores:
    """Positive scores over several orders of magnitude."""
    rng = np.random.default_rng(seed)
    values = {g.name: 10 ** rng.uniform(-4, -1, g.size) for g in structure.free}
    return Scores(values, {g: v / 5 for g, v in values.items()}, "drawn", LOSS_UNIT, 2, seed)


def drawn_prices(model: nn.Module, example: Tensor, seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> BitPrices:
    """Prices that fall by about four with each bit."""
    rng, layout = np.random.default_rng(seed + 1), layout_of(model, example)

    def priced(names: list[str]) -> dict[str, dict[int, Price]]:
        scale = {n: 10 ** rng.uniform(-2, 0.5) for n in names}
        return {n: {b: Price(s * 4.0**-b * rng.uniform(0.8, 1.2), s * 4.0**-b / 10) for b in widths} for n, s in scale.items()}

    return BitPrices(layout, priced([w.name for w in layout.weights]), priced([s.name for s in layout.sites]), "drawn")


def everything(model: nn.Module, example: Tensor, seed: int = 0) -> tuple[Structure, Scores, BitPrices, Wiring]:
    """Structure, scores, prices and wiring."""
    structure = trace(model, example)
    return structure, drawn_scores(structure, seed), drawn_prices(model, example, seed), wiring(model, structure, example)


def drawn_ranks(model: nn.Module, structure: Structure, seed: int = 0) -> dict[str, dict[int, RankPrice]]:
    """Prices of implants, that fall with the rank, for every weight that can have one."""
    rng, found = np.random.default_rng(seed + 3), {}
    for name, spec in structure.tensors.items():
        if replaceable(structure, name) and not refusal(model.get_submodule(name.removesuffix(".weight"))):
            scale = 10 ** rng.uniform(-3, -1)
            found[name] = {r: RankPrice(scale / r**2, scale / 10, 0, 0) for r in ranks(spec.shape)}
    return found
