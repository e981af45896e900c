"""What the README shows runs, and what it links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from curvepress import curvature

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CURVATURE = (ROOT / "docs" / "curvature.md").read_text()


PROMISES = """
assert cp.cost(plan).params <= 0.5 * cp.cost(cp.Plan(structure)).params
assert task.evaluate(again, "validation") == task.evaluate(small, "validation")
assert task.evaluate(again, "validation")["accuracy"] > 90
"""


def test_the_example_runs_and_gives_what_it_promises(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "Cost(params=" in printed(code + PROMISES, tmp_path)


def printed(code: str, folder: Path) -> str:
    """What a program prints."""
    (folder / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CURVATURE_PROMISES = """
assert set(found.mean) == {"whole", "halves", "removal", "after the convolution"}
assert (found.mean["halves"] >= 0).all() and found.stderr["halves"].shape == (2,)
"""


def test_the_examples_on_curvature_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", CURVATURE, re.DOTALL)
    assert len(blocks) == 3
    blocks.insert(2, CURVATURE_PROMISES)
    assert printed("".join(blocks), tmp_path).startswith("Gauss-Newton by sketch: 256 examples in 8 batches")


def test_the_page_on_curvature_lists_every_estimator_as_it_is() -> None:
    rows = [f"| `{e.name}` | {e.quantity} | `{_cell(e.formula)}` | {e.bias} | {e.source} |" for e in curvature.ESTIMATORS.values()]
    assert re.findall(r"^\| `\w+` \| .* \| `.*` \| .* \| .* \|$", CURVATURE, re.MULTILINE) == rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def test_the_page_on_curvature_names_all_that_is_public() -> None:
    assert [n for n in curvature.__all__ if not re.search(rf"\b{n}\b", CURVATURE)] == []


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/architecture.md", "docs/recipes.md"),
        *("docs/curvature.md", "docs/quantization.md", "docs/coverage.md", "docs/latency.md", "docs/transformers.md"),
        *("docs/prices.md", "docs/repair.md", "docs/implants.md", "docs/planning.md"),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_commands_of_the_readme_are_targets_of_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
