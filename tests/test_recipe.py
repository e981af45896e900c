"""Laws of recipes: what a user's file may hold, and the one sentence that says what is wrong with it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from curvepress.runs.recipe import Recipe, check, load_recipe

TINY = (Path(__file__).parent / "tiny_recipe.py").read_text()


@pytest.fixture(autouse=True)
def imports(monkeypatch: pytest.MonkeyPatch):
    """Recipes may put their folder on the path of imports; it is taken off again, with what was found there."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - known:
        if name.startswith(("recipe_", "helper")):
            del sys.modules[name]


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    """The tiny recipe with pieces of its text exchanged."""
    text = TINY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "task.py").write_text(text)
    return folder / "task.py"


def tried(path: Path, **options: str) -> Recipe:
    """The recipe, once the first stage would accept it."""
    recipe = load_recipe(str(path), options)
    model = recipe.build(trained=True)
    check(recipe, model)
    recipe.inputs()
    recipe.metrics(model, "validation")
    return recipe


def test_a_good_recipe_passes(tmp_path: Path):
    recipe = tried(written(tmp_path), width="8")
    assert recipe.build(trained=True)[0].out_features == 8
    assert recipe.name == str(tmp_path / "task.py")
    assert recipe.recovery == {"epochs": 2, "lr": 0.05}
    assert len(recipe.batches("train")) == 4
    assert not recipe.build(trained=True).training


LOSS = "return F.cross_entropy(output, targets)"
PAIRS = "[(x[rows], y[rows]) for rows in order.split(16)]"
MADE = "    return network"
SPOILT = [
    ("def example()", "def example(", r"SyntaxError: .*task.py, line \d+"),
    (
        "import torch\n",
        "import torch\nimport absent_module\n",
        r"ModuleNotFoundError: No module named 'absent_module' .line \d+ of task.py",
    ),
    ("import torch\n", "import sys\nimport torch\nsys.exit(0)\n", "the file failed: SystemExit"),
    ("def evaluate", "def assess", r"lacks evaluate\(\)"),
    ("def batches(split: str, seed: int = 0)", "def batches(split: str)", r"batches must take \(split, seed=0\).* 'seed'"),
    ("def evaluate(model: nn.Module, split: str)", "def evaluate(model, split, top)", r"evaluate must take \(model, split\).*'top'"),
    ("def example()", "def example(size)", r"example must take \(\).*'size'"),
    ("RECOVERY = {", "RECOVERY = 3, {", "RECOVERY must be a dict .* got tuple"),
    (MADE, "    return None", r"model\(\) must return a torch.nn.Module; got NoneType"),
    (MADE, "    return undefined", r"model\(\) failed: NameError: name 'undefined' is not defined \(line \d+ of task.py\)"),
    (MADE, "    return network.requires_grad_(False)", "no parameter of the model requires gradients"),
    (MADE, "    network[0].weight.data[0, 0] = torch.nan\n    return network", "0.weight of the model holds NaN"),
    (LOSS, "return F.cross_entropy(output, targets, reduction='none')", r"must be a scalar tensor .* got of shape \(16,\)"),
    (LOSS, "return 1.5", "must be a scalar tensor .* got of type float"),
    (LOSS, "return F.cross_entropy(output, targets + 7)", r"Target \d+ is out of bounds.*line \d+ of task.py.* do the labels fit"),
    (LOSS, "return {}['key']", r"KeyError: 'key' .line \d+ of task.py"),
    (LOSS, "return F.cross_entropy(output.detach(), targets)", "gradients do not reach the weights; look for no_grad"),
    (LOSS, "return output.sum() * torch.inf", "the loss of a batch is -?inf"),
    ("return x, (x", "return x / 0, (x", "the first calibration batch holds NaN or infinity"),
    ("torch.randn(64, 6", "torch.randn(64, 7", r"inputs \(16, 7\) torch.float32: the model does not run on it: RuntimeError"),
    (PAIRS, "[(x[rows], y[rows], 1) for rows in order.split(16)]", r"pairs \(inputs, targets\); got a tuple of 3: \(16, 6\) torch.float32"),
    (PAIRS, "[x[rows] for rows in order.split(16)]", r"pairs \(inputs, targets\); got \(16, 6\) torch.float32"),
    (PAIRS, "[]", r"batches\('calibration'\) is empty"),
    (PAIRS, "[(x, y)] if split != 'train' else []", r"batches\('train'\) is empty"),
    (PAIRS, "[(x[:0], y[:0])]", r"counts one or more examples; got \(0, 6\)"),
    (PAIRS, "[(3, y)]", "counts one or more examples; got int"),
    (PAIRS, "None", r"batches\('calibration'\) failed: TypeError"),
    (PAIRS, "(1 / 0 for _ in range(3))", r"batches\('calibration'\) failed: ZeroDivisionError: division by zero \(line \d+ of task.py\)"),
    (
        "return torch.randn(2, 6",
        "return 3, torch.randn(2, 6",
        r"example\(\) must return a tensor, a dict of tensors.* got int, .2, 6. torch.float32",
    ),
    ("return torch.randn(2, 6", "return () and torch.randn(2, 6", r"example\(\) must return .* got an empty tuple"),
    ('    return {"accuracy"', '    {"accuracy"', r"evaluate\(\) must return a dict .* got None for 'validation'"),
    ('    return {"accuracy": 100', '    return 91.7\n    return {"accuracy": 100', r"evaluate\(\) must return a dict .* got 91.7"),
    ('    return {"accuracy": 100', '    return {}\n    return {"accuracy": 100', r"evaluate\(\) must return a dict .* got {}"),
    ('{"accuracy": 100', '{"accuracy": torch.nan', r"evaluate\(\) returned accuracy = nan for 'validation'; it must be a finite number"),
    ('{"accuracy": 100', '{"accuracy": "91" or 100', "returned accuracy = '91'"),
    ('{"accuracy": 100', '{"accuracy": x or 100', r"evaluate\(\) failed: RuntimeError: .*line \d+ of task.py"),
]


@pytest.mark.parametrize(("old", "new", "message"), SPOILT, ids=[m for _, _, m in SPOILT])
def test_a_spoilt_recipe_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, message: str):
    path = written(tmp_path, (old, new))
    with pytest.raises(ValueError, match=message) as caught:
        tried(path)
    assert "task.py" in str(caught.value) and "\n" not in str(caught.value)


def test_the_line_that_failed_is_named(tmp_path: Path):
    path = written(tmp_path, (LOSS, "return undefined"))
    line = path.read_text().splitlines().index("    return undefined") + 1
    with pytest.raises(ValueError, match=rf"NameError: name 'undefined' is not defined \(line {line} of task.py\)"):
        tried(path)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no recipe at .*absent.py; give the path .* digits"):
        load_recipe(str(tmp_path / "absent.py"))
    with pytest.raises(ValueError, match=r"recipe 'absent' is unknown; .* digits"):
        load_recipe("absent")


def test_shipped_recipes_explain_themselves_and_others_are_shown_with_their_fault(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^digits: split must be one of"):
        load_recipe("digits").batches("tomorrow")
    own = written(tmp_path, (MADE, "    raise ValueError('no weights')"))
    with pytest.raises(ValueError, match=r"task.py: model\(\) failed: ValueError: no weights \(line"):
        load_recipe(str(own)).build(trained=True)


@pytest.mark.parametrize("option", ["depth", "seed", "trained", "split"])
def test_an_option_that_no_function_takes_is_refused(tmp_path: Path, option: str):
    with pytest.raises(ValueError, match=rf"has no option '{option}'; its options are width"):
        load_recipe(str(written(tmp_path)), {option: "1"})


def test_options_arrive_as_python_writes_them_or_as_text(tmp_path: Path):
    path = written(
        tmp_path,
        (MADE, "    network.seen = (width, tag, share, on)\n    return network"),
        ("width: int = 12)", "width=12, tag='', share=0.0, on=False)"),
    )
    recipe = load_recipe(str(path), {"width": "8", "tag": "a=b", "share": "0.5", "on": "True"})
    assert recipe.build(trained=True).seen == (8, "a=b", 0.5, True)


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path):
    recipe = load_recipe(str(written(tmp_path)))
    recipe = Recipe(
        **{**vars(recipe), "functions": {**recipe.functions, "evaluate": lambda m, s: {"a": np.float32(0.5), "b": torch.tensor(2), "c": 1}}}
    )
    assert recipe.metrics(nn.Linear(1, 1), "test") == {"a": 0.5, "b": 2.0, "c": 1.0}


def test_a_model_that_evaluate_leaves_in_training_mode_is_put_back(tmp_path: Path):
    recipe = load_recipe(
        str(written(tmp_path, ("    x, y = data(split)\n    with", "    x, y = data(split)\n    model.train()\n    with")))
    )
    model = recipe.build(trained=True)
    recipe.metrics(model, "test")
    assert not model.training


def test_streams_stay_without_a_length_and_are_new_each_time(tmp_path: Path):
    recipe = load_recipe(str(written(tmp_path, (PAIRS, "((x[rows], y[rows]) for rows in order.split(16))"))))
    stream = recipe.batches("train")
    assert not hasattr(stream, "__len__")
    assert len(list(stream)) == 4 == len(list(recipe.batches("train")))


def test_a_recipe_may_import_files_beside_it_and_define_dataclasses(tmp_path: Path):
    (tmp_path / "helper.py").write_text("from helper_too import WIDTH\n")
    (tmp_path / "helper_too.py").write_text("WIDTH = 5\n")
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n\nimport torch\nfrom helper import WIDTH\n"
    held = "@dataclass\nclass Held:\n    x: int\n\n\ndef model"
    path = written(tmp_path, ("import torch\n", head), ("def model", held), ("width: int = 12", "width: int = WIDTH"))
    path.write_text(path.read_text().split('"""', 2)[2].lstrip())
    assert load_recipe(str(path)).build(trained=True)[0].out_features == 5


def test_the_fingerprint_is_of_the_code_that_runs_and_of_nothing_else(tmp_path: Path):
    (tmp_path / "helper.py").write_text("WIDTH = 5\n")
    path = written(tmp_path, ("import torch\n", "import helper\nimport torch\n"))
    first = load_recipe(str(path)).digest
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    assert load_recipe(str(path)).digest == first
    (tmp_path / "helper.py").write_text("WIDTH = 6\n")
    assert load_recipe(str(path)).digest != first


def test_the_file_runs_as_it_is_now_and_leaves_no_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = written(tmp_path)
    assert load_recipe(str(path)).build(trained=True)[0].out_features == 12
    written(tmp_path, ("width: int = 12", "width: int = 14"))  # same size, same second
    assert load_recipe(str(path)).build(trained=True)[0].out_features == 14
    assert [p.name for p in tmp_path.iterdir()] == ["task.py"]
