"""Time and peak memory of every stage of the main job, and how they grow from ResNet-20 to ResNet-56.

    python -m benchmarks.stages run        # minutes each; resumes
    python -m benchmarks.stages table

One process a network, one thread.  Needs the data of the recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import records

FILE = Path(__file__).parent / "results" / "stages.jsonl"
DEPTHS = (20, 56)
SETTINGS = ("--params", "0.5", "--samples", "8", "--probes", "2", "--epochs", "1", "--distill", "0", "--precision", "bfloat16")


def run() -> None:
    """Measure every depth that has no record yet."""
    for depth in DEPTHS:
        records.once(FILE, {"depth": depth, "settings": " ".join(SETTINGS)}, lambda depth=depth: _measured(depth))


def _measured(depth: int) -> records.Record:
    folder = Path("runs/benchmarks") / f"stages-{depth}"
    command = ["-m", "curvepress.commands.cli", "compress", "cifar10", "--option", f"depth={depth}", *SETTINGS, "--out", str(folder)]
    subprocess.run([sys.executable, *command], check=True)
    return {"stages": json.loads((folder / "metrics.json").read_text())["stages"]}


def table() -> None:
    """Print the table in Markdown."""
    found = {r["depth"]: {s["name"]: s for s in r["stages"]} for r in records.read(FILE)}
    small, large = (found[d] for d in DEPTHS)
    print("| stage | ResNet-20, CPU s | ResNet-56, CPU s | ratio | ResNet-20, peak MiB | ResNet-56, peak MiB |")
    print("|---|---|---|---|---|---|")
    for name, s in small.items():
        other = large[name]
        print(f"| {name} | {s['cpu']:.1f} | {other['cpu']:.1f} | {other['cpu'] / s['cpu']:.1f} | {s['peak']:.0f} | {other['peak']:.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    {"run": run, "table": table}[parser.parse_args().what]()
