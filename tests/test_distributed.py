"""Two processes under torchrun on this machine: the same results as one, and what makes no sense there is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharded_curvature import FIRST_ORDER, words
from typer.testing import CliRunner

from curvepress.commands import cli
from curvepress.curvature.workers import Workers

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).parent / "tiny_recipe.py"
SCORES = ("scores.safetensors", "scores.json")


LIMIT = 240
"""Seconds after which what runs under torchrun is ended.  Alone on two cores it takes a tenth of that."""


def launched(*args: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """What comes of torchrun with these arguments.  Out of time, it is asked to end its processes, which would outlive it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            said = running.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            running.terminate()
            said = running.communicate(timeout=60)
            pytest.fail(f"torchrun did not end within {LIMIT} s; it said\n{said[0]}\n{said[1]}")
    return subprocess.CompletedProcess(command, running.returncode, *said)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    typed("trace", TINY, "--out", folder)
    return folder


def typed(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def test_two_processes_score_as_one(traced: Path, tmp_path: Path) -> None:
    one, two = (Path(shutil.copytree(traced, tmp_path / name)) for name in ("one", "two"))
    settings = (
        "--method",
        "mask_curvature",
        "--samples",
        3,
        "--seed",
        5,
    )  # of four batches: one process makes two samples and the other one
    assert typed("score", one, *settings).exit_code == 0
    done = launched("-m", "curvepress", "score", two, *settings)
    assert done.returncode == 0, done.stderr
    assert [(two / n).read_bytes() for n in SCORES] == [(one / n).read_bytes() for n in SCORES]
    assert sum("scores.safetensors" in line for line in done.stdout.splitlines()) == 1  # printed once
    stages = [json.loads((f / "run.json").read_text())["stages"]["score"] for f in (one, two)]
    assert stages[0]["settings"] == stages[1]["settings"] and stages[0]["outputs"] == stages[1]["outputs"]
    assert not list(two.rglob("*.tmp")) and not (two / "checkpoints").exists()


def test_what_the_first_process_refuses_is_said_once(tmp_path: Path) -> None:
    done = launched("-m", "curvepress", "score", tmp_path, "--method", "mask_curvature")
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("curvepress: ")]
    assert len(said) == 1 and "holds no run" in said[0], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("plan", "{run}", "--params", "0.5"), "`plan` is the work of one process; run it without torchrun, which only `score` can use"),
        (("score", "{run}"), "`score --method reconstruction` is the work of one process; run it without torchrun, or choose one of"),
        (
            ("score", "{run}", "--method", "taylor"),
            "`score --method taylor` is the work of one process; run it without torchrun",
        ),
    ],
)
def test_what_makes_no_sense_under_torchrun_is_refused(
    traced: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], complaint: str, rank: int
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(cli, "workers", lambda: Workers(rank, 2))
    monkeypatch.setattr(Workers, "wait", lambda self: waited.append(self.rank))
    result = typed(*(a.format(run=traced) for a in args))
    assert result.exit_code == 1 and waited == [rank]  # nobody ends the others before the first has spoken
    assert result.stderr.startswith(f"curvepress: {complaint}") if rank == 0 else result.stderr == ""


# Estimates in two processes, made once by sharded_curvature.py.


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("estimates")
    done = launched(ROOT / "tests" / "sharded_curvature.py", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


NAMES = (
    *(f"{kind} {e}" for kind in ("images", "words") for e in FIRST_ORDER),
    *("smallest terms omitted", "stopped between two rounds", "resumed"),
)


def test_every_case_is_compared(estimates: list[dict[str, Any]]) -> None:
    assert all(set(e[how]) == set(NAMES) for e in estimates for how in ("whole", "shared", "sharded"))


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_estimate_as_one(estimates: list[dict[str, Any]], name: str) -> None:
    for process in estimates:
        assert process["shared"][name] == process["whole"][name]  # to the last bit


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_model_gives_what_the_whole_one_does(estimates: list[dict[str, Any]], name: str) -> None:
    for process in estimates:
        found, wanted = process["sharded"][name], process["whole"][name]
        assert (found["samples"], found["stopped"]) == (wanted["samples"], wanted["stopped"])
        for part in ("mean", "stderr"):
            assert set(found[part]) == set(wanted[part])
            for measure, values in wanted[part].items():
                np.testing.assert_allclose(found[part][measure], values, rtol=1e-9, atol=1e-15)
                assert part == "stderr" or np.any(values)


def test_a_sharded_model_lies_in_parts(estimates: list[dict[str, Any]]) -> None:
    whole = sum(p.numel() for p in words().parameters())
    assert sum(e["held"] for e in estimates) == whole and max(e["held"] for e in estimates) < 0.7 * whole


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("hessian", "second derivatives do not pass through a model sharded with fully_shard; choose a first-order estimator"),
        ("controlled", "second derivatives do not pass through a model sharded with fully_shard"),
        ("matrix", "second derivatives do not pass through a model sharded with fully_shard"),
        ("float16", "choose bfloat16 or full"),
        ("wrapped", "give the model inside, .module"),
        ("alone", "'1.weight' can only be read one example at a time"),
        ("few", "1 batches cannot be shared among 2 processes; use fewer processes or smaller batches"),
    ],
)
def test_what_cannot_work_is_refused_by_every_process(estimates: list[dict[str, Any]], case: str, complaint: str) -> None:
    for process in estimates:
        assert complaint in process["refused"][case]
