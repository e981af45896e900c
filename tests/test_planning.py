"""Widths and bits by one command, and the frontier from which a plan is picked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import TINY, in_no_time, typed

from curvepress import pipeline, quantization
from curvepress.costs import cost
from curvepress.plan import Plan, from_json
from curvepress.runs import QUANTIZATION

ASKED = ("--bytes", "50%", "--bits", "2-8", "--price-examples", 64, "--samples", 3, "--epochs", 1, "--qat-epochs", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    home = tmp_path_factory.mktemp("joint")
    shutil.copy(TINY, home / "task.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compare_latency", in_no_time)
        patch.setattr(quantization, "compare_latency", in_no_time)
        said = typed("compress", home / "task.py", "--out", home / "run", *ASKED)
    assert said.code == 0, said
    return home / "run"


def test_one_command_makes_what_was_planned(run: Path) -> None:
    plan = from_json((run / "plan.json").read_text())
    assert plan.bits is not None and cost(plan).bytes <= 0.5 * cost(Plan(plan.structure)).bytes
    chosen = json.loads((run / "bits.json").read_text())
    assert chosen["weights"] == dict(plan.bits.weights) and chosen["sites"] == dict(plan.bits.activations)
    wanted = {name for flow in QUANTIZATION.values() for name in flow.writes} | {"bit_prices.json"}
    assert wanted <= {p.name for p in run.iterdir()}


def test_the_same_command_has_nothing_left_to_do(run: Path) -> None:
    said = typed("compress", run.parent / "task.py", "--out", run, *ASKED)
    assert said.code == 0, said
    stages = [line for line in said.out.splitlines() if line.split(" ")[0] in (*QUANTIZATION, "weigh", "plan", "fit")]
    assert len(stages) == len(QUANTIZATION) + 3 and all("done before" in line for line in stages)


def test_a_point_of_the_frontier_becomes_the_plan(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copy(TINY, tmp_path / "task.py")
    said = typed("frontier", copy, "--count", 4, "--price-examples", 64, "--measure", "--pick", 2)
    assert said.code == 0, said
    points = json.loads((copy / "frontier.json").read_text())["points"]
    plan = from_json((copy / "plan.json").read_text())
    assert vars(cost(plan)) == points[1]["cost"] and (copy / "frontier.svg").read_text().rstrip().endswith("</svg>")
    assert all(set(p["measured"]) == {"accuracy", "loss"} for p in points)
    said = typed("frontier", copy, "--count", 4, "--price-examples", 64, "--pick", 99)
    assert said.code == 1 and "--pick 99: the points of this frontier are 1 to" in said.err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--bytes", "50%", "--bits", "1-8"), "--bits must be from 2 to 8 bits; got '1-8'"),
        (("--bytes", "50%", "--bits", "few"), "--bits must be like 4, 2-8 or 2,4,8; got 'few'"),
        (("--bytes", "50%", "--activation-bits", "8"), "--activation-bits 8 needs --bits"),
        (("--bits", "2-8"), "no budget is given"),
        (("--bytes", "1%", "--bits", "2-8", "--price-examples", 64), "the smallest that widths and bits can make this model is"),
    ],
)
def test_what_cannot_be_is_said(asked: tuple[object, ...], message: str, tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "task.py")
    said = typed("compress", tmp_path / "task.py", "--out", tmp_path / "run", *asked)
    assert said.code == 1 and message in said.err
