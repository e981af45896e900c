"""The modules that quantization adds to a graph.  Each can be switched off, and then returns what it is given."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..quantizer import (  # fmt: skip
    Grid,
    Histogram,
    Observer,
    Scheme,
    bias_scale,
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_learned,
    fit_bias,
    fit_grid,
    gradient_scale,
    learned_grid,
)
from .learning import round_and_learn

LEAST = 0.25
"""Training takes no scale below this share of what it was fitted to: those of nearly dead channels would else jump below zero."""
ROOM = 16
"""How many times the scale of activations can shrink in training before a bias does not fit into 32 bits."""


class Quantizer(nn.Module):
    """Puts a tensor on a grid.  In training the scale learns (LSQ), unless it does not require gradients."""

    def __init__(self, name: str, scheme: Scheme) -> None:
        super().__init__()
        self.name, self.scheme, self.on = name, scheme, True
        self.scale = nn.Parameter(torch.tensor(math.nan))
        self.register_buffer("least", torch.tensor(0.0))
        self.least: Tensor

    @property
    def zero(self) -> Tensor:
        """The zero point."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        """The grid as it now is.

        Raises:
            ValueError: if there is none yet, or training made a scale that is not positive.
        """
        if bool(self.scale.isnan().any()):
            raise ValueError(f"{self.name} has no grid yet: call calibrate(module, batches) first")
        return learned_grid(self.scheme, self.step.detach(), self.zero)

    @grid.setter
    def grid(self, grid: Grid) -> None:
        self.take(grid)

    def take(self, grid: Grid) -> None:
        """Have this grid, and learn from there on."""
        self.scheme = grid.scheme
        self.scale = nn.Parameter(grid.scale.clone(), self.scale.requires_grad)
        self.least = LEAST * grid.scale

    @property
    def step(self) -> Tensor:
        """The scale, not below the least; its gradient goes through, so that it can grow again."""
        return self.scale + (self.scale.detach().maximum(self.least) - self.scale.detach())


class WeightQuantizer(Quantizer):
    """Puts a weight on a grid for each output channel; zero points, where there are any, stay as they are."""

    def __init__(self, name: str, scheme: Scheme) -> None:
        super().__init__(name, scheme)
        self.register_buffer("zero_point", torch.tensor(0.0))
        self.zero_point: Tensor

    @property
    def zero(self) -> Tensor:
        """The zero points."""
        return self.zero_point

    def take(self, grid: Grid) -> None:
        """Have this grid, and learn its scales from there on."""
        super().take(grid)
        self.zero_point = grid.zero_point.float()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid."""
        if not self.on:
            return x
        if self.training and self.scale.requires_grad and torch.is_grad_enabled():
            slowness = gradient_scale(x.numel() // self.scale.numel(), self.scheme)
            return fake_quantize_learned(x, self.scheme, self.step, self.zero_point, slowness)
        return fake_quantize(x, self.grid)

    def make_room(self, bias: Tensor, activation: Grid) -> None:
        """Raise the scales of nearly dead channels so far that the bias fits into 32 bits on the grid of the activations."""
        tiny = replace(self.grid, scale=torch.full_like(self.scale, torch.finfo(torch.float32).tiny))
        enough = ROOM * fit_bias(tiny, bias.detach(), activation).scale
        self.least = self.least.maximum(enough)
        with torch.no_grad():
            self.scale.copy_(self.scale.maximum(self.least))


class ActivationQuantizer(Quantizer):
    """Puts activations on one grid for the tensor; while it has an ``observer``, only looks at them.

    Where the grid reaches below zero, training learns its lower end ``offset`` too, in the unit of the activations (LSQ+, Bhalgat et al.
    2020, arXiv:2004.09576); its zero point is the level nearest to zero, so that zero stays on the grid.
    """

    def __init__(self, name: str, scheme: Scheme) -> None:
        super().__init__(name, scheme)
        self.observer: Observer | None = None
        self.offset = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    @property
    def zero(self) -> Tensor:
        """The zero point."""
        return (-self.offset.detach() / self.step.detach()).round().clamp(self.scheme.qmin, self.scheme.qmax)

    def take(self, grid: Grid) -> None:
        """Have this grid, and learn its scale and lower end from there on."""
        super().take(grid)
        lowest = (grid.scheme.qmin - grid.zero_point) * grid.scale
        self.offset = nn.Parameter(lowest, self.scale.requires_grad and bool(lowest))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid, or ``x`` itself while observing."""
        if self.observer is not None:
            self.observer.observe(x.detach())
            return x
        if not self.on:
            return x
        if torch.is_grad_enabled() and not self.scale.isnan():
            slowness = gradient_scale(max(1, x.numel() // max(1, len(x))), self.scheme)  # by the elements of one example
            return round_and_learn(x, self.scheme, self.step, self.offset, slowness)
        return fake_quantize(x, self.grid)

    def fit(self, histogram: Histogram, method: str) -> None:
        """Take the grid that suits what was seen."""
        self.grid = fit_grid(histogram, self.scheme, method=method, name=self.name)  # type: ignore[arg-type]


class TokenQuantizer(nn.Module):
    """Puts each token, a vector along the last dimension, on a grid of its own between its least and its largest number."""

    def __init__(self, name: str, scheme: Scheme) -> None:
        super().__init__()
        self.name, self.scheme, self.on = name, scheme, True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grids; the gradient goes through."""
        if not self.on:
            return x
        levels = self.scheme.qmax
        low, high = x.detach().amin(-1, keepdim=True).clamp_max(0.0), x.detach().amax(-1, keepdim=True).clamp_min(0.0)
        scale = ((high - low) / levels).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.round(-low / scale)
        rounded = (torch.clamp(torch.round(x.detach() / scale) + zero, 0, levels) - zero) * scale
        return x + (rounded - x.detach()) if x.requires_grad else rounded


class BiasQuantizer(nn.Module):
    """Rounds a bias as the runtime does, to int32 on the scale of the products it is added to."""

    def __init__(self, weight: WeightQuantizer, activation: ActivationQuantizer) -> None:
        super().__init__()
        self.factors = (weight, activation)  # a tuple, so that they are not modules of this one

    def forward(self, bias: Tensor) -> Tensor:
        """The bias that is added."""
        weight, activation = self.factors
        if not (weight.on and activation.on) or activation.observer is not None:
            return bias
        return fake_quantize_bias(bias, bias_scale(weight.grid, activation.grid))


def quantizers(module: nn.Module) -> Iterator[Quantizer]:
    """The quantizers of weights and activations, in the order of the graph."""
    return (m for m in module.modules() if isinstance(m, Quantizer))


def _switches(module: nn.Module) -> list[Quantizer | TokenQuantizer]:
    return [m for m in module.modules() if isinstance(m, (Quantizer, TokenQuantizer))]


def switch(module: nn.Module, on: bool) -> None:
    """Turn all quantization on, or off so that the module computes what the float model does."""
    for quantizer in _switches(module):
        quantizer.on = on


@contextmanager
def floating(module: nn.Module) -> Iterator[None]:
    """Without quantization for a while."""
    before = [(q, q.on) for q in _switches(module)]
    switch(module, False)
    try:
        yield
    finally:
        for quantizer, on in before:
            quantizer.on = on
