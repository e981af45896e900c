"""What ranges and rounding are worth: weights of ResNet-20 on grids of 2 to 8 bits, activations and everything else left in float.

    python -m benchmarks.rounding measure      # some minutes on one core; resumes
    python -m benchmarks.rounding table

Weights are rounded layer by layer with Gram matrices of the float model's activations, nothing is trained.  Needs the data of the
recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import copy
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import records
from curvepress.quantization.quantizer import Scheme, dequantize, fit_grid
from curvepress.quantization.rounding import fit_and_round, gram_convolution, gram_linear, output_error, round_weight
from curvepress_recipes import cifar10

FILE = Path(__file__).parent / "results" / "rounding.jsonl"
BITS = (2, 3, 4, 8)
GRIDS = {
    "channel": Scheme(8, axis=0),
    "channel, zero points": Scheme(8, False, axis=0),
    "tensor": Scheme(8),
    "groups of 32": Scheme(8, axis=0, group=32),
}
METHODS = {
    "min-max": ("minmax", None, "nearest"),
    "percentile 99": ("percentile", None, "nearest"),
    "squared error": ("mse", None, "nearest"),
    "weighted by Fisher": ("mse", "fisher", "nearest"),
    "weighted by inputs": ("mse", "inputs", "nearest"),
    "compensated": ("mse", None, "compensated"),
    "adaptive": ("mse", None, "adaptive"),
    "adaptive, weighted by inputs": ("mse", "inputs", "adaptive"),
    "adaptive, scales too": ("mse", "inputs", "adaptive"),
}
IMAGES, FISHER_IMAGES, TEST_IMAGES = 256, 128, 2000


def measure() -> None:
    """Measure every combination that has no record yet."""
    for bits in BITS:
        for grid in GRIDS:
            for method in METHODS if grid == "channel" else ("squared error", "adaptive", "adaptive, scales too"):
                records.once(FILE, {"bits": bits, "grid": grid, "method": method}, partial(measured, bits, grid, method))


def measured(bits: int, grid: str, method: str) -> records.Record:
    """Relative squared error of weights and of outputs (the mean over layers), and what one rounded network does on test images."""
    torch.set_num_threads(1)
    network = copy.deepcopy(cifar10.model())
    weights, outputs = [], []
    for name, layer in layers(network).items():
        rounded = rounded_weight(name, Scheme(bits, **{k: getattr(GRIDS[grid], k) for k in ("symmetric", "axis", "group")}), method)
        change, gram = rounded - layer.weight.detach(), held_out_grams()[name]
        weights.append((float(change.square().sum()), float(layer.weight.detach().square().sum())))
        outputs.append(output_error(change, gram) / output_error(layer.weight, gram))
        layer.weight.data = rounded
    return {
        "weights": sum(e for e, _ in weights) / sum(n for _, n in weights),
        "outputs": sum(outputs) / len(outputs),
        **tested(network),
    }


@torch.no_grad()
def tested(network: nn.Module) -> records.Record:
    """Loss in nats and accuracy in percent on the first test images."""
    images, labels = first_images("test", TEST_IMAGES)
    logits = torch.cat([network(part) for part in images.split(250)])
    return {"loss": float(cifar10.loss(logits, labels)), "accuracy": 100 * float((logits.argmax(1) == labels).float().mean())}


def rounded_weight(name: str, scheme: Scheme, method: str) -> Tensor:
    """The weight of one layer on its grid."""
    ranges, weighting, rounding = METHODS[method]
    weight = layers(cifar10.model())[name].weight.detach()
    inputs = grams()[name].diagonal(dim1=1, dim2=2).float()[0].reshape(weight[:1].shape).expand(weight.shape)
    curvature = {"fisher": fisher().get(name), "inputs": inputs, None: None}[weighting]
    grid = fit_grid(weight, scheme, method=ranges, weights=curvature, percentile=99.0, name=name)
    if method.endswith("scales too"):
        return dequantize(*fit_and_round(weight, grid, grams()[name], method=rounding))
    return dequantize(round_weight(weight, grid, grams()[name], method=rounding), grid)


def layers(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers with weights to round, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


@lru_cache
def grams() -> dict[str, Tensor]:
    """Gram matrices of every layer's inputs, for rounding."""
    return seen_by_layers(slice(0, IMAGES))


@lru_cache
def held_out_grams() -> dict[str, Tensor]:
    """The same on other images, to measure output errors."""
    return seen_by_layers(slice(IMAGES, 2 * IMAGES))


@torch.no_grad()
def seen_by_layers(part: slice) -> dict[str, Tensor]:
    """Gram matrices over a part of the shuffled calibration images."""
    network, found = cifar10.model(), {}

    def look(name: str, layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.Linear):
            gram = gram_linear(inputs[0])
        else:
            gram = gram_convolution(inputs[0], layer.weight, stride=layer.stride, padding=layer.padding)
        found[name] = found.get(name, 0) + gram

    for name, layer in layers(network).items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: look(name, layer, inputs))
    for images in first_images("calibration", 2 * IMAGES)[0][part].split(128):
        network(images)
    return found


@lru_cache
def first_images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """That many images and labels of a split, for calibration in a seeded order."""
    images, labels = [], []
    for x, y in cifar10.batches(split, seed=0):
        images.append(x)
        labels.append(y)
        if sum(map(len, images)) >= count:
            return torch.cat(images)[:count], torch.cat(labels)[:count]
    raise ValueError(f"there are fewer than {count} images in {split}")


@lru_cache
def fisher() -> dict[str, Tensor]:
    """Sum over images of the squared gradient of the loss, by layer: the diagonal of the empirical Fisher information."""
    network = cifar10.model()
    weights = {n: layer.weight for n, layer in layers(network).items()}
    images, labels = first_images("calibration", 2 * IMAGES)
    found = {n: torch.zeros_like(w) for n, w in weights.items()}
    for x, y in zip(images[:FISHER_IMAGES].split(1), labels.split(1), strict=False):
        for total, slope in zip(found.values(), torch.autograd.grad(cifar10.loss(network(x), y), list(weights.values())), strict=True):
            total += slope.square()
    return found


def table() -> None:
    """Print the table in Markdown."""
    print("| bits | scales per | method | error of weights | error of outputs | loss | accuracy, % |")
    print("|---|---|---|---|---|---|---|")
    for r in records.read(FILE):
        errors = f"{r['weights']:.2e} | {r['outputs']:.2e}"
        print(f"| {r['bits']} | {r['grid']} | {r['method']} | {errors} | {r['loss']:.3f} | {r['accuracy']:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "table"))
    {"measure": measure, "table": table}[parser.parse_args().what]()
