"""Widths and bits by one command, and the frontier from which a plan is picked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from test_cli import TINY, in_no_time, typed
from torch import nn

from curvepress.costs import cost
from curvepress.objective import Batches
from curvepress.plan import Plan, from_json
from curvepress.planner.wiring import bits_of_plan
from curvepress.quantization.allocation import allocation
from curvepress.quantization.bitwidths import prices_from_dict
from curvepress.quantization.quantized import bits_from_json
from curvepress.runs.folder import FLOWS, QUANTIZATION
from curvepress.stages import frontiers, pipeline
from curvepress.stages import quantizing as quantization

PRICED = ("--price-examples", 64, "--samples", 3)
ASKED = ("--bytes", "30%", "--bits", "2-8", "--whole", "*", "--exchange", "channels=0.5", *PRICED, "--epochs", 1, "--qat-epochs", 1)


PLAIN = "    network = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))\n"
BLOCKS = "    network = nn.Sequential(nn.Linear(6, width), *(Block(width) for _ in range(3)), nn.Linear(width, 3))\n"
BLOCK = """

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return (x + self.down(self.up(x).relu())).relu()
"""


def residual(folder: Path) -> Path:
    """The tiny recipe with three residual blocks for its middle."""
    text = TINY.read_text()
    assert PLAIN in text
    (folder / "task.py").write_text(text.replace(PLAIN, BLOCKS) + BLOCK)
    return folder / "task.py"


def finished(task: Path, *asked: object) -> Path:
    """The folder of a finished run beside its recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compare_latency", in_no_time)
        patch.setattr(quantization, "compare_latency", in_no_time)
        said = typed("compress", task, "--out", task.parent / "run", *asked)
    assert said.code == 0, said
    return task.parent / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    home = tmp_path_factory.mktemp("joint")
    return finished(Path(shutil.copy(TINY, home / "task.py")), *ASKED)


def test_one_command_makes_what_was_planned(run: Path) -> None:
    plan = from_json((run / "plan.json").read_text())
    assert plan.bits is not None and cost(plan).bytes <= 0.3 * cost(Plan(plan.structure)).bytes
    check_spread(run, plan, 0.3)
    wanted = {name for flow in QUANTIZATION.values() for name in flow.writes} | {"bit_prices.json"}
    assert wanted <= {p.name for p in run.iterdir()}


def check_spread(run: Path, plan: Plan, share: float) -> None:
    """The bits that are used keep the budget, and are predicted to do no more harm to what has recovered than those of the plan."""
    prices = prices_from_dict(json.loads((run / "prices.json").read_text()))
    bits = bits_from_json((run / "bits.json").read_text())
    assert plan.bits is not None and allocation(prices, bits).rise <= allocation(prices, bits_of_plan(plan)).rise * (1 + 1e-9)
    packed = replace(plan, bits=replace(plan.bits, weights=bits.weights, activations=bits.sites))
    assert cost(packed).bytes <= share * cost(Plan(plan.structure)).bytes
    with safe_open(run / "quantized.safetensors", "pt") as file:
        held = {k: file.get_tensor(k) for k in file.keys() if k not in ("index", "digest")}  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in held.values()) == cost(packed).bytes


def test_branches_go_first_and_channels_and_bits_are_planned_around_them(tmp_path: Path) -> None:
    asked = ("--branches", 1, "--bytes", "30%", "--bits", "2-4", "--price-examples", 64, "--samples", 3, "--epochs", 1)
    run = finished(residual(tmp_path), *asked)
    plan = from_json((run / "plan.json").read_text())
    assert len(plan.skip) == 1 and plan.bits is not None
    assert cost(plan).bytes <= 0.3 * cost(Plan(plan.structure)).bytes
    assert not {n for n in plan.bits.weights if n.startswith(plan.skip[0] + ".")} and set(plan.bits.weights.values()) <= {2, 3, 4}
    check_spread(run, plan, 0.3)
    said = typed("compress", tmp_path / "task.py", "--out", run, *asked)
    assert said.code == 0 and said.out.count("done before") == len(FLOWS) + 1 + len(QUANTIZATION), said


def test_branches_may_be_chosen_with_channels_and_bits(tmp_path: Path) -> None:
    asked = ("--branches", "auto", "--bytes", "20%", "--bits", "2-8", "--price-examples", 64, "--samples", 3, "--epochs", 0)
    run = finished(residual(tmp_path), *asked)
    plan = from_json((run / "plan.json").read_text())
    prices = json.loads((run / "bit_prices.json").read_text())["branches"]
    assert len(prices) == 2 and 1 <= len(plan.skip) <= 2 and set(plan.skip) <= set(prices)
    assert cost(plan).bytes <= 0.2 * cost(Plan(plan.structure)).bytes
    check_spread(run, plan, 0.2)


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
    assert all(0 < p["latency"]["low"] <= p["latency"]["median"] <= p["latency"]["high"] for p in points)
    assert said.out.count("x │") == len(points) and f"{points[0]['latency']['median']:.2f}x" in (copy / "frontier.svg").read_text()
    said = typed("frontier", copy, "--count", 4, "--price-examples", 64, "--pick", 99)
    assert said.code == 1 and "--pick 99: the points of this frontier are 1 to" in said.err


def test_a_point_that_cannot_be_exported_keeps_its_metrics(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, export = Path(shutil.copytree(run, tmp_path / "run")), frontiers.to_integer_onnx
    shutil.copy(TINY, tmp_path / "task.py")

    def unable(module: nn.Module, batches: Batches, path: Path, **how: Any) -> Any:
        if path.name == "2.onnx":
            raise ValueError("no such operator")
        return export(module, batches, path, **how)

    monkeypatch.setattr(frontiers, "to_integer_onnx", unable)
    said = typed("frontier", copy, "--count", 4, "--price-examples", 64, "--measure")
    points = json.loads((copy / "frontier.json").read_text())["points"]
    assert said.code == 0 and "point 2 has no latency: no such operator" in said.err + said.out
    assert [p["latency"] is None for p in points] == [p["number"] == 2 for p in points] and all(p["measured"] for p in points)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--bytes", "50%", "--bits", "1-8"), "--bits must be from 2 to 8 bits; got '1-8'"),
        (("--bytes", "50%", "--bits", "few"), "--bits must be like 4, 2-8 or 2,4,8; got 'few'"),
        (("--bytes", "50%", "--activation-bits", "8"), "--activation-bits 8 needs --bits"),
        (("--bits", "2-8"), "no budget is given"),
        (("--bytes", "50%", "--branches", "auto"), "--branches auto weighs branches against bits: add --bits"),
        (("--bytes", "50%", "--bits", "8", "--exchange", "heads=2"), "activations, branches, implants) and a"),
        (("--bytes", "50%", "--bits", "8", "--exchange", "channels=nan"), "positive number, such as channels=0.1; got 'channels=nan'"),
        (("--bytes", "50%", "--exchange", "channels=2"), "--exchange needs --bits"),
        (("--bytes", "50%", "--branches", "some"), "--branches must be a whole number or auto; got 'some'"),
        (("--bytes", "50%", "--bits", "8", "--branches", "auto"), "--branches auto: this model has no residual branches"),
        (("--bytes", "50%", "--bits", "8", "--branches", 1), "this model has 0 residual branches"),
        (("--bytes", "50%", "--bits", "8", "--implants", "--exact", 5), "--exact cannot be had beside --implants"),
        (("--latency", "50%", "--bits", "8", "--exact", 5), "--exact cannot be had beside --latency"),
        (("--bytes", "50%", "--bits", "8", "--activation-bits", "4,8", "--exact", 5), "--exact cannot be had beside several --activation-"),
        (("--bytes", "1%", "--bits", "2-8", "--price-examples", 64), "the smallest that widths and bits can make this model is"),
    ],
)
def test_what_cannot_be_is_said(asked: tuple[object, ...], message: str, tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "task.py")
    said = typed("compress", tmp_path / "task.py", "--out", tmp_path / "run", *asked)
    assert said.code == 1 and message in said.err


@pytest.mark.parametrize("asked", [("--bits", "4"), ("--implants",), ("--exact", 5)])
def test_scores_that_only_rank_are_refused_before_any_work(asked: tuple[object, ...], tmp_path: Path) -> None:
    shutil.copy(TINY, tmp_path / "task.py")
    said = typed("compress", tmp_path / "task.py", "--out", tmp_path / "run", "--bytes", "50%", "--method", "magnitude", *asked)
    assert said.code == 1 and f"--method magnitude only ranks channels, and {asked[0]} weighs them" in said.err
    assert "or choose one of mask_curvature, reconstruction" in said.err and not (tmp_path / "run").exists()


def test_the_best_plan_is_proven_on_the_command_line(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.copy(TINY, tmp_path / "task.py")
    said = typed("plan", copy, "--params", 0.5, "--multiple", 4, "--exact", 30)
    assert said.code == 0 and "no plan within the budget has one below" in said.out
    plan = from_json((copy / "plan.json").read_text())
    assert plan.keep and cost(plan).params <= 0.5 * cost(Plan(plan.structure)).params
    assert all(len(own) % 4 == 0 for own in plan.keep.values())
