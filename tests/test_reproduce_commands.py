"""``curvepress reproduce`` as people use it: the files it leaves, the figures of every stage, going on, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from curvepress.export import Quartiles, Timing
from curvepress.quantization.allocation import FLOAT
from curvepress.quantization.packing import packed_size
from curvepress.reproduce import accounts, ehap, hap
from curvepress.reproduce.accounts import REPRODUCTION
from curvepress.reproduce.running import FLOW
from curvepress.runs.artifacts import load_scores, read_json
from curvepress.runs.folder import FLOWS, QUANTIZATION, open_run
from curvepress.stages import pipeline
from curvepress.stages import quantizing as quantization
from curvepress.stages.quantizing import QUANTIZED
from tests.test_cli import refused, typed

TINY = Path(__file__).parent / "tiny_recipe.py"
QUICK = ("--examples", "48", "--epochs", "1", "--lr", "0.05")


def in_no_time(paths: dict[str, Path], example: object, *, threads: int, batches: tuple[int, ...]) -> tuple[Timing, ...]:
    one = Quartiles(1.0, 1.0, 1.0)
    return tuple(Timing(name, size, threads, 5, one, one, one) for size in batches for name in paths)


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timing, which takes long."""
    for module in (pipeline, quantization, accounts):
        monkeypatch.setattr(module, "compare_latency", in_no_time)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return Path(shutil.copy(TINY, tmp_path / "task.py"))


def facts_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "reproduction.json", REPRODUCTION)


def test_ehap_leaves_every_stage_its_file_and_figures_and_ends_in_integers(recipe: Path, tmp_path: Path):
    folder = tmp_path / "run"
    asked = ("reproduce", "ehap", recipe, "--params", "0.6", "--probes", "4", *QUICK, "--qat-epochs", "1", "--corrected", "--out", folder)
    said = typed(*asked)
    assert said.code == 0 and " integers " in said.out
    run, facts = open_run(folder), facts_of(folder)
    assert set(run.stages) == {*FLOWS, *QUANTIZATION, "reproduce"}
    assert all((folder / name).is_file() for flow in (*FLOWS.values(), *QUANTIZATION.values()) for name in flow.writes)
    rows = {r["stage"]: r for r in facts["stages"]}
    assert list(rows) == ["original", "pruned", "fine-tuned", "calibrated", "trained", "integers"]
    assert rows["fine-tuned"]["params"] <= 0.6 * rows["original"]["params"] and rows["fine-tuned"]["macs"] < rows["original"]["macs"]
    assert all(r["bytes"] == (folder / r["file"]).stat().st_size for r in rows.values())
    assert all(set(rows[s]["latency"]) == {"1", "64"} and rows[s]["test"] for s in ("original", "fine-tuned", "integers"))
    quantized = read_json(folder / "quantized.json", QUANTIZED)
    assert quantized["agreement"]["same"] == 100 and not quantized["agreement"]["kernels"]["float"]
    assert {w["bits"] for w in quantized["weights"]} == {8}
    assert run.stages["score"].settings["precision"] == "float16" and run.stages["quantize"].settings["epochs"] == 1
    before = (folder / "run.json").read_bytes()
    assert typed(*asked).out.count("done before") == len(FLOW["ehap"]) + 1 and (folder / "run.json").read_bytes() == before
    assert "was done otherwise" in refused(*asked[:4], "0.5", *asked[5:])


def test_hap_as_released_and_corrected_differ_where_documented(recipe: Path, tmp_path: Path):
    runs = {}
    for name, more in (("released", ()), ("corrected", ("--corrected", "--probes", "6"))):
        common = ("--params", "0.6", *QUICK, *more, "--out", tmp_path / name)
        assert typed("reproduce", "hap", recipe, *common).code == 0
        runs[name] = open_run(tmp_path / name).stages
    differing = {
        key for stage in FLOWS for key, value in runs["released"][stage].settings.items() if runs["corrected"][stage].settings[key] != value
    }
    assert differing == {"probes", "keeps", "layers", "start"} <= set(hap.PRESET.corrections)
    assert load_scores(tmp_path / "released").samples == 3 and facts_of(tmp_path / "released")["settings"]["examples"] == 48


def test_hawq_chooses_bits_within_the_ratio(recipe: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert typed("reproduce", "hawq-v2", recipe, "--ratio", "8", "--probes", "3", "--examples", "48", "--out", folder).code == 0
    quantized, facts = read_json(folder / "quantized.json", QUANTIZED), facts_of(folder)
    held = sum(packed_size(w["elements"], w["bits"] or FLOAT) for w in quantized["weights"])
    assert held <= sum(4 * w["elements"] for w in quantized["weights"]) / 8 and facts["facts"]["average bits"] <= 4
    assert all(2 <= w["bits"] <= 8 for w in quantized["weights"]) and all(4 <= s["bits"] <= 8 for s in quantized["sites"])
    assert [r["stage"] for r in facts["stages"]] == ["float", "calibrated", "integers"]


def test_nvit_keeps_a_budget_without_a_clock(recipe: Path, tmp_path: Path):
    folder = tmp_path / "run"
    common = ("--option", "width=40", "--params", "0.7", "--eta", "0", "--samples", "2", "--epochs", "1", "--lr", "0.01", "--out", folder)
    assert typed("reproduce", "nvit", recipe, *common).code == 0
    rows = facts_of(folder)["stages"]
    assert rows[-1]["params"] <= 0.7 * rows[0]["params"]


def test_what_is_asked_in_vain_is_refused(recipe: Path, tmp_path: Path):
    assert "no budget is given" in refused("reproduce", "hap", recipe, "--out", tmp_path / "a")
    assert "no plan fits the budget" in refused("reproduce", "hap", recipe, "--params", "0.01", "--out", tmp_path / "b")


def test_ehap_has_the_settings_of_its_paper():
    released = ehap.PRESET.chosen()
    assert (released["precision"], released["probes"], released["qat_epochs"], released["bits"]) == ("float16", 300, 30, 8)
