"""What estimates are compared with, by routes of their own: slow, plain, and kept in a cache outside the repository.

Exact here means the trace of the generalised Gauss-Newton matrix over the weights of one channel, which for networks of ReLU and
pooling in evaluation mode is that of the Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from benchmarks.curvature_hap import hap
from benchmarks.curvature_task import POPULATION, Batch, Task, save, weights

MASS = 0.999
SHARD = 256
CHUNK = 25


def root(logits: Tensor) -> Tensor:
    """A root ``S`` ``[..., classes, classes]`` of the Hessian of the cross-entropy: ``S S^T = diag(p) - p p^T``.

    It is ``diag(sqrt p) - p sqrt(p)^T``, which needs no eigenvectors.
    """
    p = logits.softmax(-1)
    return torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)


def exact(model: nn.Module, batch: Batch) -> np.ndarray:
    """The exact trace of every channel ``[channels]`` over a batch: a backward pass for each class of each image, one at a time."""
    params = list(weights(model).values())
    total = torch.zeros(sum(len(p) for p in params), dtype=torch.float64)
    for image in batch[0]:
        logits = model(image[None])[0]
        for direction in root(logits.detach()).T:
            slopes = torch.autograd.grad(logits, params, direction, retain_graph=True)
            total += torch.cat([s.double().flatten(1).square().sum(1) for s in slopes])
    return (total / len(batch[0])).numpy()


def exact_of_batch(task: Task, size: int, cache: Path, number: int = 0) -> np.ndarray:
    """The exact traces of batch ``number`` of ``size`` images of the pool, from the cache or computed in float64."""
    path = exact_path(cache, size, number)
    if not path.is_file():
        inputs, targets = task.pool(size, number * size)
        dtype = next(task.model.parameters()).dtype
        save(path, exact(task.model.double(), (inputs.double(), targets)))
        task.model.to(dtype)
    return np.load(path)


def exact_path(cache: Path, size: int, number: int) -> Path:
    """Where the cache has the exact traces of a batch."""
    return cache / f"exact-{size}-{number}.npy"


def population(task: Task, cache: Path, images: int = POPULATION) -> np.ndarray:
    """Traces over shards of the population, ``[shards, channels]``; their mean is the reference.

    Of all pairs of an image and an eigenvector of its output Hessian those with the largest eigenvalues are taken that
    together hold 99.9 % of the eigenvalues' sum; each gives ``eigenvalue * |J_c^T q|^2``.  Shards that are in the cache
    are not computed again.
    """
    logits = _logits(task, cache, images)
    least = _least(np.linalg.eigvalsh(_output_hessian(logits)).clip(0).ravel())
    return np.stack([_shard(task, cache, start, logits, least) for start in range(0, images, SHARD)])


def population_folder(cache: Path, images: int) -> Path:
    """Where the cache has the shards of the population."""
    return cache / f"population-{images}"


def _logits(task: Task, cache: Path, images: int) -> np.ndarray:
    path = cache / f"logits-{images}.npy"
    if not path.is_file():
        with torch.no_grad():
            parts = [task.model(task.population(s, s + SHARD)[0]) for s in range(0, images, SHARD)]
        save(path, torch.cat(parts).double().numpy())
    return np.load(path)


def _output_hessian(logits: np.ndarray) -> np.ndarray:
    p = torch.from_numpy(logits).softmax(1)
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).numpy()


def _least(values: np.ndarray) -> float:
    """The smallest of the largest ``values`` that together hold 99.9 % of the sum."""
    ordered = np.sort(values)[::-1]
    return float(ordered[np.searchsorted(ordered.cumsum(), MASS * ordered.sum())])


def _shard(task: Task, cache: Path, start: int, logits: np.ndarray, least: float) -> np.ndarray:
    path = population_folder(cache, len(logits)) / f"{start:06d}.npy"
    if not path.is_file():
        inputs, _ = task.population(start, start + SHARD)
        values, vectors = np.linalg.eigh(_output_hessian(logits[start : start + SHARD]))
        rows, columns = np.nonzero(values >= least)
        directions = vectors[rows, :, columns] * np.sqrt(values[rows, columns])[:, None]
        total = squares(task.model, inputs[torch.from_numpy(rows)], torch.from_numpy(directions).to(inputs))
        save(path, total / len(inputs))
    return np.load(path)


def squares(model: nn.Module, inputs: Tensor, directions: Tensor, chunk: int = 32) -> np.ndarray:
    """``sum_i |J_c(x_i)^T u_i|^2`` of every channel ``[channels]`` by gradients of single examples under ``vmap``."""
    params = {n: p.detach() for n, p in weights(model).items()}

    def one(x: Tensor, u: Tensor) -> list[Tensor]:
        _, pull = vjp(lambda p: functional_call(model, p, (x[None],))[0], params)
        return [s.flatten(1).square().sum(1) for s in pull(u)[0].values()]

    total = torch.zeros(sum(len(p) for p in params.values()), dtype=torch.float64)
    with torch.no_grad():
        for x, u in zip(inputs.split(chunk), directions.split(chunk), strict=True):
            total += torch.cat([s.double().sum(0) for s in vmap(one)(x, u)]) if len(x) else 0
    return total.numpy()


def probes(task: Task, cache: Path, size: int, count: int, number: int = 0) -> Iterator[np.ndarray]:
    """Recorded probes of HAP's procedure on batch ``number``, in blocks ``[25, channels]``; those in the cache are not computed again."""
    for block in range(-(-count // CHUNK)):
        path = cache / f"hap-{size}-{number}" / f"{block:04d}.npy"
        if not path.is_file():
            save(path, np.stack(list(hap(task.model, task.pool(size, number * size), CHUNK, seed=block))))
        yield np.load(path)
