"""Laws of the files: they hold what was saved, and nothing else is taken for it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from curvepress.plan import Plan
from curvepress.runs.artifacts import (
    StoredSamples,
    fill,
    load,
    load_scores,
    load_structure,
    read_json,
    restore,
    save,
    save_scores,
    save_structure,
)
from curvepress.scores import Scores
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace


class Tied(nn.Module):
    """Tied weights, a buffer that is stored, one that is not, and one that is a view of a weight."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(4, width)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("view", self.first.weight.detach()[:2])
        self.last = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x) + self.second(x))))


def test_a_model_is_read_back_bit_for_bit(tmp_path: Path):
    model, other = Tied(), Tied()
    model(torch.randn(8, 4))  # moves the statistics
    save(model, tmp_path / "model.safetensors")
    assert load(other, tmp_path / "model.safetensors") is other
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.second.weight is other.first.weight
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "second.weight" not in stored and "scratch" not in stored and "view" in stored


def test_saving_is_repeatable_to_the_byte_and_leaves_nothing_else(tmp_path: Path):
    model = Tied()
    save(model, tmp_path / "a")
    save(model, str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_half_precision_and_integers_survive(tmp_path: Path):
    model, other = nn.Linear(3, 2).to(torch.bfloat16), nn.Linear(3, 2).to(torch.bfloat16)
    model.register_buffer("count", torch.tensor(7))
    other.register_buffer("count", torch.tensor(0))
    save(model, tmp_path / "model")
    load(other, tmp_path / "model")
    assert torch.equal(model.weight, other.weight) and other.count == 7


def test_a_compressed_model_is_restored_from_plan_and_file(tmp_path: Path):
    model, x = Tied().eval(), torch.randn(5, 4)
    structure = trace(model, x)
    plan = Plan(structure, {structure.free[0].name: (0, 2, 3)})
    small = apply(model, plan, x).eval()
    save(small, tmp_path / "small")
    again = restore(Tied(), plan, tmp_path / "small", x)
    assert torch.equal(again(x), small(x)) and not again.training


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Tied(8), r"first.weight is \(6, 4\) torch.float32 there and \(8, 4\) torch.float32 in the model"),
        (lambda: Tied().double(), r"first.weight is .* torch.float32 there and \(6, 4\) torch.float64"),
        (lambda: nn.Linear(4, 2), r"weight is missing there and \(2, 4\) torch.float32"),
        (lambda: nn.Sequential(), r"first\..* torch.float32 there and missing in the model"),
    ],
)
def test_a_file_of_another_model_is_refused_and_fills_nothing(tmp_path: Path, other: Callable[[], nn.Module], message: str):
    save(Tied(), tmp_path / "model")
    given = other()
    before = {n: t.clone() for n, t in given.state_dict().items()}
    with pytest.raises(ValueError, match=rf"model holds another model: {message}"):
        load(given, tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        fill(given, Tied())
    assert all(torch.equal(t, before[n]) for n, t in given.state_dict().items())


def test_filling_takes_the_tensors_of_the_other():
    model, other = Tied(), Tied()
    assert fill(model, other) is model
    assert torch.equal(model.first.weight, other.first.weight)
    with torch.no_grad():
        other.first.weight.zero_()
    assert model.first.weight.any()


def exploit(mark: Path) -> bytes:
    """A pickle that makes a folder when it is read."""
    return f"cos\nmkdir\n(V{mark}\ntR.".encode()


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    spoilt = {
        "truncated": content[:-5],
        "short": content[:20],
        "empty": b"",
        "text": b"weights",
        "long header": b"\xff" * 8 + content[8:],
        "pickle": exploit(path.with_name("executed")),
    }
    path.write_bytes(spoilt[how])


@pytest.mark.parametrize("how", ["truncated", "short", "empty", "text", "long header", "pickle"])
def test_a_damaged_or_foreign_file_is_refused_and_never_executed(tmp_path: Path, how: str):
    save(Tied(), tmp_path / "model")
    spoil(tmp_path / "model", how)
    with pytest.raises(ValueError, match=r"model is damaged or no safetensors file"):
        load(Tied(), tmp_path / "model")
    assert not (tmp_path / "executed").exists()


def test_safetensors_of_others_are_refused(tmp_path: Path):
    safetensors.torch.save_file(Tied().last.state_dict(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"model is no curvepress model: its format is None"):
        load(Tied(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"absent is missing"):
        load(Tied(), tmp_path / "absent")


SCORES = Scores(
    {"a": np.array([1.0, np.pi]), "b": np.array([0.1])}, {"a": np.zeros(2), "b": np.ones(1)}, "taylor", "rise of the loss", 3, 4
)


def test_scores_and_structures_are_read_back_equal(tmp_path: Path):
    save_scores(SCORES, tmp_path)
    assert load_scores(tmp_path) == SCORES
    structure = trace(Tied(), torch.randn(2, 4))
    save_structure(structure, tmp_path / "structure.json")
    assert load_structure(tmp_path / "structure.json") == structure


def test_samples_are_a_mapping_that_stays(tmp_path: Path):
    held, again = (StoredSamples(tmp_path / "new") for _ in range(2))
    assert 3 not in held and list(held) == []
    held[10], held[3] = {"a": np.array([1.0, np.pi])}, {"a": np.zeros(2), "b": np.ones(1)}
    assert list(again) == [3, 10] and len(again) == 2
    assert again[10]["a"].tobytes() == np.array([1.0, np.pi]).tobytes() and list(again[3]) == ["a", "b"]
    del held[3]
    assert 3 not in again
    spoil(tmp_path / "new" / "10.safetensors", "truncated")
    with pytest.raises(ValueError, match=r"10.safetensors is damaged"):
        again[10]


def test_scores_that_do_not_belong_together_are_refused(tmp_path: Path):
    save_scores(SCORES, tmp_path)
    about = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").write_text(json.dumps({**about, "groups": ["a", "c"]}))
    with pytest.raises(ValueError, match=r"the scores in .* are damaged: 'values/c' is missing; make them again with `curvepress score`"):
        load_scores(tmp_path)
    save(Tied(), tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"scores.safetensors is no curvepress scores: its format is 'curvepress model'"):
        load_scores(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"format": "x"} more'])
def test_json_that_is_damaged_is_refused(tmp_path: Path, text: str):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=r"file.json is damaged: .*; delete it and run the stage that makes it"):
        read_json(tmp_path / "file.json", {"format": "x"})


def test_json_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "file.json").write_text('{"format": "x", "version": 2, "a": 1}')
    assert read_json(tmp_path / "file.json", {"format": "x", "version": 2}) == {"a": 1}
    with pytest.raises(
        ValueError, match=r"another kind of file: expected {'format': 'x', 'version': 1}, found {'format': 'x', 'version': 2}"
    ):
        read_json(tmp_path / "file.json", {"format": "x", "version": 1})
    (tmp_path / "file.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"file.json is damaged"):
        read_json(tmp_path / "file.json", {})
