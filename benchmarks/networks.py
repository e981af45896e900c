"""The trained networks that quantization is measured on, each with its data; all need the folder ``CURVEPRESS_DATA``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from benchmarks import records
from curvepress.export import to_onnx
from curvepress.export.onnx import feeds, input_names, open_session
from curvepress.objective import Batches, call
from curvepress_recipes import cifar10, imagenette, sst2

MODELS = Path("runs/benchmarks/quantization")


@dataclass(frozen=True)
class Network:
    """A recipe, the options of its model, batch sizes, the first and last layer's weights and sites, and how it is trained on grids."""

    recipe: ModuleType
    options: Mapping[str, Any] = field(default_factory=dict)
    training: int = 128
    testing: int = 250
    first: str = "conv1.weight"
    entry: tuple[str, ...] = ("x",)
    last: tuple[str, str] = ("linear.weight", "adaptive_avg_pool2d")
    descent: Mapping[str, Any] = field(default_factory=dict)

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
        """The images, or the sentences, that figures are of."""
        return self.recipe.batches("test", batch_size=self.testing)


NETWORKS = {
    "ResNet-20": Network(cifar10, {"depth": 20}),
    "ResNet-56": Network(cifar10, {"depth": 56}),
    "EfficientNet-Lite0": Network(imagenette, {}, 32, 50, "_conv_stem.weight", last=("_fc.weight", "adaptive_avg_pool2d")),
    "MiniLM": Network(
        sst2, {}, 32, 64, "encoder.embeddings.word_embeddings.weight", (), ("head.weight", "div"), {"lr": 5e-5, "optimizer": "adamw"}
    ),
}


def labels(network: Network) -> np.ndarray:
    """Those of the test images."""
    return np.concatenate([labels.numpy() for _, labels in network.test()])


def predictions(network: Network, path: Path) -> np.ndarray:
    """Classes that a file gives the test images in ONNX Runtime."""
    session = open_session(path)
    given = partial(feeds, path.name, input_names(session))
    return np.concatenate([session.run(None, given(arrays(x)))[0].argmax(1) for x, _ in network.test()])


def arrays(inputs: Any) -> Any:
    """Inputs as a runtime takes them."""
    return tree_map(lambda x: x.contiguous().numpy(), inputs)


def simulated(network: Network, module: nn.Module) -> np.ndarray:
    """Classes that a module gives the test images."""
    module.eval()
    with torch.inference_mode():
        return np.concatenate([call(module, x).argmax(1).numpy() for x, _ in network.test()])


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
