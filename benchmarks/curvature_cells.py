"""One measurement in a process of its own: what a way to curvature costs, and how well it then ranks the channels.

python -m benchmarks.curvature_cells 20 hap 0 --cache FOLDER       # depth, mode, seed; prints one line of JSON
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import curvature_hap, curvature_peers, records
from benchmarks import curvature_ours as ours
from benchmarks import curvature_reference as reference
from benchmarks.curvature_ranking import overlap, spearman
from benchmarks.curvature_task import POPULATION, Batch, Task, sensitivity, task
from curvepress.metering import metered

BATCH = 128
PROBES = 6


@dataclass(frozen=True)
class Mode:
    """``steps(task, seed)`` yields samples of the traces ``[channels]``, one a probe; ``needs`` is the module of the peer.

    An ``exact`` mode yields the result itself, twice: as the first work of the process and once it is warm.  ``probes`` are
    those of a step after the first.
    """

    steps: Callable[[Task, int], Iterator[np.ndarray]]
    exact: bool = False
    needs: str = "torch"
    probes: int = 1


def _probes(function: Callable[..., Iterator[np.ndarray]], needs: str = "torch") -> Mode:
    return Mode(lambda t, seed: function(t.model, fixed(t, seed), PROBES, seed), needs=needs)


def _exact(function: Callable[..., Iterator[np.ndarray]], needs: str) -> Mode:
    return Mode(lambda t, seed: chain.from_iterable(function(t.model, fixed(t, seed)) for _ in range(2)), exact=True, needs=needs)


def _ours(**settings: Any) -> Mode:
    return Mode(lambda t, seed: ours.twice(fixed(t, seed), t.model, seed=seed, **settings), exact=True)


def _our_probes(**settings: Any) -> Mode:
    return Mode(lambda t, seed: ours.probed(fixed(t, seed), t.model, seed, **settings), probes=ours.PROBES)


def fixed(work: Task, number: int) -> Batch:
    """Batch ``number`` of 128 images of the pool; every round of the comparison takes another."""
    return work.pool(BATCH, number * BATCH)


MODES: dict[str, Mode] = {
    "hap": _probes(curvature_hap.hap),
    "pyhessian": _probes(curvature_peers.pyhessian, "pyhessian"),
    "curvlinops_probes": _probes(curvature_peers.curvlinops_probes, "curvlinops"),
    "curvlinops_exact": _exact(curvature_peers.curvlinops_exact, "curvlinops"),
    "curvlinops_main": _exact(curvature_peers.curvlinops_main, "curvlinops.ggn_diagonal"),
    "backpack_exact": _exact(curvature_peers.backpack_exact, "backpack.extensions"),
    "exact": _ours(estimator="exact"),
    "exact_bfloat16": _ours(estimator="exact", precision="bfloat16"),
    "exact_99": _ours(estimator="exact", omit=0.01),
    "exact_80": _ours(estimator="exact", omit=0.2),
    "pairs": _ours(estimator="pairs"),
    "sketch": _ours(estimator="sketch"),
    "hessian": _our_probes(),
    "hessian_bfloat16": _our_probes(precision="bfloat16"),
    **{f"population_{n}": Mode(ours.population(images=n), exact=True) for n in (1024, 2048, 3072, 3584, 4096)},
    **{f"population_{n}_bfloat16": Mode(ours.population(images=n, precision="bfloat16"), exact=True) for n in (2048, 3072, 3584, 4096)},
    "population_reliable": Mode(ours.population(reliability=0.95), exact=True),
}


def cell(depth: int, mode: str, seed: int, cache: Path) -> records.Record:
    """CPU seconds of every step, peak memory above the idle process in MiB, and agreement of the mean with both references.

    The process is idle once everything, the peer included, is imported and the model and the images are there.
    """
    importlib.import_module(MODES[mode].needs)
    work = task(depth, cache)
    fixed(work, seed)
    idle = _resident()
    with metered() as taken:
        cpu, samples = _timed(MODES[mode].steps(work, seed))
    cost = {
        "seed": seed,
        "peer": _peer(MODES[mode].needs),
        "steps": cpu,
        "probes": MODES[mode].probes,
        "wall": taken.wall,
        "peak": taken.peak - idle,
        "idle": idle,
    }
    return {**cost, **_agreement(work, np.mean(samples, axis=0), references(cache / f"resnet{depth}", seed))}


def _peer(module: str) -> str:
    """The package of ``module`` and its version."""
    name = packages_distributions()[module.partition(".")[0]][0]
    return f"{name} {version(name)}"


def _timed(steps: Iterator[np.ndarray]) -> tuple[list[float], list[np.ndarray]]:
    cpu, samples, start = [], [], time.process_time()
    for sample in steps:
        now = time.process_time()
        cpu.append(now - start)
        samples.append(sample)
        start = now
    return cpu, samples


def _agreement(work: Task, traces: np.ndarray, known: dict[str, np.ndarray]) -> records.Record:
    """Rank correlations of sensitivities with those of the same images and of the population, where the references are there."""
    if len(traces) == 1:
        return {"trace": float(traces[0])}
    mine, found = sensitivity(work.model, traces), {"trace": float(traces.sum())}
    for name, exact in known.items():
        theirs = sensitivity(work.model, exact)
        found[name] = spearman(mine, theirs)
        found[f"{name}_half"] = overlap(mine, theirs)
    return found


def references(cache: Path, number: int) -> dict[str, np.ndarray]:
    """Exact traces of batch ``number``, ``same``, and of the population, as far as ``python -m benchmarks.curvature reference`` came."""
    same, shards = reference.exact_path(cache, BATCH, number), sorted(reference.population_folder(cache, POPULATION).glob("*.npy"))
    whole = len(shards) * reference.SHARD == POPULATION
    found = {"same": np.load(same)} if same.is_file() else {}
    return found | ({"population": np.mean([np.load(s) for s in shards], axis=0)} if whole else {})


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    """Run one cell and print its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("depth", type=int)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("seed", type=int)
    parser.add_argument("--cache", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(cell(chosen.depth, chosen.mode, chosen.seed, chosen.cache)))


if __name__ == "__main__":
    main()
