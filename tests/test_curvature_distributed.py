"""Two processes share the samples out, and each returns what one alone would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from curvature_zoo import CASES, images, made
from torch import distributed, multiprocessing
from torch.nn import functional as F

from curvepress import curvature
from curvepress.curvature import Stop
from curvepress.curvature.workers import Workers

STOPS = {
    "all": Stop(),
    "rule": Stop(reliability=0.5),
    "first look": Stop(every=1, samples=5),  # before the second process has made any sample
    "odd": Stop(samples=3),
    "seconds": Stop(seconds=1e-9, every=3),
}
BATCHES = 7


def run(stop: Stop, estimator: str = "pairs", count: int = BATCHES, **options: object) -> curvature.Curvature:
    model = made(CASES["gelu"])
    batches = [images(4, seed=s, count=3 + s % 3) for s in range(count)]
    asked = {n: curvature.elements(n, p) for n, p in model.named_parameters() if p.ndim > 1} | {"a": curvature.Activation("1")}
    return curvature.estimate(model, F.cross_entropy, batches, asked, estimator=estimator, rate=0.5, stop=stop, **options)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, stop in STOPS.items():
        found = run(stop)
        np.savez(f"{folder}/{name} {rank}.npz", samples=found.samples, stopped=found.stopped, **dict(found.mean))
        np.savez(f"{folder}/{name} stderr {rank}.npz", **dict(found.stderr))
    done: dict[int, curvature.Sample] = {}
    run(Stop(samples=3), done=done)
    assert list(done) == [n for n in range(3) if n % 2 == rank]
    np.savez(f"{folder}/resumed {rank}.npz", samples=BATCHES, **dict(run(Stop(), done=done).mean))
    with pytest.raises(ValueError, match="1 batches cannot be shared among 2 processes; use fewer processes or smaller batches"):
        run(Stop(), count=1)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(path),), nprocs=2)
    yield path


@pytest.mark.parametrize("name", [*STOPS, "resumed"])
def test_two_processes_find_what_one_finds(folder: Path, name: str) -> None:
    alone = run(STOPS.get(name, Stop()))
    for rank in range(2):
        found = np.load(folder / f"{name} {rank}.npz")
        assert found["samples"] == alone.samples
        for measure, values in alone.mean.items():
            np.testing.assert_allclose(found[measure], values, rtol=1e-12)
        if name != "resumed":
            assert str(found["stopped"]) == alone.stopped
            errors = np.load(folder / f"{name} stderr {rank}.npz")
            for measure, values in alone.stderr.items():
                np.testing.assert_allclose(errors[measure], values, rtol=1e-9)


def test_samples_are_shared_out_in_turn() -> None:
    team = [Workers(rank, 3) for rank in range(3)]
    for number in range(9):
        assert [w.mine(number) for w in team] == [rank == number % 3 for rank in range(3)]
    made_here = {0: {"w": np.ones(2)}, 1: {"w": np.zeros(2)}}
    assert Workers().shared(made_here, range(1, 2)) == {1: made_here[1]} and Workers().slowest(1.5) == 1.5
