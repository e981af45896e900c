"""``curvepress quantize`` as people use it, and the rounding of weights layer by layer."""

import json
import shutil
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvepress.commands import cli
from curvepress.export.onnx import to_onnx
from curvepress.export.running import Running
from curvepress.quantization.quantized import Bits, bits_from_json, calibrate, layout, observe, packed, quantize
from curvepress.quantization.quantized.modules import WeightQuantizer, quantizers
from curvepress.quantization.quantizer import Scheme, fake_quantize, fit_grid
from curvepress.quantization.requantization import requantize
from curvepress.quantization.rounding import gram_linear, output_error
from curvepress.runs.folder import QUANTIZATION, open_run
from curvepress.stages import quantizing as quantization
from curvepress.stages import sessions
from curvepress.training.fitting import Fitted
from tests.test_cli import TINY, as_one_file, in_no_time, refused, typed

FILES = {name for flow in QUANTIZATION.values() for name in flow.writes}
ALSO = {name for flow in QUANTIZATION.values() for name in flow.extra}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return Path(shutil.copy(TINY, tmp_path / "task.py"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "compare_latency", in_no_time)


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quantized.json").read_text())


def test_digits_from_the_recipe_to_integers_in_the_runtime(tmp_path: Path):
    folder = tmp_path / "run"
    also = [f"--export={name}" for name in ("pt2", *(["openvino"] if find_spec("openvino") else []))]
    asked = ("quantize", "digits", "--average", "3", "--rounding", "adaptive", *also, "--out", folder)
    said = typed(*asked)
    assert said.code == 0, said
    assert "9 of 9 convolutions integer" in said.out and "layer3.conv2.weight" in said.out
    found = facts_of(folder)
    assert {p.name for p in folder.iterdir()} == FILES | ALSO | {"run.json"}
    assert found["others"]["pt2"]["same"] == 100 and all(o["same"] >= 99 for o in found["others"].values())
    assert found["others"].get("openvino", {"integer": {}})["integer"] == found["others"].get("openvino", {"total": {}})["total"]
    assert found["choice"]["average"] <= 3.0
    assert found["validation"]["onnxruntime"]["accuracy"] == pytest.approx(found["validation"]["calibrated"]["accuracy"], abs=0.3)
    assert found["validation"]["calibrated"]["accuracy"] > found["validation"]["float"]["accuracy"] - 2
    assert found["bytes"]["quantized.safetensors"] < found["bytes"]["float weights"] / 9
    assert found["agreement"]["same"] >= 99.5
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert typed(*asked).out.count("done before") == len(QUANTIZATION)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_packed_file_is_the_model_that_was_tested(recipe: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert typed("quantize", recipe, "--bits", "4", "--activations", "6", "--epochs", "2", "--lr", "0.01", "--out", folder).code == 0
    found, task = facts_of(folder), cli.load_recipe(str(recipe))
    model = packed.load(task.build(trained=False), task.inputs(), folder / "quantized.safetensors")
    assert task.metrics(model, "validation") == pytest.approx(found["validation"][found["kept"]])
    assert {row["bits"] for row in found["weights"]} == {4} and found["choice"]["average"] == 4
    bits = bits_from_json((folder / "bits.json").read_text())
    assert all(bits.of_site(s) == (6 if s.role == "product" else 8) for s in layout(model).sites)
    history = json.loads((folder / "quantization.json").read_text())
    assert [e["epoch"] for e in history["epochs"]] == [1, 2] and not (folder / "checkpoints").exists()


def test_training_that_makes_it_worse_is_not_kept(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spoilt(model: nn.Module, *_: Any, **__: Any) -> Fitted:
        worse = deepcopy(model)
        with torch.no_grad():
            worse.get_parameter("4.bias").sub_(torch.tensor([0.0, 0.0, 50.0]))
            worse.get_parameter("4.bias").sub_(torch.tensor([0.0, 50.0, 0.0]))
        return Fitted(worse.eval(), ())

    monkeypatch.setattr(quantization, "fit", spoilt)
    folder = tmp_path / "run"
    assert typed("quantize", recipe, "--epochs", "1", "--out", folder).code == 0
    found = facts_of(folder)
    assert found["kept"] == "calibrated" and found["validation"]["trained"]["accuracy"] < found["validation"]["calibrated"]["accuracy"]
    assert found["validation"]["onnxruntime"]["accuracy"] == pytest.approx(found["validation"]["calibrated"]["accuracy"], abs=2)


def test_interrupted_it_goes_on_to_the_same_files(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ("quantize", recipe, "--average", "4", "--epochs", "2", "--out")
    assert typed(*asked, whole).code == 0

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packed, "save", stopped)
        assert typed(*asked, cut).code == 130
    assert list(open_run(cut).stages) == ["load", "price", "choose"] and (cut / "checkpoints").exists()
    said = typed(*asked, cut)
    assert said.code == 0 and said.out.count("done before") == 3
    same = ("bits.json", "prices.json", "quantized.safetensors", "quantization.json", "quantized.onnx")
    assert {n: (cut / n).read_bytes() for n in same} == {n: (whole / n).read_bytes() for n in same}


def test_the_compressed_model_of_a_run_is_quantized_in_its_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(sessions.run_stage.__globals__["quantization"], "compare_latency", in_no_time)
        patch.setitem(sessions.run_stage.__globals__, "to_onnx", as_one_file)
        patch.setitem(sessions.run_stage.__globals__, "compare_latency", in_no_time)
        assert typed("compress", recipe, "--params", "0.6", "--out", tmp_path / "run").code == 0
    assert typed("quantize", tmp_path / "run").code == 0
    found = facts_of(tmp_path / "run" / "quantized")
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert found["validation"]["float"] == history["validation"]
    assert sum(w["elements"] for w in found["weights"]) < 0.6 * (6 * 12 + 12 * 12 + 12 * 3 + 27)
    assert "leave out --option" in refused("quantize", tmp_path / "run", "--data", "x")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"other")
    assert "model.safetensors is not as it was written" in refused("quantize", tmp_path / "run", "--out", tmp_path / "new")


def test_other_settings_are_refused_by_name_and_again_does_what_they_touch(recipe: Path, tmp_path: Path):
    folder = tmp_path / "run"
    asked = ("quantize", recipe, "--out", folder, "--average")
    assert typed(*asked, "4").code == 0
    assert "stage 'choose' was done otherwise (average was 4.0, now 5.0)" in refused(*asked, "5")
    assert typed(*asked, "5", "--again").out.count("done before") == 2
    (folder / "mine.json").write_text((folder / "bits.json").read_text().replace('"weight": 8', '"weight": 7'))
    assert typed("quantize", recipe, "--out", tmp_path / "other", "--bits-file", folder / "mine.json").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4", "--average", "3"), "more than one way (--bits, --average)"),
        (("--average", "1.5"), "--average must be from 2 to 8"),
        (("--average", "2", "--float", "0.weight"), "the fewest bits allowed take"),
        (("--bytes", "0.01"), "the fewest bits allowed take 63 bytes, 2.00 bits a weight"),
        (
            ("--average", "7", "--target", "onnxruntime", "--float", "nothing"),
            "'nothing' cannot stay in float: the model has 0.weight, 1, 2.weight",
        ),
        (("--activations", "4", "--activations", "8"), "leaves a choice, which only --bops limits"),
        (("--export", "tflite"), "there is no format tflite to export to; choose of onnx, openvino, pt2"),
        (("--bits", "3", "--target", "onnxruntime"), "0.weight has 3 bits, for which onnxruntime has no kernel, only for 4 and 8"),
        (("--rise", "-0.1"), "--rise is a rise of the loss above 0"),
        (("--activations", "9"), "--activations must be from 2 to 8 bits; got 9"),
        (("--bits-file", "nowhere.json"), "--bits-file nowhere.json cannot be read"),
        (("--epochs", "1", "--lr", "-1"), "the fine-tune cannot be done so"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence_before_any_work(recipe: Path, tmp_path: Path, options: tuple[str, ...], message: str):
    assert message in refused("quantize", recipe, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run" / "prices.json").exists()


def test_bad_data_and_bad_files_are_refused_by_name(recipe: Path, tmp_path: Path):
    assert "say where the result goes" in refused("quantize", recipe)
    (tmp_path / "bits.json").write_text('{"version": 1, "weight": 9}')
    assert "weight cannot have 9 bits" in refused("quantize", recipe, "--out", tmp_path / "a", "--bits-file", tmp_path / "bits.json")
    text, labels = recipe.read_text(), "return x, (x[:, :3].sum(1) > 0).long() + (x[:, 3] > 0).long()"
    recipe.write_text(text.replace(labels, "return x, torch.zeros(64, dtype=torch.long)"))
    assert "sorted by class; shuffle it with a seed" in refused("quantize", recipe, "--out", tmp_path / "b")
    recipe.write_text(text.replace(labels, labels.replace("return x,", "return x * 0,")))
    assert "input_1 was 0 throughout" in refused("quantize", recipe, "--out", tmp_path / "c")


def test_a_file_answers_in_the_form_of_its_model(tmp_path: Path):
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(x), "twice": 2 * x}

    model, x = Answers().eval(), torch.randn(4, 3)
    to_onnx(model, x, tmp_path / "a.onnx")
    found = Running(tmp_path / "a.onnx", model, x)(x[:3])
    with torch.no_grad():
        torch.testing.assert_close(found, model(x[:3]))


class Chain(nn.Module):
    """Two layers, the second a product by columns, as GPT-2 has them; a weight that two operators read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(6, 8), nn.Linear(8, 8)
        self.columns = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.tied(self.tied(torch.relu(self.first(x))))) @ self.columns


@pytest.fixture
def chain() -> tuple[nn.Module, list[tuple[Tensor, None]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = torch.randn(6, 6)
        return Chain().eval(), [(torch.randn(64, 6) @ mixed, None) for _ in range(2)]


@pytest.mark.parametrize("method", ["compensated", "adaptive"])
def test_rounding_layer_by_layer_changes_outputs_less(chain: tuple[nn.Module, list[tuple[Tensor, None]]], method: str):
    model, data = chain
    module = quantize(model, Bits(weight=3), data[0][0])
    seen = observe(module, data)
    calibrate(module, seen)
    before = {q.name: (module.get_parameter(q.name).detach().clone(), q.grid) for q in quantizers(module) if isinstance(q, WeightQuantizer)}
    left = requantize(module, data, method=method)
    calibrate(module, seen)
    assert left == ("tied.weight",)
    on_grid = {q.name: (module.get_parameter(q.name).detach(), q) for q in quantizers(module) if isinstance(q, WeightQuantizer)}
    for name in ("first.weight", "columns"):
        weight, quantizer = on_grid[name]
        torch.testing.assert_close(fake_quantize(weight, quantizer.grid), weight)
        assert not torch.equal(weight, fake_quantize(*before[name]))
    assert torch.equal(on_grid["tied.weight"][0], before["tied.weight"][0])
    entered = torch.cat([x for x, _ in data])
    levels = calibrate(quantize(model, Bits(weight=3), data[0][0]), seen)
    site = next(q for q in quantizers(levels) if q.name == "x")
    gram = gram_linear(fake_quantize(entered, site.grid))
    nearest = output_error(fake_quantize(*before["first.weight"]) - before["first.weight"][0], gram)
    assert output_error(on_grid["first.weight"][0] - before["first.weight"][0], gram) < nearest
    with torch.no_grad():
        apart = [float((m(entered) - model(entered)).square().mean()) for m in (module, levels.eval())]
    assert apart[0] < apart[1]


def test_scales_can_weigh_errors_by_what_weights_are_multiplied_with(chain: tuple[nn.Module, list[tuple[Tensor, None]]]):
    model, data = chain
    module = quantize(model, Bits(weight=3), data[0][0])
    calibrate(module, data)
    site, wanted = next(q for q in quantizers(module) if q.name == "x"), model.first.weight.detach()
    entered = fake_quantize(torch.cat([x for x, _ in data]), site.grid)
    assert requantize(module, data, method="weighted") == ("tied.weight",)
    grid = fit_grid(wanted, Scheme(3, axis=0), weights=entered.square().sum(0).expand(wanted.shape))
    torch.testing.assert_close(module.get_parameter("first.weight").detach(), fake_quantize(wanted, grid))
    columns = next(q for q in quantizers(module) if q.name == "columns")
    assert columns.grid.scheme.axis == 1 and columns.grid.scale.shape == (5,)


def test_rounding_to_the_nearest_changes_nothing_and_unknown_ones_are_refused(chain: tuple[nn.Module, list[tuple[Tensor, None]]]):
    model, data = chain
    module = calibrate(quantize(model, Bits(weight=3), data[0][0]), data)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    requantize(module, data, method="nearest")
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    with pytest.raises(ValueError, match="rounding 'up' is unknown; choose one of nearest, weighted, compensated, adaptive"):
        requantize(module, data, method="up")
    with pytest.raises(ValueError, match="no batches"):
        requantize(module, [])
