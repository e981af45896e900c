"""Small float64 networks of every layer type, and the dense matrices that the curvature engine is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from curvepress.curvature.trees import leaves, rebuilt
from curvepress.objective import Batch, Loss, output

N = 5
"""Examples of a batch: with two at a time the last piece is shorter."""


def images(channels: int, *size: int, seed: int = 0, count: int = N, classes: int = 3) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *size, generator=g, dtype=torch.float64)
    return x, torch.randint(classes, (count,), generator=g)


def words(length: int = 4, seed: int = 0, count: int = N) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(6, (count, length), generator=g), torch.randint(3, (count,), generator=g)


class Flow(nn.Module):
    """A network from its parts: ``forward`` is a function of the module and its inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.flow = forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.flow(self, *inputs, **named)


@dataclass
class Answer:
    """As models of a well-known hub return it: the logits and what else is known."""

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    steps: int = 0


def conv(*layers: nn.Module, flat: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 3))


def tied() -> nn.Module:
    shared = nn.Linear(6, 6)
    return nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(6, 3))


def tied_embedding(m: Any, x: Tensor) -> Tensor:
    return m.out(F.linear(m.table(x), m.table.weight).mean(1))


def class_token(m: Any, x: Tensor) -> Tensor:
    tokens = torch.cat([m.token.expand(len(x), -1, -1), m.inner(x)], 1) + m.places
    return m.out(F.relu(m.mix(tokens.transpose(1, 2))).flatten(1))


def hand_written_rms(m: Any, x: Tensor) -> Tensor:
    x = m.inner(x)
    return m.out(m.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)))


def attended(m: Any, x: Tensor) -> Tensor:
    x = m.table(x)
    if not m.mha.batch_first:
        x = x.transpose(0, 1)
    y = m.mha(x, x, x, need_weights=False)[0]
    return m.out((y if m.mha.batch_first else y.transpose(0, 1)).mean(1))


def second_dimension(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.inner(m.table(x.T)) + m.places)  # [positions, examples, width]
    return m.out(m.norm(x).mean(0))


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.out(m.cell(m.table(x))[0][:, -1])


def pair(m: Any, x: Tensor) -> dict[str, Any]:
    x = F.relu(m.inner(x))
    return {"logits": m.out(x), "value": (m.value(x), "unused")}


def pair_loss(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out["logits"], y) + F.mse_loss(out["value"][0].squeeze(1), y.double())


def answer_loss(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out.logits, y)


@dataclass(frozen=True)
class Case:
    """A network; ``alone``: whether some parameters are read one example at a time; ``smooth``: whether it is curved in its weights."""

    make: Callable[[], nn.Module]
    batch: Batch
    loss: Loss = F.cross_entropy
    alone: bool = False
    smooth: bool = False


def _named(x: Batch) -> Batch:
    return {"x": x[0], "scale": torch.tensor(0.5)}, x[1]


def table() -> nn.Module:
    return nn.Embedding(6, 4)


CASES: dict[str, Case] = {
    "conv1d": Case(lambda: conv(nn.Conv1d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv1d(4, 4, 2), flat=8), images(2, 8)),
    "conv2d": Case(
        lambda: conv(nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2), flat=4), images(2, 4, 4)
    ),
    "conv3d": Case(lambda: conv(nn.Conv3d(1, 2, 2), nn.LeakyReLU(), nn.AvgPool3d(2), flat=2), images(1, 3, 3, 3)),
    "grouped": Case(
        lambda: conv(nn.Conv2d(4, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 8, 2, groups=4, bias=False), flat=8), images(4, 3, 3)
    ),
    "dilated": Case(
        lambda: conv(nn.Conv2d(1, 3, 2, dilation=2), nn.ReLU6(), nn.Conv2d(3, 2, (1, 2), dilation=(1, 2)), flat=12), images(1, 5, 6)
    ),
    "transposed": Case(
        lambda: conv(nn.ConvTranspose1d(2, 4, 3, stride=2, output_padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool1d(2), flat=8),
        images(2, 3),
    ),
    "transposed2d": Case(lambda: conv(nn.ConvTranspose2d(2, 3, 2, padding=1, dilation=2), nn.ReLU(), flat=27), images(2, 3, 3)),
    "linear": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)), images(4)),
    "positions": Case(lambda: conv(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), flat=6), images(3, 4)),
    "embedding": Case(
        lambda: Flow(
            lambda m, x: m.out(F.leaky_relu(m.table(x)).flatten(1)), table=nn.Embedding(6, 3, padding_idx=2), out=nn.Linear(12, 3)
        ),
        words(),
    ),
    "position_embedding": Case(
        lambda: Flow(
            lambda m, x: m.out(F.relu(m.table(x) + m.places(torch.arange(x.shape[1]))).flatten(1)),
            table=table(),
            places=nn.Embedding(5, 4),
            out=nn.Linear(16, 3),
        ),
        words(),
    ),
    "class_token": Case(
        lambda: Flow(
            class_token,
            token=torch.randn(1, 1, 4),
            places=torch.randn(1, 4, 4),
            inner=nn.Linear(2, 4),
            mix=nn.Linear(4, 2),
            out=nn.Linear(8, 3),
        ),
        images(3, 2),
    ),
    "layer_norm": Case(lambda: conv(nn.Linear(4, 6), nn.LayerNorm((2, 6)), nn.ReLU(), flat=12), images(2, 4), smooth=True),
    "group_norm": Case(lambda: conv(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), flat=8), images(2, 3), smooth=True),
    "instance_norm": Case(lambda: conv(nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4), nn.ReLU(), flat=12), images(2, 4), smooth=True),
    "batch_norm": Case(
        lambda: conv(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, eps=0.1), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(12), flat=12), images(1, 3, 3)
    ),
    "rms_norm": Case(lambda: conv(nn.Linear(4, 5), nn.RMSNorm(5), nn.ReLU(), flat=10), images(2, 4), smooth=True),
    "hand_written_rms": Case(
        lambda: Flow(hand_written_rms, inner=nn.Linear(4, 5), gain=torch.randn(5), out=nn.Linear(5, 3)), images(4), smooth=True
    ),
    "tied": Case(tied, images(6), smooth=True),
    "tied_embedding": Case(lambda: Flow(tied_embedding, table=table(), out=nn.Linear(6, 3)), words(), smooth=True),
    "weight_norm": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(5, 3))),
        images(4),
        smooth=True,
    ),
    "layer_scale": Case(
        lambda: Flow(
            lambda m, x: m.out((x + m.scale * F.relu(m.inner(x))).flatten(1)),
            inner=nn.Linear(4, 4),
            scale=torch.randn(4),
            out=nn.Linear(8, 3),
        ),
        images(2, 4),
        smooth=True,
    ),
    "sliced": Case(
        lambda: Flow(lambda m, x: m.out(F.relu(x @ m.both[:, :4] + m.both[0, 4:])), both=torch.randn(4, 8), out=nn.Linear(4, 3)),
        images(4),
        smooth=True,
    ),
    "gelu": Case(lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), images(4), smooth=True),
    "attention": Case(
        lambda: Flow(attended, table=table(), mha=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 3)), words(), smooth=True
    ),
    "attention_second_dimension": Case(
        lambda: Flow(attended, table=table(), mha=nn.MultiheadAttention(4, 2), out=nn.Linear(4, 3)), words(), smooth=True
    ),
    "transformer": Case(
        lambda: Flow(
            lambda m, x: m.out(m.block(m.table(x)).mean(1)),
            table=table(),
            block=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
            out=nn.Linear(4, 3),
        ),
        words(),
        smooth=True,
    ),
    "second_dimension": Case(
        lambda: Flow(
            second_dimension, table=table(), inner=nn.Linear(4, 4), places=torch.randn(4, 1, 4), norm=nn.LayerNorm(4), out=nn.Linear(4, 3)
        ),
        words(),
        smooth=True,
    ),
    "lstm": Case(lambda: Flow(recurrent, table=table(), cell=nn.LSTM(4, 3, batch_first=True), out=nn.Linear(3, 3)), words(3), smooth=True),
    "gru": Case(lambda: Flow(recurrent, table=table(), cell=nn.GRU(4, 3, batch_first=True), out=nn.Linear(3, 3)), words(3), smooth=True),
    "dataclass": Case(
        lambda: Flow(lambda m, x: Answer(m.out(F.relu(m.inner(x))), (x,), 2), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)),
        images(4),
        answer_loss,
    ),
    "two_outputs": Case(lambda: Flow(pair, inner=nn.Linear(4, 5), out=nn.Linear(5, 3), value=nn.Linear(5, 1)), images(4), pair_loss),
    "keywords": Case(
        lambda: Flow(lambda m, x, scale: m.out(F.relu(m.inner(x) * scale)), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)),
        _named(images(4)),
        smooth=True,
    ),
    "two_inputs": Case(
        lambda: Flow(lambda m, x, y: m.out(F.relu(m.inner(x) + y)), inner=nn.Linear(4, 5), out=nn.Linear(5, 3)),
        ((images(4)[0], images(5, seed=1)[0]), images(4)[1]),
    ),
}


def made(case: Case) -> nn.Module:
    """The network of a case, from a fixed seed, in evaluation mode, away from the values that norms start with."""
    torch.manual_seed(0)
    model = case.make().double().eval()
    for module in model.modules():
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if "Norm" in type(module).__name__ and value.is_floating_point():
                value.data = 0.5 + torch.rand_like(value)
    return model


class Flat:
    """A loss as a function of the parameters ``names`` in one vector."""

    def __init__(self, model: nn.Module, batch: Batch, loss: Loss = F.cross_entropy, names: list[str] | None = None) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        own = dict(model.named_parameters())
        self.names = list(own) if names is None else names
        self.shapes = [own[n].shape for n in self.names]
        self.sizes = [own[n].numel() for n in self.names]
        self.point = torch.cat([own[n].detach().flatten() for n in self.names])

    def tree(self, vector: Tensor) -> Any:
        given = zip(self.names, vector.split(self.sizes), self.shapes, strict=True)
        values = {n: v.view(s) for n, v, s in given}
        return output(lambda *a, **k: functional_call(self.model, values, a, k), (self.batch[0], None))

    def value(self, vector: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.loss(self.tree(vector), self.batch[1])

    def outputs(self, vector: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.cat([t.flatten() for t in leaves(self.tree(vector)) if t.is_floating_point()])

    def outer(self) -> Tensor:
        """The Hessian of the loss in the outputs."""
        tree = self.tree(self.point)
        old = leaves(tree)
        floating = [t for t in old if t.is_floating_point()]
        sizes = [t.numel() for t in floating]

        def value(flat: Tensor) -> Tensor:
            parts = iter(p.view(t.shape) for p, t in zip(flat.split(sizes), floating, strict=True))
            return self.loss(rebuilt(tree, [next(parts) if t.is_floating_point() else t for t in old]), self.batch[1])

        return hessian(value, torch.cat([t.detach().flatten() for t in floating]))

    def gauss_newton(self) -> np.ndarray:
        j = jacobian(self.outputs, self.point)
        return (j.T @ self.outer() @ j).numpy()

    def hessian(self) -> np.ndarray:
        return hessian(self.value, self.point).numpy()

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """A vector as one array for each parameter, flat."""
        return dict(zip(self.names, np.split(vector, np.cumsum(self.sizes)[:-1]), strict=True))
