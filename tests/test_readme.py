"""What the README shows runs, and what it links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PROMISES = """
assert cp.cost(plan).params <= 0.5 * cp.cost(cp.Plan(structure)).params
assert task.evaluate(again, "validation") == task.evaluate(small, "validation")
assert task.evaluate(again, "validation")["accuracy"] > 90
"""


def test_the_example_runs_and_gives_what_it_promises(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(code + PROMISES)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Cost(params=" in done.stdout


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/recipes.md"])
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_commands_of_the_readme_are_targets_of_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
