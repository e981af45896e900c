"""The public names, on purpose."""

from __future__ import annotations

import inspect
from pathlib import Path

import curvepress


def test_the_public_names_are_these_and_no_others() -> None:
    assert sorted(curvepress.__all__) == [
        "Cost", "Plan", "Scores", "Structure",
        "apply", "at_most", "cost", "fit", "reestimate", "repair", "restore", "save", "score", "search", "to_onnx", "trace",
    ]  # fmt: skip


def test_every_public_name_says_what_comes_back() -> None:
    for name in curvepress.__all__:
        thing = getattr(curvepress, name)
        assert (inspect.getdoc(thing) or "").strip(), name
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name


def test_no_public_name_shadows_a_module() -> None:
    modules = {p.stem for p in Path(curvepress.__file__).parent.iterdir()}
    assert modules & set(curvepress.__all__) == set()
