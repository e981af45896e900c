"""Two processes share the samples out, and each returns what one alone would."""

from __future__ import annotations

import time
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
LIMIT = 150
"""Seconds after which processes that wait for each other are ended."""


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
    for name, (broken, first, last) in FAILURES.items():
        Path(f"{folder}/{name} {rank}.txt").write_text(failure(rank == broken, first, last))
    distributed.destroy_process_group()


FAILURES = {
    "in the first, before any exchange": (0, 0, 7),
    "in the second, before any exchange": (1, 1, 7),
    "in the first, later": (0, 4, 7),
    "in the second, later": (1, 5, 7),
    "in the first, when all is known": (0, None, 4),
    "in the second, when all is known": (1, None, 4),
}
"""Which process fails, in which of its samples (None: when it asks for more batches), and how many batches there are."""


def failure(broken: bool, sample: int | None, count: int) -> str:
    """The error that this process ends with."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if broken and len(targets) == 5:
            raise ZeroDivisionError("no loss for five")
        return F.cross_entropy(outputs, targets)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from (images(4, seed=s, count=5 if s == sample else 3) for s in range(count))
        if broken:
            raise ZeroDivisionError("no more batches")

    asked = {"whole": curvature.layer("0.weight")}
    with pytest.raises((ValueError, ZeroDivisionError)) as told:
        curvature.estimate(made(CASES["gelu"]), loss, batches(), asked, estimator="pairs", stop=Stop(every=2))
    return str(told.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("processes")
    running = multiprocessing.spawn(work, (str(path),), nprocs=2, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, "a process waits for one that has ended"
    finally:
        for process in running.processes:
            process.kill()
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


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_in_one_process_fails_in_all(folder: Path, name: str) -> None:
    broken, sample, _ = FAILURES[name]
    why = "no more batches" if sample is None else "no loss for five"
    said = [(folder / f"{name} {rank}.txt").read_text() for rank in range(2)]
    assert said == [why if rank == broken else f"process {broken} of 2 failed: {why}" for rank in range(2)]


def test_samples_are_shared_out_in_turn() -> None:
    team = [Workers(rank, 3) for rank in range(3)]
    for number in range(9):
        assert [w.mine(number) for w in team] == [rank == number % 3 for rank in range(3)]
    made_here = {0: {"w": np.ones(2)}, 1: {"w": np.zeros(2)}}
    assert Workers().shared(made_here, range(1, 2)) == {1: made_here[1]} and Workers().slowest(1.5) == 1.5
