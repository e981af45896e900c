"""What weights are multiplied with: Gram matrices of the inputs of convolutions and linear layers, summed batch by batch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..objective import Batch, batch_size, output
from ..tracing.watching import quiet_evaluation

POSITIONS = 64
"""Positions of an image that are looked at, at most: neighbours say nearly the same."""


@dataclass
class Gram:
    """Inputs ``x`` of one weight, flattened like one of its output channels, summed over examples and positions.

    ``matrix`` is the sum of ``x x'``, ``total`` that of ``x``, both float64; ``count`` is the number of positions in these sums,
    ``examples`` that of examples.  ``constant`` says whether a constant may be added to each output channel that the weight makes: it has
    a bias, or batch normalisation follows.
    """

    matrix: Tensor
    total: Tensor
    count: float = 0.0
    examples: int = 0
    constant: bool = False

    def second_moment(self) -> Tensor:
        """``[inputs, inputs]``: the mean over examples of the sum over positions, about the mean where a constant may be added."""
        spread = torch.outer(self.total, self.total) / self.count if self.constant else 0.0
        return (self.matrix - spread) / self.examples


def pooled(grams: Collection[Gram]) -> Gram:
    """The sums over several sets of batches."""
    first, *rest = grams
    matrix, total, count, examples = first.matrix.clone(), first.total.clone(), first.count, first.examples
    for g in rest:
        matrix, total, count, examples = matrix + g.matrix, total + g.total, count + g.count, examples + g.examples
    return Gram(matrix, total, count, examples, first.constant)


def add_grams(
    model: nn.Module, batch: Batch, names: Collection[str], grams: dict[str, Gram], *, positions: int = POSITIONS, seed: int = 0
) -> None:
    """Adds to ``grams`` what the weights ``names`` are multiplied with when ``model`` runs on ``batch``.

    Weights that no operator known here reads get no entry: grouped and transposed convolutions, or products with activations.
    Of images at most ``positions`` positions are looked at, drawn at random for the whole batch; they stand for all.
    """
    own = {id(p): n for n, p in model.named_parameters() if n in names}
    watching = _Watching(own, positions, torch.Generator().manual_seed(seed))
    with quiet_evaluation(model), torch.no_grad(), watching:
        output(model, batch)
    for name, rows in watching.found.items():
        rows.examples = batch_size(batch)
        grams[name] = pooled([grams[name], rows]) if name in grams else rows


@dataclass(eq=False)
class _Watching(TorchFunctionMode):
    """Sums what flows into the weights while a model runs."""

    names: dict[int, str]
    positions: int
    chance: torch.Generator
    found: dict[str, Gram] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.made = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READS:
            given = dict(zip(_READS[func], args, strict=False)) | (kwargs or {})
            name = self.names.get(id(given["weight"]))
            if name is not None and (rows := _rows(given, self.positions, self.chance)) is not None:
                self._add(name, *rows)
                self.found[name].constant = given.get("bias") is not None
                self.made[result] = name
        elif "batch_norm" in getattr(func, "__name__", "") and args and args[0] in self.made:
            self.found[self.made[args[0]]].constant = True
        return result

    def _add(self, name: str, rows: Tensor, weight: float) -> None:
        """``rows`` ``[positions, inputs]``, each of which stands for ``weight``."""
        wide = rows.double()  # in float32 rounding alone would leave moments about the mean that are not positive
        gram = wide.T @ wide * weight
        now = Gram(gram, rows.sum(0, dtype=torch.float64) * weight, len(rows) * weight)
        self.found[name] = pooled([self.found[name], now]) if name in self.found else now


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_aten = torch.ops.aten
_READS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, _aten.conv1d.default, _aten.conv2d.default), _CONVOLUTION),
    **dict.fromkeys((F.linear, _aten.linear.default), ("input", "weight", "bias")),
}


def _rows(given: dict[str, Any], positions: int, chance: torch.Generator) -> tuple[Tensor, float] | None:
    """What each output position of an operator reads ``[rows, inputs]``, and how many positions each row stands for."""
    x, weight = given["input"].detach(), given["weight"]
    if "stride" not in given and weight.dim() == 2:
        return x.reshape(-1, x.shape[-1]), 1.0
    if given.get("groups", 1) != 1 or isinstance(given.get("padding", 0), str) or x.dim() != weight.dim():
        return None
    if line := weight.dim() == 3:
        x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
    how = [_pair(given.get(k, d), d, line) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
    patches = _patches(x, weight.shape[2:], *how)
    height, width = patches.shape[2:4]
    chosen = torch.randperm(height * width, generator=chance)[:positions].sort().values
    taken = patches[:, :, chosen // width, chosen % width]  # [N, C, P, kh, kw]
    return taken.permute(0, 2, 1, 3, 4).reshape(-1, weight[0].numel()), height * width / len(chosen)


def _patches(x: Tensor, size: Any, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    """``[examples, channels, height, width, kernel height, kernel width]``, a view."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    for d in (0, 1):
        x = x.unfold(2 + d, (size[d] - 1) * dilation[d] + 1, stride[d])
    return x[..., :: dilation[0], :: dilation[1]]


def _pair(given: Any, empty: int, line: bool) -> list[int]:
    """Two numbers, of which a convolution over a ``line`` gives the second alone."""
    numbers = [given] if isinstance(given, int) else list(given)
    return [empty, numbers[-1]] if line else [numbers[0], numbers[-1]]
