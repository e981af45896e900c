"""Recipes whose models take keyword inputs, from the command line to the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import text_recipe
import torch
import zoo
from test_cli import in_no_time, refused, typed
from torch import Tensor
from torch.utils._pytree import tree_map

from curvepress.export import compare_latency, to_onnx
from curvepress.export.running import Running
from curvepress.plan import from_json, kept
from curvepress.quantization.quantized import Bits, calibrate, layout, packed, quantize, sites, sums_in_float
from curvepress.runs.recipe import load_recipe
from curvepress.scores import score
from curvepress.stages import pipeline
from curvepress.stages import quantizing as quantization
from curvepress.tracing.watching import trace

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, by the real exporters; its recipe lies above."""
    home = tmp_path_factory.mktemp("text")
    task = shutil.copy(HERE / "text_recipe.py", home / "task.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "compare_latency", in_no_time)
        said = typed("compress", task, "--params", 0.7, "--whole", "embedding", "--aligned", "--samples", 4, "--out", home / "run")
    assert said.code == 0, said
    return home / "run"


@pytest.mark.parametrize(("method", "options"), [("gate_gradient", {}), ("mask_curvature", {"estimator": "exact"})])
def test_scores_of_padded_sentences_are_those_of_the_sentences_alone(method: str, options: dict[str, str]) -> None:
    model, batches = text_recipe.model().double(), text_recipe.batches("calibration")[:2]
    structure = trace(model, text_recipe.example())
    alone = []
    for given, targets in batches:
        for n, length in enumerate(given["attention_mask"].sum(1).tolist()):
            alone.append(({k: v[n : n + 1, :length] for k, v in given.items()}, targets[n : n + 1]))
    padded, single = (score(model, text_recipe.loss, b, structure, method=method, **options).values for b in (batches, alone))
    for name, values in single.items():
        np.testing.assert_allclose(padded[name], values, rtol=1e-9, atol=1e-12)


def test_a_run_from_keyword_inputs_to_the_report(run: Path) -> None:
    assert (run / "report.html").exists() and (run / "model.onnx").exists()
    plan = from_json((run / "plan.json").read_text())
    widths = {g.kind: len(kept(plan, g)) for g in plan.structure.free}
    assert plan.keep and widths["embedding"] == text_recipe.WIDTH and widths["query-key"] == widths["value"]


def test_padding_does_not_change_what_the_compressed_model_says(run: Path) -> None:
    recipe = load_recipe(str(run.parent / "task.py"))
    small = pipeline.Desk(pipeline.Run(run, recipe.name, {}, {}), recipe).compressed("model.safetensors")
    given = text_recipe.sentences(3, 7)
    longer = {k: torch.cat([v, torch.zeros(3, 4, dtype=torch.long)], 1) for k, v in given.items()}
    torch.testing.assert_close(small(**longer), small(**given), rtol=1e-5, atol=1e-6)


def test_the_file_takes_any_number_of_sentences_of_any_length(tmp_path: Path) -> None:
    model, path = text_recipe.model(), tmp_path / "model.onnx"
    agreement = to_onnx(model, text_recipe.example(), path)
    assert (agreement.batch, agreement.lengths) == ("dynamic", (6, 9))
    running, other = Running(path, model, text_recipe.example()), text_recipe.sentences(7, 3, length=12)
    torch.testing.assert_close(running(**other), model(**other), rtol=1e-4, atol=1e-5)
    swapped = dict(reversed(other.items()))  # names count, not their order
    torch.testing.assert_close(running(**swapped), model(**other), rtol=1e-4, atol=1e-5)
    arrays = tree_map(Tensor.numpy, text_recipe.example())
    assert [t.batch for t in compare_latency({"a": path}, arrays, rounds=1, batches=(1, 3), seconds=0.01)] == [1, 3]
    with pytest.raises(ValueError, match=r"takes 2 inputs \(input_ids, attention_mask\), the example has 1 \(input_ids\)"):
        compare_latency({"a": path}, {"input_ids": np.zeros((1, 3), np.int64)})


def test_a_model_that_holds_its_length_takes_no_other(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(20, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids).reshape(-1, 20))

    agreement = to_onnx(Fixed(), {"ids": torch.arange(10).reshape(2, 5) % 9}, tmp_path / "model.onnx")
    assert (agreement.batch, agreement.lengths) == ("dynamic", (5,))


BAD = {
    "{}": "an empty tuple|a dict of 0",
    "{'input_ids': 3}": "a dict of 1: input_ids int",
    "{'not a name': torch.ones(2, 3)}": "a dict of 1: not a name",
    "({'a': torch.ones(2, 3)}, torch.ones(2, 3))": "a dict of 1",
    "{'a': torch.ones(())}": "a dict of 1: a",
}


@pytest.mark.parametrize(("given", "seen"), BAD.items())
def test_an_example_that_is_none_is_refused(tmp_path: Path, given: str, seen: str) -> None:
    source = (HERE / "text_recipe.py").read_text().replace("return sentences(2, 0)", f"return {given}")
    (tmp_path / "task.py").write_text(source)
    with pytest.raises(ValueError, match=rf"example\(\) must return a tensor, a dict of tensors .*got .*({seen})"):
        load_recipe(str(tmp_path / "task.py")).inputs()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--whole", "heads"), "whole: 'heads' is no kind and no name of a group; the kinds are embedding, head"),
        (("--whole", "*"), "with * whole nothing is left to be cut"),
    ],
)
def test_what_is_to_stay_whole_is_checked_before_the_work(run: Path, tmp_path: Path, options: tuple[str, ...], why: str) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    assert why in refused("plan", folder, "--params", 0.7, *options)


def test_aligned_is_refused_where_there_is_nothing_to_align(tmp_path: Path) -> None:
    task = shutil.copy(HERE / "tiny_recipe.py", tmp_path / "task.py")
    said = refused("compress", task, "--params", 0.5, "--aligned", "--out", tmp_path / "run")
    assert "--aligned has nothing to hold equal" in said and "leave it out" in said


def test_the_compressed_reader_is_quantized_and_takes_sentences_of_any_length(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "compare_latency", in_no_time)
    said = typed("quantize", run, "--average", 6, "--rounding", "adaptive", "--epochs", 1)
    assert said.code == 0, said
    folder = run / "quantized"
    found = json.loads((folder / "quantized.json").read_text())
    assert found["agreement"]["same"] >= 99.5 and found["agreement"]["kernels"]["integer"] == found["agreement"]["kernels"]["total"]
    assert [s["name"] for s in found["sites"] if s["bits"] is None] == ["add", "out", "add_1", "norm", "up", "down", "add_2"]
    recipe = load_recipe(str(run.parent / "task.py"))
    small = quantization.float_model(pipeline.Desk(pipeline.Run(folder, recipe.name, {}, {}), recipe))
    module = packed.load(small, recipe.inputs(), folder / "quantized.safetensors")
    other = dict(reversed(text_recipe.sentences(7, 3, length=12).items()))  # names count, not their order
    with torch.no_grad():
        wanted, rounded = small(**other), module(**other)
        torch.testing.assert_close(Running(folder / "quantized.onnx", module, *recipe.inputs())(**other), rounded, rtol=1e-3, atol=1e-3)
    assert 0 < float((rounded - wanted).norm() / wanted.norm()) < 0.3


def test_sums_stay_in_float_where_products_are_not_of_convolutions() -> None:
    found = sums_in_float(layout(quantize(text_recipe.model(), Bits(), text_recipe.example())))
    assert found == ("add", "out", "add_1", "norm", "up", "down", "add_2")
    images = zoo.make("resnet_padded")
    assert sums_in_float(layout(quantize(images.model.float(), Bits(), torch.randn(2, 3, 8, 8)))) == ()


def test_a_mask_in_float_is_added_to_scores_as_it_is() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.project(x)
            hidden = (1.0 - mask[:, None].float()) * torch.finfo(torch.float32).min
            return torch.softmax(y @ y.mT + hidden, -1) @ y

    model, given = Masked().eval(), {"x": torch.randn(4, 6, 8), "mask": (torch.arange(6) < torch.tensor([[6], [4], [3], [1]])).long()}
    module = calibrate(quantize(model, Bits(), given), [(given, None)]).eval()
    assert [s.name for s in sites(module)] == ["x", "project", "softmax"]
    with torch.no_grad():
        torch.testing.assert_close(module(**given), model(**given), rtol=0.05, atol=0.05)
