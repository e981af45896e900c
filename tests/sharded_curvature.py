"""What the tests run in each of two processes: estimates on a whole model, on the same shared out, and on the same sharded.

    torchrun --nproc-per-node 2 tests/sharded_curvature.py RESULTS

Each process writes what it found to a JSON file of its own in the folder RESULTS.
"""

import faulthandler
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from curvepress import curvature
from curvepress.curvature.workers import joined
from curvepress.objective import Batch

FIRST_ORDER = ("exact", "pairs", "sketch", "monte_carlo_fisher", "empirical_fisher")
PATIENCE = 200
"""Seconds after which a process gives up and says what it was doing."""
SIZES = (7, 3, 6, 4, 5)  # no two processes have as many passes to make, and one has a batch more


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second, self.head = nn.Embedding(5, 4), Attention(), Attention(), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.full((4,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.second(self.first(self.table(x))) * self.scale).mean(1))


def images() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, groups=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().double()


def inputs(kind: Callable[[], nn.Module], generator: torch.Generator, size: int) -> Tensor:
    if kind is words:
        return torch.randint(5, (size, 6), generator=generator)
    return torch.randn(size, 1, 4, 4, generator=generator, dtype=torch.float64)


def batches(kind: Callable[[], nn.Module]) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(inputs(kind, generator, n), torch.randint(3, (n,), generator=generator)) for n in SIZES]


MODULE = {images: "3", words: "first"}
"""The modules whose outputs are asked about."""


def measures(kind: Callable[[], nn.Module], model: nn.Module) -> dict[str, curvature.Measure]:
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    asked: dict[str, curvature.Measure] = {n: curvature.elements(n, w) for n, w in weights.items()}
    parts = tuple(curvature.along(n, w.shape, 0) for n, w in weights.items())
    asked["along"] = curvature.Direction(parts, max(int(p.labels.max()) + 1 for p in parts))
    return {**asked, "activation": curvature.Activation(MODULE[kind])}


def shard(kind: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    for part in (model.first, model.second) if kind is words else (model[0], model[6]):
        fully_shard(part)
    return fully_shard(model)


def found(kind: Callable[[], nn.Module], model: nn.Module, **more: Any) -> dict[str, Any]:
    result = curvature.estimate(model, F.cross_entropy, batches(kind), measures(kind, model), micro=2, seed=3, **more)
    means, errors = ({m: v.tolist() for m, v in values.items()} for values in (result.mean, result.stderr))
    return {"mean": means, "stderr": errors, "samples": result.samples, "stopped": result.stopped, "reliability": result.reliability}


CASES: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    **{f"{kind.__name__} {e}": (kind, {"estimator": e}) for kind in (images, words) for e in FIRST_ORDER},
    "smallest terms omitted": (images, {"estimator": "exact", "omit": 0.2}),
    "stopped between two rounds": (images, {"estimator": "pairs", "stop": curvature.Stop(samples=3, every=1)}),
}


def resumed(model: nn.Module) -> dict[str, Any]:
    """With one sample there already, in one process only."""
    done: dict[int, Any] = {}
    found(images, model, estimator="pairs", done=done)
    if distributed.is_initialized():
        done = {n: s for n, s in done.items() if n == 2}
    return found(images, model, estimator="pairs", done=done)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


class Twice(nn.Linear):
    """A weight that is used in a form no rule reads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.square())


def refusals(model: nn.Module) -> dict[str, str]:
    torch.manual_seed(0)
    single = fully_shard(images().float())
    squared = fully_shard(nn.Sequential(nn.Flatten(), Twice(16, 3)).double())
    wrapped = DistributedDataParallel(images())
    asked = {"1.weight": curvature.layer("1.weight")}
    return {
        "hessian": refusal(lambda: found(images, model, estimator="hessian")),
        "controlled": refusal(lambda: found(images, model, estimator="controlled")),
        "float16": refusal(lambda: found(images, single, precision="float16")),
        "matrix": refusal(lambda: curvature.matrix(model, F.cross_entropy, batches(images), ["0.weight"])),
        "wrapped": refusal(lambda: curvature.estimate(wrapped, F.cross_entropy, batches(images), measures(images, images()))),
        "alone": refusal(lambda: curvature.estimate(squared, F.cross_entropy, batches(images), asked, estimator="exact")),
        "few": refusal(lambda: curvature.estimate(images(), F.cross_entropy, batches(images)[:1], {"a": curvature.layer("0.weight")})),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # says where processes wait for each other
    whole = {name: found(kind, kind(), **more) for name, (kind, more) in CASES.items()} | {"resumed": resumed(images())}
    with joined() as team:
        shared = {name: found(kind, kind(), **more) for name, (kind, more) in CASES.items()} | {"resumed": resumed(images())}
        models = {kind: shard(kind, kind()) for kind in (images, words)}
        spread = {name: found(kind, models[kind], **more) for name, (kind, more) in CASES.items()} | {"resumed": resumed(models[images])}
        refused = refusals(models[images])
        own = sum(p.to_local().numel() for p in models[words].parameters())
        result = {"whole": whole, "shared": shared, "sharded": spread, "refused": refused, "held": own}
        (folder / f"{team.rank}.json").write_text(json.dumps(result))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
