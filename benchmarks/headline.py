"""The headline: ResNet-56 on CIFAR-10, from the trained checkpoint to a tenth of the bytes and a third of the latency.

    python -m benchmarks.headline run                 # the command of the README; goes on where it stopped
    python -m benchmarks.headline measure             # what came of it; minutes; leave the machine alone
    python -m benchmarks.headline run --goal macs     # likewise, and measure: 2.1 times fewer multiply-accumulates, in float
    python -m benchmarks.headline table

Accuracy is that of the small file in ONNX Runtime on the test images, which no choice looked at.  Latency is in turns with the float file
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
FOLDERS = {"headline": Path("runs/benchmarks/headline"), "macs": Path("runs/benchmarks/macs")}
COMMAND = (
    "compress cifar10 --option depth=56 --branches 7 --whole '*' --bytes 9.9% --bits 2-8 "
    "--epochs 10 --lr 0.02 --precision bfloat16 --qat-epochs 1 --out {folder}"
)
COMMANDS = {
    "headline": COMMAND,
    "macs": (
        "compress cifar10 --option depth=56 --branches 7 --macs 47.6% --per macs --epochs 10 --lr 0.02 --precision bfloat16 --out {folder}"
    ),
}


def run(goal: str) -> None:
    """The command of a goal."""
    subprocess.run([sys.executable, "-m", "curvepress", *shlex.split(COMMANDS[goal].format(folder=FOLDERS[goal]))], check=True)


def measure(goal: str) -> None:
    """What is not on record yet."""
    record = records.once(FILE, {"command": COMMANDS[goal]}, lambda: _measured(FOLDERS[goal]))
    print({k: v for k, v in record.items() if k != "environment"})


def _measured(folder: Path) -> dict[str, Any]:
    small = "quantized" if (folder / "quantized.onnx").exists() else "model"
    files = {"original": folder / "original.onnx", "small": folder / f"{small}.onnx"}
    example = recipe.example()
    accuracy = {
        name: recipe.evaluate(Running(path, recipe.model(trained=False, depth=56), example), "test")["accuracy"]
        for name, path in files.items()
    }
    timings = [t for t in compare_latency(files, example.numpy(), seconds=20.0) if t.name == "small"]
    sizes = {"original": folder / "original.safetensors", "small": folder / f"{small}.safetensors"}
    return {
        "accuracy": accuracy,
        "bytes": {name: path.stat().st_size for name, path in sizes.items()},
        "latency": {f"batch {t.batch}": [t.ratio.low, t.ratio.median, t.ratio.high] for t in timings},
        "cost": _read(folder / "metrics.json")["cost"],
        "validation": _read(folder / ("quantized.json" if small == "quantized" else "metrics.json"))["validation"],
        "seconds": {name: entry["taken"] for name, entry in _read(folder / "run.json")["stages"].items()},
    }


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def table() -> None:
    """Print the table in Markdown: of the command, and of the two that were needed before there was one."""
    rows = [r for r in records.read(FILE) if r.get("command") != COMMANDS["macs"]]
    print("| | accuracy | bytes on disk | latency, batch 1 (quartiles) | batch 64 | processor minutes |\n|---|---|---|---|---|---|")
    print(f"| original, float | {rows[0]['accuracy']['original']:.2f} | {rows[0]['bytes']['original']:,} | 1 | 1 | |")
    for r in rows:
        low, middle, high = r["latency"]["batch 1"]
        ratio = r["bytes"]["original"] / r["bytes"]["small"]
        times = f"{middle:.2f} ({low:.2f} to {high:.2f}) | {r['latency']['batch 64'][1]:.2f} | {_spent(r) / 60:.0f}"
        print(f"| {_named(r)} | {r['accuracy']['small']:.2f} | {r['bytes']['small']:,} (÷ {ratio:.1f}) | {times} |")
    for r in (r for r in rows if r.get("command") == COMMAND):
        print(f"\nOn the clock, beside other work: {sum(s['wall'] for s in r['seconds'].values()) / 60:.0f} minutes.")
        print("Accuracy on the validation split: " + ", ".join(f"{k} {v['accuracy']:.2f}" for k, v in r["validation"].items()))

    for r in (r for r in records.read(FILE) if r.get("command") == COMMANDS["macs"]):
        macs, params = (r["cost"]["compressed"][k] / r["cost"]["original"][k] for k in ("macs", "params"))
        times = ", ".join(f"{r['latency'][b][1]:.2f} at {b}" for b in ("batch 1", "batch 64"))
        print(f"\n{macs:.3f} of the multiply-accumulates, {params:.3f} of the parameters, float: {r['accuracy']['small']:.2f} %,")
        print(f"latency {times}; {_spent(r) / 60:.0f} processor minutes.")


def _named(record: records.Record) -> str:
    if "command" not in record:
        return "small, integers; two commands, 8 epochs and 1 quantized"
    if record["command"] == COMMAND:
        return "small, integers; the command above"
    given = shlex.split(record["command"])
    return "small, integers; " + ", ".join(f"{given[given.index(f'--{k}') + 1]} {k}" for k in ("branches", "epochs", "qat-epochs"))


def _spent(record: records.Record) -> float:
    return sum(s["cpu"] for s in record["seconds"].values()) if "seconds" in record else float(record["cpu_seconds"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "measure", "table"))
    parser.add_argument("--goal", choices=COMMANDS, default="headline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "table":
        table()
    else:
        {"run": run, "measure": measure}[options.what](options.goal)


if __name__ == "__main__":
    main()
