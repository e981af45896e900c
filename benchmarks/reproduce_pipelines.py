"""Cells of the results page that are whole commands: EHAP's pipeline to integers, and NViT under a latency budget beside our own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import records
from curvepress_recipes.weights import file_of

Key = Mapping[str, Any]
MODELS = Path("runs/benchmarks/reproduce")
EHAP = (
    "reproduce ehap cifar10 --option depth={depth} --params {left} --corrected --precision {precision} --probes 16 --examples 128 "
    "--epochs 1 --lr 0.01 --qat-epochs 1 --arithmetic bfloat16 --seed {seed}"
)
NVIT = "reproduce nvit cifar10_vit --latency {left} --samples 32 --eta {eta} --epochs 1 --lr 0.0005 --distill 0 --seed {seed}"
OURS = (
    "compress cifar10_vit --latency {left} --method {method} --samples 32 --repair-examples {repair} --epochs 1 --lr 0.0005 "
    "--distill 0 --seed {seed}"
)
VIT = (
    ("NViT, as released", NVIT, {"eta": 5e-4}),
    ("NViT, as released, without latency", NVIT, {"eta": 0}),
    ("NViT, corrected", NVIT + " --corrected", {"eta": 5e-4}),
    ("NViT, corrected, without latency", NVIT + " --corrected", {"eta": 0}),
    ("nvit scores, our planner", OURS, {"method": "nvit", "repair": 0}),
    ("curvature, our planner", OURS, {"method": "mask_curvature", "repair": 0}),
    ("curvature, our planner, repaired", OURS, {"method": "mask_curvature", "repair": 512}),
)


def cells() -> Iterator[tuple[int, dict[str, Any], Any]]:
    """``(rank, key, measure)``."""
    for depth, left, precision in ((32, 0.5, "bfloat16"), (32, 0.1, "bfloat16"), (56, 0.5, "bfloat16")):
        command = EHAP.format(depth=depth, left=left, precision=precision, seed=0)
        yield 9 + depth // 4, {"part": "pipeline", "depth": depth, "left": left, "precision": precision, "seed": 0, "command": command}, ran
    for way, command, options in VIT:
        full = command.format(left=0.6, seed=0, **options)
        yield 7, {"part": "nvit", "way": way, "left": 0.6, "seed": 0, "command": full}, ran


def able(key: Key) -> bool:
    """Whether what a cell needs is there: the vision transformer is trained by its recipe."""
    return key["part"] != "nvit" or file_of("cifar10_vit").exists()


def ran(key: Key) -> records.Record:
    """The figures that a command leaves in its folder, which goes afterwards; interrupted, the same command goes on in it."""
    name = "-".join(str(v) for k, v in key.items() if k != "command").replace(" ", "_").replace(",", "")
    folder = MODELS / name
    subprocess.run([sys.executable, "-m", "curvepress", *key["command"].split(), "--out", str(folder)], check=True)
    if (folder / "reproduction.json").exists():
        facts = json.loads((folder / "reproduction.json").read_text())
        found = {k: facts[k] for k in ("stages", "facts", "settings", "seconds")}
    else:
        found = _compressed(json.loads((folder / "metrics.json").read_text()))
    shutil.rmtree(folder)
    return found


def _compressed(metrics: Mapping[str, Any]) -> records.Record:
    """The figures of `compress` in the form of those of `reproduce`."""
    small, test = metrics["cost"]["compressed"], metrics["test"]
    times = {str(t["batch"]): [t["ratio"][q] for q in ("low", "median", "high")] for t in metrics["latency"]}
    whole = {"stage": "original", "test": test["original"], "latency": {}, **_size(metrics["cost"]["original"])}
    return {"stages": [whole, {"stage": "fine-tuned", "test": test["recovered"], "latency": times, **_size(small)}]}


def _size(cost: Mapping[str, Any]) -> records.Record:
    return {k: cost[k] for k in ("params", "macs", "bytes")}
