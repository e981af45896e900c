"""`curvepress compress --rounds`: cut, recover and score again, until the budget; every round on record, and the last one loads."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_cli import bytes_of, made_in, refused, typed, undrawn

from curvepress.commands import cli
from curvepress.costs import cost
from curvepress.plan import Plan, kept, lost
from curvepress.planner.rounds import remainder
from curvepress.repairing.sequential import repair
from curvepress.runs.artifacts import load_scores
from curvepress.runs.folder import FLOWS
from curvepress.stages import pipeline
from curvepress.surgery.cutting import apply

ASKED = ("--params", "0.25", "--rounds", "3", "--samples", "4", "--epochs", "1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("rounds"), *ASKED)


def desks(first: Path) -> list[cli.Desk]:
    task = cli.load_recipe(str(first.parent / "task.py"))
    return [cli.Desk(cli.open_run(folder), task) for folder in (first / "rounds" / "1", first / "rounds" / "2", first)]


def test_each_round_cuts_further_under_budgets_in_equal_ratios(first: Path):
    plans = [d.plan() for d in desks(first)]
    whole = cost(Plan(plans[0].structure)).params
    for n, plan in enumerate(plans, 1):
        assert cost(plan).params <= whole * 0.25 ** (n / 3)
    for wide, narrow in pairwise(plans):
        assert cost(narrow).params < cost(wide).params
        assert all({*kept(narrow, g).tolist()} <= {*kept(wide, g).tolist()} for g in wide.structure.groups)


def test_a_round_begins_at_what_the_one_before_has_recovered(first: Path):
    before, now = desks(first)[1:]
    start, example = before.compressed("model.safetensors"), now.recipe.inputs()[0]
    second = remainder(before.plan(), now.plan())
    torch.testing.assert_close(now.compressed("pruned.safetensors")(example), apply(start, second, example)(example))
    again = repair(now.compressed("pruned.safetensors"), start, now.recipe.batches("calibration", seed=0), second).model
    torch.testing.assert_close(now.compressed("repaired.safetensors")(example), again(example))
    found = cli.read_report(cli.open_run(first))
    assert found.metrics["round before"] == json.loads((first / "rounds/2/history.json").read_text())["validation"]
    gone = {g.name: sorted({*kept(before.plan(), g).tolist()} - {*kept(now.plan(), g).tolist()}) for g in now.plan().structure.free}
    predicted = sum(found.scores.values[g][c].sum() for g, c in gone.items())
    assert found.frontier[-1].predicted == pytest.approx(predicted) and len(found.frontier) == 1


def test_what_is_left_is_scored_anew_and_what_went_keeps_its_score(first: Path):
    before, now = desks(first)[1:]
    old, new = load_scores(before.run.folder), load_scores(now.run.folder)
    for group in before.plan().structure.free:
        stays, went = kept(before.plan(), group), lost(before.plan(), group)
        assert (old.values[group.name][went] == new.values[group.name][went]).all()
        assert (old.values[group.name][stays] != new.values[group.name][stays]).all()


def test_the_same_command_keeps_everything_and_an_interrupted_one_goes_on(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    task = first.parent / "task.py"
    said = typed("compress", task, *ASKED, "--out", first)
    assert said.code == 0 and said.out.count("done before") == 3 * len(FLOWS) - 4
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "repair", interrupted_after(2, pipeline.repair))
        assert typed("compress", task, *ASKED, "--out", tmp_path / "run").code == 130
    assert not (tmp_path / "run" / "plan.json").exists()
    assert typed("compress", task, *ASKED, "--out", tmp_path / "run").code == 0
    assert bytes_of(tmp_path / "run") == bytes_of(first)
    again = typed("compress", task, *ASKED, "--lr", "0.01", "--out", tmp_path / "run")
    assert again.code == 1 and "lr was 0.05, now 0.01" in again.err
    with (tmp_path / "run" / "rounds" / "2" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert "rounds/2" in refused("compress", task, *ASKED, "--out", tmp_path / "run")


def interrupted_after(times: int, work):
    """What does its work so many times, and is then interrupted."""
    left = [times]

    def once(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return work(*args, **kwargs)

    return once


@pytest.mark.parametrize("stage", ["score", "apply", "repair"])
def test_what_begins_at_the_round_before_is_no_command_of_its_own(first: Path, stage: str):
    assert f"in which `{stage}` begins at the round before" in refused(stage, first)


def test_one_round_is_no_rounds_and_others_than_channels_are_refused(first: Path, tmp_path: Path):
    task, out = first.parent / "task.py", ("--out", tmp_path / "run")
    for more in (("--bits", "4"), ("--implants",), ("--branches", "1"), ("--latency", "50%")):
        assert f"--rounds 2 cuts channels alone, {more[0]} is for one round" in refused(
            "compress", task, "--params", "0.5", "--rounds", "2", *more, *out
        )
    for folder, more in (("a", ()), ("b", ("--rounds", "1"))):
        assert typed("compress", task, "--params", "0.5", "--samples", "4", *more, "--out", tmp_path / folder).code == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b") and not (tmp_path / "b" / "rounds").exists()
