"""The architecture as a test: who may import whom, and what only some modules may do."""

import ast
import graphlib
from pathlib import Path

import pytest

from scripts import house

# Module or package of curvepress: those of curvepress that it may import besides itself.
TABLE = {
    "structure": "",
    "objective": "",
    "files": "",
    "metering": "",
    "solver": "",
    "bitplan": "",
    "implants": "structure",
    "plan": "structure implants bitplan",
    "latency": "structure",
    "costs": "structure plan bitplan latency",
    "curvature": "objective",
    "training": "objective files",
    "tracing": "objective structure plan",
    "surgery": "objective structure implants plan tracing",
    "scores": "objective structure plan curvature tracing",
    "quantization": "objective files solver bitplan curvature tracing",
    "export": "objective quantization",
    "report": "structure plan costs scores",
    "planner": "objective structure implants plan costs latency bitplan solver tracing surgery scores training quantization",
    "repairing": "objective structure plan implants curvature tracing surgery quantization",
    "stopwatch": "files structure plan costs latency tracing export planner",
    "runs": "objective files metering structure plan curvature tracing surgery scores training planner stopwatch",
    "stages": "everything but reproduce commands",
    "reproduce": "everything but commands",
    "commands": "everything",
    "__main__": "commands",
    "__init__": "everything but stages reproduce commands",
}

# What only some may do is said by dotted names within curvepress; that of a package stands for all in it.
ONLY = {
    "torch.utils._python_dispatch": {"tracing.watching", "tracing.operators", "surgery.masking"},
    "curvepress_recipes": set(),  # found by name, never imported
    "importlib.import_module": {"runs.recipe_files"},
    "importlib.util": {"runs.recipe_files"},
    "__import__": set(),
}
WITHOUT_TORCH = {
    "structure",
    "implants",
    "bitplan",
    "plan",
    "latency",
    "costs",
    "report",
    "tracing.algebra",
    "planner.alignment",
    "planner.blocks",
    "planner.channels",
    "planner.exactly",
    "planner.joint",
    "planner.ladders",
    "planner.neighbours",
    "planner.ranks",
    "planner.rounds",
    "planner.sweep",
    "planner.tradeoffs",
}
WRITERS = {
    "files",
    "metering",
    "export",
    "stopwatch",
    "quantization.packing",
    "training.checkpointing",
    "runs.artifacts",
    "runs.folder",
    "stages",
    "reproduce",
    "commands",
}
WRITES = {"print", "open", "write_text", "write_bytes", "savefig", "save_file"}
MODULE_MAKERS = {"surgery.layers", "surgery.rewriting", "quantization.quantized", "export"}

# Whatever is loaded is data, never a program; this holds in every folder.
NEVER = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch.save", "torch.load", "eval", "exec"}

PATHS = house.sources()
PACKAGE = [path for path in PATHS if path.relative_to(house.ROOT).parts[0] == "curvepress"]
EVERYWHERE = house.sources(folders=(*house.FOLDERS, "tests", "docs"))


def unit(module: str) -> str:
    """The row of the table for a dotted module name."""
    return module.split(".")[1] if "." in module else "__init__"


def within(module: str, names: set[str]) -> bool:
    """Whether a dotted module is one of these modules of curvepress, or in one of these packages."""
    return any(f"{module}.".startswith(f"curvepress.{name}.") for name in names)


def forbidden_imports(graph: dict[str, set[str]]) -> list[str]:
    """A sentence for each import that the table does not allow."""
    found = []
    for module, targets in graph.items():
        row = TABLE.get(unit(module), "")
        allowed = {unit(module), *(set(TABLE) - {"commands", "__init__", "__main__"} if row.startswith("everything") else row.split())}
        if row == "everything":
            allowed |= {"__init__"}
        found += [
            f"{module} imports {target}, but may import: {row or 'nothing of ours'}" for target in targets if unit(target) not in allowed
        ]
    return found


def used_names(source: str, package: tuple[str, ...] = ("curvepress",)) -> set[str]:
    """All dotted names that a file imports or mentions, local names written out."""
    tree = ast.parse(source)
    imports = list(house.imported(tree, package))
    local = dict(imports)
    return {name for _, name in imports} | {dotted(node, local) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name))}


def dotted(node: ast.AST, local: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, local)}.{node.attr}"
    return local.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def uses(names: set[str], what: str) -> bool:
    return any(name == what or name.startswith(f"{what}.") for name in names)


def never_allowed(source: str) -> list[str]:
    """What no file may use: formats that run code when read, and code in strings."""
    names = used_names(source)
    keywords = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.keyword)]
    unpickling = any(k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in keywords)
    return sorted(what for what in NEVER if uses(names, what)) + ["allow_pickle"] * unpickling


def not_allowed_here(module: str, source: str) -> list[str]:
    """What ``module`` of curvepress may not use, though others may."""
    names = used_names(source)
    found = [what for what, where in ONLY.items() if not within(module, where) and uses(names, what)]
    if within(module, WITHOUT_TORCH) and uses(names, "torch"):
        found.append("torch")
    if not within(module, WRITERS):
        found += sorted(calls(source) & WRITES)
    if not within(module, MODULE_MAKERS):
        found += [f"class {name}" for name in module_classes(source)]
    return found


def calls(source: str) -> set[str]:
    """The last names of all that a file calls."""
    called = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {dotted(node, {}).rpartition(".")[2] for node in called}


def module_classes(source: str) -> list[str]:
    """Classes of a file that derive from ``nn.Module`` or a layer of torch."""
    tree = ast.parse(source)
    local = dict(house.imported(tree, ("curvepress",)))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return [c.name for c in classes if any(dotted(base, local).startswith(("torch.nn.", "torch.fx.GraphModule")) for base in c.bases)]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_is_in_the_table():
    unknown = {unit(house.module_name(path)) for path in PACKAGE} - set(TABLE)
    assert not unknown, f"new modules {sorted(unknown)}: add a row to TABLE here and to CONTRIBUTING.md"


def test_the_table_names_modules_only():
    named = {name for row in TABLE.values() if not row.startswith("everything") for name in row.split()}
    assert named <= set(TABLE)
    modules = {house.module_name(path) for path in PACKAGE}
    assert {f"curvepress.{name}" for name in set().union(*ONLY.values()) | WITHOUT_TORCH | WRITERS | MODULE_MAKERS} <= modules


def test_imports_follow_the_table():
    assert forbidden_imports(house.import_graph(PACKAGE)) == []


def test_no_import_cycles():
    assert cycle(house.import_graph(PATHS)) == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: house.module_name(path))
def test_modules_do_only_what_is_theirs(path: Path):
    assert not_allowed_here(house.module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", EVERYWHERE, ids=lambda path: str(path.relative_to(house.ROOT)))
def test_nothing_read_can_run_code(path: Path):
    assert never_allowed(path.read_text(encoding="utf-8")) == []


def test_contributing_shows_the_same_table():
    text = (house.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {cells[1]: cells[2] for cells in ([c.strip(" `") for c in line.split("|")] for line in text.splitlines()) if len(cells) == 4}
    rows = {name: ", ".join(row.split()) if row and not row.startswith("everything") else row or "nothing" for name, row in TABLE.items()}
    assert {name: shown.get(name) for name in rows} == rows


@pytest.mark.parametrize(
    ("module", "targets", "allowed"),
    [
        ("curvepress.plan", {"curvepress.structure"}, True),
        ("curvepress.structure", {"curvepress.plan"}, False),
        ("curvepress.curvature.diagonal", {"curvepress.curvature.averaging", "curvepress.objective"}, True),
        ("curvepress.curvature.diagonal", {"curvepress.scores"}, False),
        ("curvepress.stages.pipeline", {"curvepress.surgery.cutting", "curvepress.export.onnx"}, True),
        ("curvepress.stages.pipeline", {"curvepress.commands.cli"}, False),
        ("curvepress.scores", {"curvepress"}, False),
        ("curvepress.commands.cli", {"curvepress", "curvepress.stages.pipeline"}, True),
        ("curvepress", {"curvepress.commands.cli"}, False),
    ],
)
def test_planted_imports_are_judged(module: str, targets: set[str], allowed: bool):
    assert (forbidden_imports({module: targets}) == []) == allowed


def test_a_planted_cycle_is_found():
    assert cycle({"curvepress.a": {"curvepress.b"}, "curvepress.b": {"curvepress.a"}})


@pytest.mark.parametrize(
    ("module", "source", "what"),
    [
        ("curvepress.plan", "import torch", "torch"),
        ("curvepress.report.text", "def f():\n    from torch import nn", "torch"),
        ("curvepress.scores", "from torch.utils._python_dispatch import TorchDispatchMode", "torch.utils._python_dispatch"),
        ("curvepress.scores", "import torch\nmode = torch.utils._python_dispatch.TorchDispatchMode", "torch.utils._python_dispatch"),
        ("curvepress.scores", "print(1)", "print"),
        ("curvepress.surgery.cutting", "from pathlib import Path\nPath('a').open()", "open"),
        ("curvepress.report.html", "path.write_text('')", "write_text"),
        ("curvepress.surgery.cutting", "import torch.nn as n\nclass A(n.Linear): pass", "class A"),
        ("curvepress.surgery.cutting", "from torch import nn\nclass A(nn.Module): pass", "class A"),
        ("curvepress.runs.recipe", "from curvepress_recipes import digits", "curvepress_recipes"),
        ("curvepress.scores", "from importlib import import_module as load\nload('a')", "importlib.import_module"),
    ],
)
def test_planted_uses_are_found(module: str, source: str, what: str):
    assert not_allowed_here(module, source) == [what]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("curvepress.tracing.watching", "from torch.utils._python_dispatch import TorchDispatchMode"),
        ("curvepress.runs.folder", "print(open('a'))"),
        ("curvepress.surgery.rewriting", "from torch import nn\nclass A(nn.Module): pass"),
        ("curvepress.runs.recipe_files", "import importlib\nimportlib.import_module('curvepress_recipes.digits')"),
        ("curvepress.plan", "import numpy\nfrom importlib.metadata import version"),
    ],
)
def test_permitted_uses_pass(module: str, source: str):
    assert not_allowed_here(module, source) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", ["pickle"]),
        ("from torch import load as read\nread('a')", ["torch.load"]),
        ("import torch as t\nt.save(1, 'a')", ["torch.save"]),
        ("import torch.utils.data\ntorch.load('a')", ["torch.load"]),
        ("eval('1')", ["eval"]),
        ("exec('1')", ["exec"]),
        ("import numpy as np\nnp.load('a', allow_pickle=True)", ["allow_pickle"]),
        ("import numpy as np\nnp.load('a', allow_pickle=False)", []),
        ("model.eval(); torch.export.save(program, 'a'); spec.loader.exec_module(recipe)", []),
    ],
)
def test_planted_programs_in_data_are_found(source: str, what: list[str]):
    assert never_allowed(source) == what


def test_house_counts_resolves_and_limits(tmp_path: Path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from . import b\nfrom .a import f\n")
    (tmp_path / "pack" / "a.py").write_text('def f():\n    """Doc\n\n    more."""\n    x = 1\n\n    return x\n')
    (tmp_path / "pack" / "b.py").write_text("import json\n\ndef g():\n    import pack.a\n")
    paths = house.sources(tmp_path, ("pack", "absent"))
    assert house.import_graph(paths, tmp_path) == {"pack": {"pack.a", "pack.b"}, "pack.a": set(), "pack.b": {"pack.a"}}
    assert house.function_sizes(paths[1], tmp_path) == [(3, "pack/a.py:1 f")]
    assert house.file_sizes(paths, tmp_path) == [(2, "pack/__init__.py"), (7, "pack/a.py"), (4, "pack/b.py")]
    assert house.over([(60, "x"), (61, "y")], house.FUNCTION_LINES) == ["y: 61 lines, allowed are 60"]
