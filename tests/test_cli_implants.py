"""`curvepress compress --implants`: ranks are priced, planned, fitted, trained and reported, and an interrupted run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import RESULTS, bytes_of, made_in, refused, typed, undrawn

from curvepress import report as reports
from curvepress.commands import cli
from curvepress.costs import cost
from curvepress.implants import names
from curvepress.plan import Plan
from curvepress.runs.folder import FLOWS
from curvepress.stages import pipeline
from curvepress.stages.ranking import rank_prices

ASKED = ("--params", "0.2", "--implants", "--price-examples", "32", "--samples", "4")
WRITTEN = (*RESULTS, "rank_prices.json")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("implants"), *ASKED)


def test_the_plan_has_implants_within_the_budget_and_the_model_loads(first: Path):
    desk = cli.Desk(cli.open_run(first), cli.load_recipe(str(first.parent / "task.py")))
    plan, small = desk.plan(), desk.compressed("model.safetensors")
    assert plan.implants and sum(p.numel() for p in small.parameters()) == cost(plan).params
    assert cost(plan).params <= 0.2 * cost(Plan(plan.structure)).params
    cut, repaired = (desk.compressed(f"{name}.safetensors").state_dict() for name in ("pruned", "repaired"))
    inner = [names(n, i)[0] for n, i in plan.implants.items()]  # which the repair leaves alone
    assert inner and not any(torch.equal(cut[n], repaired[n]) for n in inner)
    assert (first / "model.onnx").exists() and (first / "rank_prices.json").exists()


def test_the_report_names_the_implants_with_rank_and_price(first: Path):
    found = cli.read_report(cli.open_run(first))
    prices = json.loads((first / "rank_prices.json").read_text())["prices"]
    assert {i.weight: i.rank for i in found.implants} == {n: i.rank for n, i in found.plan.implants.items()}
    for i in found.implants:
        assert 0 < i.predicted <= prices[i.weight][str(i.rank)]["rise"] and i.stderr >= 0 and i.after < i.before
        assert i.weight in reports.text(found) and f"{i.rank} of {i.most}" in reports.text(found)
    channels = reports.data.predicted_of(found, *found.plan.structure.groups)
    wanted = sum(i.predicted for i in found.implants) + (channels[0] if channels else 0)
    assert reports.data.predicted_in_all(found)[0] == pytest.approx(wanted) == found.frontier[-1].predicted
    assert list(found.metrics) == ["original", "pruned", "re-estimated", "implants fitted", "repaired", "recovered"]
    assert json.loads((first / "metrics.json").read_text())["implants"][0]["weight"] == found.implants[0].weight


def test_the_same_command_keeps_everything_and_an_interrupted_one_goes_on(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = bytes_of(first, WRITTEN)
    said = typed("compress", first.parent / "task.py", *ASKED, "--out", first)
    assert said.code == 0 and said.out.count("done before") == len(FLOWS) + 1
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "repair", interrupted)
        assert typed("compress", first.parent / "task.py", *ASKED, "--out", tmp_path / "run").code == 130
    said = typed("compress", first.parent / "task.py", *ASKED, "--out", tmp_path / "run")
    assert said.code == 0 and "done before" in next(line for line in said.out.splitlines() if line.startswith("truncate"))
    assert bytes_of(tmp_path / "run", WRITTEN) == before


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_implants_cannot_be_planned_with_is_refused(first: Path, tmp_path: Path):
    task, out = first.parent / "task.py", ("--out", tmp_path / "run")
    assert "limit --macs instead" in refused("compress", task, "--latency", "50%", "--implants", *out)
    assert "--per params is for channels alone" in refused("compress", task, *ASKED, "--per", "params", *out)
    assert "--method magnitude only ranks channels, and --implants weighs them" in refused(
        "compress", task, *ASKED, "--method", "magnitude", *out
    )
    assert "--exchange needs --bits or --implants" in refused("compress", task, "--params", "0.5", "--exchange", "channels=0.1", *out)
    damaged = Path(shutil.copytree(first, tmp_path / "damaged"))
    (damaged / "rank_prices.json").write_text('{"format": "curvepress prices of ranks", "version": 1, "prices": {"a": {"b": 1}}}')
    assert "rank_prices.json is not as the stage wrote it" in refused("compress", task, *ASKED, "--out", damaged)
    with pytest.raises(ValueError, match="is damaged"):
        rank_prices(cli.open_run(damaged))
    (damaged / "rank_prices.json").unlink()
    message = refused("plan", damaged, "--params", "0.2", "--implants")
    assert f"has no prices of ranks, which --implants needs; make them with `curvepress frontier {damaged} --implants`" in message


def test_the_command_of_the_stage_gives_the_same_plan_and_rates_of_exchange_move_it(first: Path, tmp_path: Path):
    folder = Path(shutil.copytree(first, tmp_path / "run"))
    assert typed("plan", folder, "--params", "0.2", "--implants").code == 0
    assert bytes_of(folder, WRITTEN) == bytes_of(first, WRITTEN)
    said = typed("compress", first.parent / "task.py", *ASKED, "--exchange", "implants=1000000", "--again", "--out", folder)
    assert said.code == 0
    assert not cli.Desk(cli.open_run(folder), cli.load_recipe(str(first.parent / "task.py"))).plan().implants


def test_prices_of_several_temperatures_are_not_added_up(first: Path, tmp_path: Path):
    folder = Path(shutil.copytree(first, tmp_path / "run"))
    assert typed("score", folder, "--samples", 4, "--temperature", 4).code == 0
    message = refused("plan", folder, "--params", "0.2", "--implants")
    assert "scores are of temperature 4 and prices of implants of 1" in message and f"`curvepress frontier {folder} --implants`" in message
    assert typed("frontier", folder, "--implants", "--count", 3, "--price-examples", 32).code == 0
    assert {cli.open_run(folder).stages[s].settings["temperature"] for s in ("score", "weigh", "truncate")} == {4.0}
    assert typed("plan", folder, "--params", "0.2", "--implants").code == 0
    assert typed("score", folder, "--samples", 4, "--temperature", 4, "--method", "hessian_trace").code == 0  # which has none
    assert "scores are of temperature 1 and prices of implants of 4" in refused("plan", folder, "--params", "0.2", "--implants")
