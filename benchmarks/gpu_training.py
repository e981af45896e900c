"""The networks of HAP and EHAP trained by their papers' recipes: images on the device, bfloat16, compiled.

    python -m benchmarks.gpu_training --network resnet56 --recipe ehap          # 300 epochs; for a GPU
    python -m benchmarks.gpu_training --network preresnet29 --recipe hap        # 200 epochs
    python -m benchmarks.gpu_training --network tiny --epochs 1 --examples 256 --device cpu --plain     # to try it

The weights are kept for the recipe ``cifar_papers``; the figures go to ``results/gpu_training.jsonl``.  The last tenth of the training
images is held out; the test images are looked at once, at the end.  Interrupted, it begins again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import records
from curvepress.files import write_bytes
from curvepress_recipes import cifar_papers as task
from curvepress_recipes.cifar10 import MEAN, STD, folder_of
from curvepress_recipes.papers_nets import NETWORKS
from curvepress_recipes.weights import file_of

FILE = Path(__file__).parent / "results" / "gpu_training.jsonl"
PADDING = 4


@dataclass(frozen=True)
class Recipe:
    """How a paper trains: SGD with momentum 0.9, images flipped and cropped."""

    epochs: int
    lr: float
    weight_decay: float
    schedule: str
    nesterov: bool
    batch: int = 128

    def rate(self, share: float) -> float:
        """The learning rate after this share of all steps."""
        if self.schedule == "cosine":
            return self.lr * (1 + cos(pi * share)) / 2
        return self.lr * 0.1 ** ((share >= 0.5) + (share >= 0.75))


RECIPES = {"hap": Recipe(200, 0.1, 2e-4, "step", False), "ehap": Recipe(300, 0.05, 1e-3, "cosine", True)}
"""HAP: README and main_pretrain.py of its released code; EHAP: README and code of its."""


@dataclass(frozen=True, eq=False)
class Images:
    """A split on the device: pixels ``[n, 3, 32, 32]`` normalised, and labels ``[n]``."""

    pixels: Tensor
    labels: Tensor

    def augmented(self, rows: Tensor, chance: torch.Generator) -> Tensor:
        """Some images, each mirrored with probability one half and cropped from a border of :data:`PADDING` zeros."""
        picked, device = self.pixels[rows], rows.device
        mirrored = torch.rand(len(rows), 1, 1, 1, generator=chance, device=device) < 0.5
        padded = F.pad(torch.where(mirrored, picked.flip(3), picked), (PADDING,) * 4)
        corner = torch.randint(2 * PADDING + 1, (2, len(rows), 1), generator=chance, device=device)
        across = torch.arange(32, device=device)
        y, x = (corner[0] + across)[:, None, :, None], (corner[1] + across)[:, None, None, :]
        return padded[torch.arange(len(rows), device=device)[:, None, None, None], torch.arange(3, device=device)[:, None, None], y, x]


def on_device(split: str, classes: int, device: str, data: str | None) -> Images:
    """A split, normalised, on the device."""
    pixels, labels = task.images(folder_of(data), split, classes)
    return Images(((pixels.to(device).float() - MEAN.to(device)) / STD.to(device)).permute(0, 3, 1, 2).contiguous(), labels.to(device))


def trained(network: nn.Module, images: Images, how: Recipe, *, seed: int, compiled: bool) -> nn.Module:
    """The network after all epochs, in place."""
    device = images.pixels.device
    network = network.to(device).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run: Any = torch.compile(network) if compiled else network
    descent = torch.optim.SGD(network.parameters(), how.lr, 0.9, weight_decay=how.weight_decay, nesterov=how.nesterov)
    chance, count = torch.Generator(device).manual_seed(seed), len(images.labels)
    steps = max(1, count // how.batch)
    for epoch in range(how.epochs):
        order, start = torch.randperm(count, generator=chance, device=device), time.monotonic()
        for step, rows in enumerate(order.split(how.batch)[:steps]):
            for group in descent.param_groups:
                group["lr"] = how.rate((epoch * steps + step) / (how.epochs * steps))
            with torch.autocast(device.type, dtype=torch.bfloat16):
                inputs = images.augmented(rows, chance).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(run(inputs), images.labels[rows])
            descent.zero_grad(set_to_none=True)
            loss.backward()
            descent.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - start:.1f} s", flush=True)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """In percent."""
    parts = zip(images.pixels.split(500), images.labels.split(500), strict=True)
    return 100 * sum(int((network(x).argmax(1) == y).sum()) for x, y in parts) / len(images.labels)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="ehap")
    parser.add_argument("--classes", type=int, choices=(10, 100), default=10)
    parser.add_argument("--epochs", type=int, help="instead of the paper's")
    parser.add_argument("--examples", type=int, help="train on so many images only")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plain", action="store_true", help="not compiled")
    parser.add_argument("--data", help="the data folder, else CURVEPRESS_DATA")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    how = RECIPES[given.recipe]
    how = Recipe(given.epochs or how.epochs, how.lr, how.weight_decay, how.schedule, how.nesterov, how.batch)
    name, settings = (
        task.name_of(given.network, given.classes),
        {k: v for k, v in vars(given).items() if k not in ("data", "device", "plain")},
    )
    if file_of(name).exists():
        raise SystemExit(f"{file_of(name)} is there already; delete it to train it anew")
    images, start = on_device("train", given.classes, given.device, given.data), time.monotonic()
    images = Images(images.pixels[: given.examples], images.labels[: given.examples])
    network = task.model(trained=False, network=given.network, classes=given.classes)
    network = trained(network, images, how, seed=given.seed, compiled=not given.plain)
    found = {s: accuracy(network, on_device(s, given.classes, given.device, given.data)) for s in ("validation", "test")}
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    key = {"network": name, "settings": settings}
    records.once(FILE, key, lambda: {**found, "minutes": (time.monotonic() - start) / 60, "device": device})
    note = json.dumps({"recipe": name, "settings": settings, "validation": {"accuracy": found["validation"]}})
    write_bytes(file_of(name), save({n: t.cpu().contiguous() for n, t in network.state_dict().items()}, {"identity": note}))
    print(f"{file_of(name)}: {found}")


if __name__ == "__main__":
    main()
