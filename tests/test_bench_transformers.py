"""The benchmark of transformers on a tiny classifier: plans of the right size, and a table of what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

hf = pytest.importorskip("transformers", reason="needs the extra `transformers`")

from benchmarks import records, transformers_table
from benchmarks import transformers as bench
from benchmarks import transformers_models as models
from curvepress.plan import Plan, kept
from curvepress.tracing.watching import trace
from curvepress_recipes import sst2


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = sst2.Classifier(config).eval()
    found = model, trace(model, sst2.example())
    for module in (bench, models):
        monkeypatch.setattr(module, "original", lambda task: found)
    monkeypatch.setattr(models, "MODELS", tmp_path / "models")
    monkeypatch.setattr(transformers_table, "FILE", tmp_path / "records.jsonl")
    monkeypatch.setattr(transformers_table, "SPEEDS", tmp_path / "speeds.jsonl")
    monkeypatch.setattr(sst2, "batches", lambda split, **_: [])  # random scores look at none


@pytest.mark.parametrize(("share", "left"), [(0.2, 6), (0.4, 5), (0.6, 3)])
def test_the_asked_share_of_all_heads_goes_and_nothing_else(share: float, left: int) -> None:
    plan = bench.fewer_heads("random", share, 0)
    heads = [g for g in plan.structure.free if g.kind == "head"]
    assert sum(len(kept(plan, g)) for g in heads) == left and min(len(kept(plan, g)) for g in heads) >= 1
    assert set(plan.keep) <= {g.name for g in heads}


@pytest.mark.parametrize("per", bench.PER)
def test_the_encoder_has_two_fifths_of_its_parameters_at_most(per: str) -> None:
    plan = bench.smaller_encoder("magnitude", 0, per)
    whole, small = (models.sizes(p)["encoder"] for p in (Plan(plan.structure), plan))
    assert 0.2 * whole < small <= 0.4 * whole


def test_the_table_has_means_and_spreads(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"params": 50, "macs": 10**6}
    records.once(
        transformers_table.FILE,
        {"task": "sst2", "what": "original"},
        lambda: {"after": {"accuracy": 91.0}, "params": 100, "macs": 2 * 10**6},
    )
    for seed, accuracy in enumerate((80.0, 82.0)):
        key = {"task": "sst2", "what": "heads", "method": "michel", "share": 0.6, "seed": seed}
        row = {"before": {"accuracy": 70.0}, "after": {"accuracy": accuracy}, **sizes}
        records.once(transformers_table.FILE, key, lambda row=row: row)
        records.once(transformers_table.FILE, {**key, "method": "mask_curvature"}, lambda row=row: {**row, "before": {"accuracy": 71.5}})
    speed = {"ratio1": [0.7, 0.75, 0.8], "ratio16": [0.6, 0.65, 0.7]}
    records.once(transformers_table.SPEEDS, {"task": "sst2", "model": "heads-michel-0.6-0"}, lambda: speed)
    transformers_table.table()
    lines = capsys.readouterr().out.splitlines()
    assert "**sst2**: 91.00 %, 100 parameters, 2.0 M MACs" in lines
    assert "| heads | michel | 2 | +1.50 | – | +0.00 |" in lines
    assert "| 60% | michel | 2 | 50.0% | 50.0% | 70.00 ± 0.00 | – | 81.00 ± 1.00 | 0.75 (0.70–0.80) | 0.65 (0.60–0.70) |" in lines


def test_the_documentation_has_the_tables_of_the_records(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_table, "FILE", models.FILE)
    monkeypatch.setattr(transformers_table, "SPEEDS", models.SPEEDS)
    transformers_table.table()
    page = (Path(models.__file__).parent.parent / "docs" / "transformers.md").read_text()
    assert capsys.readouterr().out.strip() in page
