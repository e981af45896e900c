"""Which architectures can be cut, how far and how exactly: curvepress and Torch-Pruning on the same models.

    python -m benchmarks.coverage run                # a process a model and tool; goes on where it stopped
    python -m benchmarks.coverage run --only BERT Swin
    python -m benchmarks.coverage large              # the trace of a Llama of seven billion parameters on the meta device
    python -m benchmarks.coverage table              # the tables in Markdown, as docs/coverage.md has them

Models are small, random and in float64; see benchmarks/coverage_cases.py.  Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.coverage_cases import CASES

FILE = Path(__file__).parent / "results" / "coverage.jsonl"
TOOLS = ("curvepress", "torch-pruning")
LIMITS = {"curvepress": 240, "torch-pruning": 60, "large": 240}
"""CPU seconds a model may take, by tool: ours makes and compares four plans, graphs included, in float64; theirs takes a second or two
wherever it comes to an end.  The wall clock may show ten times as many."""


def run(only: list[str]) -> None:
    """Measure every model and tool that has no record yet."""
    for tool in TOOLS:
        for name in only or CASES:
            record = records.once(FILE, {"model": name, "tool": tool}, lambda name=name, tool=tool: alone(tool, name))
            print(f"{name} | {tool} | {record.get('failure') or summary(record)}", flush=True)


def large() -> None:
    """Measure the trace of the large model, once."""
    print(records.once(FILE, {"model": "Llama, 7B", "tool": "curvepress"}, lambda: alone("large", "Llama, 7B")))


def summary(record: records.Record) -> str:
    """One line about a record."""
    return f"{record['exact']} of {record['tried']} exact, {record['cut']:.0%} can be cut, {record['trace_seconds']:.2f} s"


def alone(tool: str, name: str) -> records.Record:
    """The measurement in a process of its own, which is ended after the tool's CPU seconds."""
    limit = LIMITS[tool]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.coverage", "one", tool, name, "--limit", str(limit)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * limit)
    except subprocess.TimeoutExpired:
        return {"failure": f"no result within {10 * limit} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode < 0:
        return {"failure": f"no result within {limit} CPU s"}
    return {"failure": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def one(tool: str, name: str, limit: int) -> None:
    """Measure in this process and print the record."""
    import resource

    import torch

    from benchmarks import coverage_laws, coverage_peer

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    measure = {"curvepress": coverage_laws.measure, "torch-pruning": coverage_peer.measure, "large": coverage_laws.large}[tool]
    print(json.dumps(measure(name)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("run").add_argument("--only", nargs="*", default=[], choices=list(CASES), metavar="MODEL")
    commands.add_parser("large")
    commands.add_parser("table")
    single = commands.add_parser("one")
    single.add_argument("tool")
    single.add_argument("name")
    single.add_argument("--limit", type=int, default=60)
    given = parser.parse_args()
    if given.what == "table":
        from benchmarks.coverage_table import table

        print(table(records.read(FILE)))
    else:
        {"run": lambda: run(given.only), "large": large, "one": lambda: one(given.tool, given.name, given.limit)}[given.what]()


if __name__ == "__main__":
    main()
