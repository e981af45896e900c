"""Records of measurements: one JSON object a line, appended as they come, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All complete records; a line cut off by an interruption is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for line in lines if (r := _parsed(line)) is not None]


def _parsed(line: str) -> Record | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def once(path: Path, key: Record, measure: Callable[[], Record]) -> Record:
    """The record of ``key``: read if it is there, else measured and appended."""
    for record in read(path):
        if all(record.get(k) == v for k, v in key.items()):
            return record
    record = {**key, **measure(), "environment": environment()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def environment() -> Record:
    """Commit, versions and hardware, as far as they bear on a figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    packages = {name: version(name) for name in ("torch", "onnxruntime", "torch-pruning")}
    return {"commit": commit.stdout.strip(), "processor": _processor(), "threads": torch.get_num_threads(), **packages}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
