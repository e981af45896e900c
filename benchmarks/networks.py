"""The trained networks that quantization is measured on, each with its data; all need the folder ``CURVEPRESS_DATA``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import records
from curvepress.export import to_onnx
from curvepress.export.onnx import open_session
from curvepress.objective import Batches
from curvepress_recipes import cifar10, imagenette

MODELS = Path("runs/benchmarks/quantization")


@dataclass(frozen=True)
class Network:
    """A recipe, the options of its model, the batch size to train with, and the batch size to test with."""

    recipe: ModuleType
    options: Mapping[str, Any] = field(default_factory=dict)
    training: int = 128
    testing: int = 250
    first: str = "conv1.weight"
    last: tuple[str, str] = ("linear.weight", "adaptive_avg_pool2d")

    def model(self) -> nn.Module:
        """With trained weights, in eval mode."""
        return self.recipe.model(**self.options)

    def calibration(self, seed: int) -> Batches:
        """Training images, drawn at random."""
        return self.recipe.batches("calibration", seed=seed, batch_size=self.training)

    def train(self, seed: int) -> Batches:
        """Augmented training images."""
        return self.recipe.batches("train", seed=seed, batch_size=self.training)

    def test(self) -> Batches:
        """The images that figures are of."""
        return self.recipe.batches("test", batch_size=self.testing)


NETWORKS = {
    "ResNet-20": Network(cifar10, {"depth": 20}),
    "ResNet-56": Network(cifar10, {"depth": 56}),
    "EfficientNet-Lite0": Network(imagenette, {}, 32, 50, "_conv_stem.weight", ("_fc.weight", "adaptive_avg_pool2d")),
}


def labels(network: Network) -> np.ndarray:
    """Those of the test images."""
    return np.concatenate([labels.numpy() for _, labels in network.test()])


def predictions(network: Network, path: Path) -> np.ndarray:
    """Classes that a file gives the test images in ONNX Runtime."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x.contiguous().numpy()})[0].argmax(1) for x, _ in network.test()])


def simulated(network: Network, module: nn.Module) -> np.ndarray:
    """Classes that a module gives the test images."""
    module.eval()
    with torch.inference_mode():
        return np.concatenate([module(x).argmax(1).numpy() for x, _ in network.test()])


@lru_cache
def original(name: str) -> Path:
    """The float network as an ONNX file."""
    path = MODELS / f"{name}-float.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        to_onnx(NETWORKS[name].model(), NETWORKS[name].recipe.example(), path)
    return path


def percent(right: np.ndarray) -> float:
    """How many are true."""
    return round(100 * float(right.mean()), 4)


def float_accuracy(file: Path, name: str) -> float:
    """Test accuracy of the float network in ONNX Runtime, recorded once."""
    key = {"network": name, "configuration": "float", "method": "none"}

    def measure() -> records.Record:
        return {"accuracy": percent(predictions(NETWORKS[name], original(name)) == labels(NETWORKS[name]))}

    return float(records.once(file, key, measure)["accuracy"])
