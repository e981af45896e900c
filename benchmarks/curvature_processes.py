"""The same estimate by one process of one thread and by two, under ``torchrun``.

python -m benchmarks.curvature processes --depth 20 --cache FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from benchmarks import curvature_ours as ours
from benchmarks.curvature_task import save, task
from benchmarks.records import Record
from curvepress.metering import metered

IMAGES = 2_048


def compared(depth: int, cache: Path, images: int = IMAGES) -> Record:
    """``cpu`` seconds of the busiest process and ``wall`` seconds, for one and for two, and the largest relative difference of a trace."""
    (one, alone), (two, shared) = (_run(depth, cache, images, count) for count in (1, 2))
    return {"one": one, "two": two, "images": images, "difference": float(np.max(np.abs(shared - alone) / np.abs(alone).clip(1e-12)))}


def _run(depth: int, cache: Path, images: int, count: int) -> tuple[Record, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        work = ["-m", "benchmarks.curvature_processes", str(depth), str(images), folder, "--cache", str(cache)]
        subprocess.run([*launch, *work], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
        return {k: max(s[k] for s in seconds) for k in ("cpu", "wall")}, np.load(Path(folder) / "traces.npy")


def process(depth: int, images: int, folder: Path, cache: Path) -> None:
    """One of the processes: warms up on its own, then takes its share and writes what it took."""
    torch.set_num_threads(1)
    work = task(depth, cache)
    next(ours.population(images=ours.SHARD, again=1, estimator="pairs")(work, 1))
    distributed.init_process_group("gloo")
    distributed.barrier()
    with metered() as taken:
        (traces,) = ours.population(images=images, again=1, estimator="pairs")(work, 0)
    rank = distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps({"cpu": taken.cpu, "wall": taken.wall}))
    if rank == 0:
        save(folder / "traces.npy", traces)
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("depth", type=int)
    parser.add_argument("images", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    chosen = parser.parse_args()
    process(chosen.depth, chosen.images, chosen.folder, chosen.cache)
