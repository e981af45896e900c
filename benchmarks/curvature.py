"""Curvature of channels: what it costs and how well it ranks them, against HAP's procedure and published tools.

    python -m benchmarks.curvature reference --depth 20 --cache FOLDER     # minutes to an hour; resumes; once for each depth
    python -m benchmarks.curvature measure --depth 20 --cache FOLDER       # minutes a round; resumes
    python -m benchmarks.curvature ehap --depth 20 --cache FOLDER          # EHAP's loss scale, in real float16
    python -m benchmarks.curvature equality --depth 20 --cache FOLDER      # the exact estimate against unit vectors, in float64
    python -m benchmarks.curvature processes --depth 20 --cache FOLDER     # two processes against one
    python -m benchmarks.curvature table
    python -m benchmarks.curvature required                                # the figures that were asked for

CIFAR-10, residual networks in eval mode, weights of convolutions and the linear layer, one channel a row of a weight.  A batch
is 128 training images, another in every round; the population are 16,384 others.  Every cell is a process of its own on one thread; modes
take turns.  The cache holds decoded images, references and recorded probes; keep it outside the repository.  Needs the data of the
recipe ``cifar10`` (``CURVEPRESS_DATA``) and the peers named in the README beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import curvature_ours as ours
from benchmarks import curvature_processes, curvature_tables, records
from benchmarks import curvature_reference as reference
from benchmarks.curvature_cells import BATCH, MODES
from benchmarks.curvature_hap import ehap, hap
from benchmarks.curvature_ranking import agreement, needed, overlap, spearman
from benchmarks.curvature_required import required
from benchmarks.curvature_task import sensitivity, sizes, task
from curvepress import curvature as engine

FILE = Path(__file__).parent / "results" / "curvature.jsonl"
RECORDED = 250
LEVELS = (0.9, 0.95, 0.99)
SHOWN = 300
MAIN = "curvlinops_main"


def make_reference(depth: int, cache: Path, rounds: int) -> None:
    """Record HAP's probes, exact traces of the batches of all rounds and those of the population, and what follows from them."""
    work, folder = task(depth, cache), cache / f"resnet{depth}"
    shards = reference.population(work, folder)
    exact = [reference.exact_of_batch(work, BATCH, folder, number) for number in range(rounds)]
    for number, same in enumerate(exact):
        probes = np.concatenate(list(reference.probes(work, folder, BATCH, RECORDED, number)))
        key = {"depth": depth, "mode": "hap_extrapolated", "batch": number}
        print(records.once(FILE, key, lambda p=probes, s=same: _extrapolated(work.model, p, s, shards)), flush=True)


def _extrapolated(model: torch.nn.Module, traces: np.ndarray, same: np.ndarray, shards: np.ndarray) -> records.Record:
    """Probes needed by HAP for the ranking of its own batch, by bootstrap, and what its usual 300 give."""
    population = sensitivity(model, shards.mean(0))
    halves = [sensitivity(model, shards[i::2].mean(0)) for i in (0, 1)]
    probes, own = sensitivity(model, traces), sensitivity(model, same)
    alone = {"mean_square": np.ones_like(same), "squared_norm": sizes(model)}
    live = same > 1e-6
    return {
        "probes": len(probes),
        "needed": {str(level): needed(probes, own, level) for level in LEVELS},
        "of_300": {"same": _middle(agreement(probes, own, own, SHOWN)), "population": _middle(agreement(probes, own, population, SHOWN))},
        "of_recorded": {"same": spearman(probes.mean(0), own), "population": spearman(probes.mean(0), population)},
        "relative_deviation": float(np.median(traces.std(0, ddof=1)[live] / same[live])),
        "without_curvature": {name: spearman(sensitivity(model, t), population) for name, t in alone.items()},
        "exact_of_batch": {"population": spearman(own, population), "population_half": overlap(own, population)},
        "population_halves": spearman(*halves),
    }


def _middle(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.quantile(values, (0.5, 0.05, 0.95))]


def measure(depth: int, cache: Path, rounds: int, modes: Sequence[str], main: Path | None) -> None:
    """Run every mode once a round, each time in another order and with another seed, whatever has no record with this code yet."""
    for turn in range(rounds):
        for mode in np.random.default_rng(turn).permutation(sorted(modes)).tolist():
            if _there(mode, main):
                key = {"depth": depth, "mode": mode, "round": turn, "code": code()}
                record = records.once(FILE, key, lambda m=mode, r=turn: _cell(depth, m, r, cache, main))
                print({k: record.get(k) for k in ("mode", "round", "steps", "peak", "same", "population")}, flush=True)


def code() -> str:
    """A fingerprint of the engine: records of older code are kept, and marked where they are shown."""
    files = sorted(Path(engine.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]


def _there(mode: str, main: Path | None) -> bool:
    there = main is not None if mode == MAIN else importlib.util.find_spec(MODES[mode].needs.partition(".")[0]) is not None
    if not there:
        print(f"{mode} is left out: it needs {MODES[mode].needs}, which is not installed; see benchmarks/README.md", flush=True)
    return there


def _cell(depth: int, mode: str, seed: int, cache: Path, main: Path | None) -> records.Record:
    command = ["-W", "ignore", "-m", "benchmarks.curvature_cells", str(depth), mode, str(seed), "--cache", str(cache)]
    paths = [str(main)] if mode == MAIN else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def released_scale(depth: int, cache: Path, probes: int = 6) -> None:
    """Record what EHAP's released loss scale does to its probes, next to the same probes in float32."""
    print(records.once(FILE, {"depth": depth, "mode": "ehap_released", "probes": probes}, lambda: _scales(depth, cache, probes)))


def _scales(depth: int, cache: Path, probes: int) -> records.Record:
    work = task(depth, cache)
    single = np.stack(list(hap(work.model, work.pool(BATCH), probes, seed=0)))
    half = list(ehap(work.model, work.pool(BATCH), probes, seed=0))
    found = np.stack([p.channels for p in half])
    size = np.abs(found).sum(1)
    ranked = [sensitivity(work.model, t) for t in (found.mean(0), found[0], single[0], single.mean(0))]
    return {
        "scales": [p.scale for p in half],
        "shares": (size / size.sum()).tolist(),
        "zero_channels": [int((row == 0).sum()) for row in found],
        "ratio_to_float32": [float(np.median(a[b != 0] / b[b != 0])) for a, b in zip(found, single, strict=True)],
        "ranking": dict(zip(("first_probe", "first_float32", "mean_float32"), (spearman(ranked[0], r) for r in ranked[1:]), strict=True)),
    }


def equal(depth: int, cache: Path) -> None:
    """Record how far the exact estimate is from products of the true Hessian with unit vectors."""
    print(records.once(FILE, {"depth": depth, "mode": "equality"}, lambda: {"differences": ours.equality(task(depth, cache))}))


def processes(depth: int, cache: Path, rounds: int) -> None:
    """Record one process against two, once a round."""
    for turn in range(rounds):
        print(records.once(FILE, {"depth": depth, "mode": "processes", "turn": turn}, lambda: curvature_processes.compared(depth, cache)))


def main() -> None:
    """Read the command line and do one of these things."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("reference", "measure", "ehap", "equality", "processes", "table", "required"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/curvature"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--curvlinops-main", type=Path, help="a checkout of curvlinops' main branch, for its exact diagonal")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.what == "measure":
        measure(chosen.depth, chosen.cache, chosen.rounds, chosen.modes, chosen.curvlinops_main)
    elif chosen.what in ("table", "required"):
        {"table": curvature_tables.show, "required": required}[chosen.what](records.read(FILE))
    elif chosen.what in ("reference", "processes"):
        {"reference": make_reference, "processes": processes}[chosen.what](chosen.depth, chosen.cache, chosen.rounds)
    else:
        {"ehap": released_scale, "equality": equal}[chosen.what](chosen.depth, chosen.cache)


if __name__ == "__main__":
    main()
