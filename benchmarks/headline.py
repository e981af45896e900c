"""The headline: ResNet-56 on CIFAR-10, from the trained checkpoint to a tenth of the bytes and a third of the latency.

    python -m benchmarks.headline run                 # the two commands of the README; goes on where it stopped
    python -m benchmarks.headline measure             # what came of it; minutes; leave the machine alone
    python -m benchmarks.headline table

Accuracy is that of the integer file in ONNX Runtime on the test images, which no choice looked at.  Latency is in turns with the float file
of the original.  Needs the data of the recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from curvepress.export import compare_latency
from curvepress.export.running import Running
from curvepress_recipes import cifar10 as recipe

FILE = Path(__file__).parent / "results" / "headline.jsonl"
FOLDER = Path("runs/benchmarks/headline")
COMMANDS = (
    "compress cifar10 --option depth=56 --branches 9 --macs 71% --epochs 8 --lr 0.02 --precision bfloat16 --out {folder}",
    "quantize {folder} --bytes 320000 --rounding adaptive --epochs 1",
)
SMALL = "quantized/quantized"


def run(folder: Path) -> None:
    """Both commands."""
    for command in COMMANDS:
        subprocess.run([sys.executable, "-m", "curvepress", *shlex.split(command.format(folder=folder))], check=True)


def measure(folder: Path) -> None:
    """What is not on record yet."""
    record = records.once(FILE, {"commands": list(COMMANDS)}, lambda: _measured(folder))
    print({k: v for k, v in record.items() if k != "environment"})


def _measured(folder: Path) -> dict[str, Any]:
    files = {"original": folder / "original.onnx", "small": folder / f"{SMALL}.onnx"}
    example = recipe.example()
    accuracy = {
        name: recipe.evaluate(Running(path, recipe.model(trained=False, depth=56), example), "test")["accuracy"]
        for name, path in files.items()
    }
    timings = [t for t in compare_latency(files, example.numpy(), seconds=20.0) if t.name == "small"]
    sizes = {"original": folder / "original.safetensors", "small": folder / f"{SMALL}.safetensors"}
    return {
        "accuracy": accuracy,
        "bytes": {name: path.stat().st_size for name, path in sizes.items()},
        "latency": {f"batch {t.batch}": [t.ratio.low, t.ratio.median, t.ratio.high] for t in timings},
        "cpu_seconds": sum(_spent(json.loads(path.read_text())) for path in (folder / "run.json", folder / "quantized" / "run.json")),
    }


def _spent(run: dict[str, Any]) -> float:
    return sum(entry["taken"]["cpu"] for entry in run["stages"].values())


def table() -> None:
    """Print the table in Markdown."""
    print("| | accuracy | bytes on disk | latency, batch 1 (quartiles) | batch 64 |\n|---|---|---|---|---|")
    for r in records.read(FILE):
        low, middle, high = r["latency"]["batch 1"]
        print(f"| original, float | {r['accuracy']['original']:.2f} | {r['bytes']['original']:,} | 1 | 1 |")
        ratio = r["bytes"]["original"] / r["bytes"]["small"]
        times = f"{middle:.2f} ({low:.2f} to {high:.2f}) | {r['latency']['batch 64'][1]:.2f}"
        print(f"| small, integers | {r['accuracy']['small']:.2f} | {r['bytes']['small']:,} (÷ {ratio:.1f}) | {times} |")
        print(f"\nBoth commands took {r['cpu_seconds'] / 60:.0f} minutes of processor time.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "measure", "table"))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "table":
        table()
    else:
        {"run": run, "measure": measure}[options.what](options.folder)


if __name__ == "__main__":
    main()
