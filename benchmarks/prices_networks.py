"""The networks that prices are tried on, with what they are measured on, for :mod:`benchmarks.prices`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks import records
from curvepress.objective import batch_loss, batch_size
from curvepress.structure import Structure
from curvepress.tracing.watching import trace
from curvepress_recipes import cifar10, imagenette, sst2

FILE = Path(__file__).parent / "results" / "prices.jsonl"
WARM = 4.0
BATCHES = 8
KINDS = ("channels", "bits", "activations", "ranks")


@dataclass(frozen=True)
class Network:
    """A recipe and its options, how many examples rises are of, and how many single decisions and which plans are measured."""

    recipe: ModuleType
    examples: int
    singles: int
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 128
    shares: tuple[float, ...] = (0.9, 0.7, 0.5)
    """Of the parameters that plans of channels keep."""
    ranked: tuple[float, ...] = (0.9, 0.7, 0.5)
    """Of the parameters that plans of ranks keep."""
    every: int = 1
    """One in so many validation batches is taken, where they come in an order."""


NETWORKS = {
    "ResNet-20": Network(cifar10, 256, 60, {"depth": 20}),
    "ResNet-56": Network(cifar10, 256, 32, {"depth": 56}),
    "EfficientNet-Lite0": Network(imagenette, 96, 32, batch=32, shares=(0.95, 0.9, 0.8), ranked=(0.95, 0.9, 0.8)),
    "MiniLM": Network(sst2, 512, 32, batch=64, shares=(0.95, 0.9, 0.8), ranked=(0.95, 0.9, 0.8), every=4),
}


class Setting:
    """A network with its structure, calibration and validation examples."""

    def __init__(self, name: str) -> None:
        self.name, self.network = name, NETWORKS[name]
        of, size = self.network.recipe, self.network.batch
        self.loss, self.model, self.example = of.loss, of.model(**self.network.options), of.example()
        self.structure: Structure = trace(self.model, self.example)
        given = iter(of.batches("calibration", batch_size=size))
        self.calibration, self.others = list(islice(given, BATCHES)), list(islice(given, BATCHES))
        seen = islice(of.batches("validation", batch_size=size), None, None, self.network.every)
        self.validation = list(islice(seen, self.network.examples // size))
        self.base = self.mean_loss(self.model)

    def mean_loss(self, model: nn.Module) -> float:
        """The validation loss of a model."""
        with torch.no_grad():
            losses = [(batch_loss(model, self.loss, b).item(), batch_size(b)) for b in self.validation]
        return sum(x * n for x, n in losses) / sum(n for _, n in losses)

    def rise(self, model: nn.Module) -> float:
        """By how much the validation loss of ``model`` exceeds that of the original."""
        return self.mean_loss(model) - self.base


def once(setting: Setting, key: records.Record, measure: Callable[[], records.Record]) -> records.Record:
    """The record of this network and key, from the file or measured now."""
    return records.once(FILE, {"network": setting.name, **key}, measure)


def rows(network: str, what: str, kind: str) -> list[records.Record]:
    """What is known of a network; records of channels have no kind."""
    return [r for r in records.read(FILE) if (r["network"], r["what"], r.get("kind", "channels")) == (network, what, kind)]


def timed(made: Callable[[], Any]) -> tuple[Any, float]:
    """What a function gives back, and the processor seconds it took."""
    start = time.process_time()
    return made(), time.process_time() - start


def digits(value: float) -> float:
    """Six of them, which is all that a record needs."""
    return float(f"{value:.6g}")
