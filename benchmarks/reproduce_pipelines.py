"""Cells of the results page that are whole commands: EHAP's pipeline to integers, and NViT under a latency budget beside our own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import records
from curvepress.reproduce.accounts import accounts
from curvepress.runs.desk import Desk
from curvepress.stages.sessions import continued
from curvepress_recipes.weights import file_of

Key = Mapping[str, Any]
MODELS = Path("runs/benchmarks/reproduce")
EHAP = "reproduce ehap {recipe} --params {left} --corrected --precision {precision} --examples 128 --probes {how} --seed {seed}"
RECIPES = {"digits": "digits", "ResNet-32": "cifar10 --option depth=32", "ResNet-56": "cifar10 --option depth=56"}
HOW = {
    "digits": "32 --epochs 5 --lr 0.02 --qat-epochs 2",
    **dict.fromkeys(("ResNet-32", "ResNet-56"), "16 --epochs 1 --lr 0.01 --qat-epochs 1 --arithmetic bfloat16"),
}
"""Random vectors and training that a network gets."""
WHOLE = (
    ("digits", 0.3, "float16", -10),
    ("ResNet-32", 0.5, "bfloat16", 8),
    ("ResNet-32", 0.1, "bfloat16", 21),
    ("ResNet-56", 0.5, "bfloat16", 15),
)
"""Networks, shares of the parameters, precision of the passes, and rank."""
EIGHT = "compress {recipe} --params {left} --bits 8 {how} --distill 0 --seed {seed}"
"""Our own way to eight bits, with EHAP's recovery."""
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
SOON = ("NViT, as released", "NViT, corrected", "nvit scores, our planner", "curvature, our planner, repaired")
"""Those that decide; the others come after all else."""


def cells() -> Iterator[tuple[int, dict[str, Any], Any]]:
    """``(rank, key, measure)``."""
    for network, left, precision, rank in WHOLE:
        command = EHAP.format(recipe=RECIPES[network], left=left, precision=precision, how=HOW[network], seed=0)
        yield rank, {"part": "pipeline", "network": network, "left": left, "seed": 0, "command": command}, ran
        training = HOW[network].partition(" ")[2].replace("arithmetic", "precision")
        own = EIGHT.format(recipe=RECIPES[network], left=left, how=training, seed=0)
        yield rank, {"part": "pipeline", "network": network, "left": left, "seed": 0, "command": own}, ran
    for way, command, options in VIT:
        full = command.format(left=0.6, seed=0, **options)
        rank = 7 if way in SOON else 25
        yield rank, {"part": "nvit", "way": way, "left": 0.6, "seed": 0, "command": full}, ran


def able(key: Key) -> bool:
    """Whether what a cell needs is there: the vision transformer is trained by its recipe."""
    return key["part"] != "nvit" or file_of("cifar10_vit").exists()


def ran(key: Key) -> records.Record:
    """The figures that a command leaves in its folder, which goes afterwards; interrupted, the same command goes on in it."""
    parts = (key["command"].partition(" ")[0], *(str(v) for k, v in key.items() if k != "command"))
    name = "-".join(parts).replace(" ", "_").replace(",", "")
    folder = MODELS / name
    subprocess.run([sys.executable, "-m", "curvepress", *key["command"].split(), "--out", str(folder)], check=True)
    if (folder / "reproduction.json").exists():
        facts = json.loads((folder / "reproduction.json").read_text())
        found = {k: facts[k] for k in ("stages", "facts", "settings", "seconds")}
    else:
        with continued(folder) as (run, task):
            found = {"stages": [asdict(a) for a in accounts(Desk(run, task), 1)]}
    shutil.rmtree(folder)
    return found
