"""Curvature on an accelerator: seconds and memory in every precision, against HAP's procedure in float32.

    python -m benchmarks.curvature_devices measure --device cuda      # minutes; resumes
    python -m benchmarks.curvature_devices table
    python -m benchmarks.curvature_devices measure --device cpu --small --file small.jsonl      # a trial run without an accelerator

Random weights, one process a cell.  Seconds are of the wall clock with the device synchronised; memory is the peak that was
allocated beyond the model and the batch (on a CPU, of the process beyond its idle state).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import curvature_hap, records
from benchmarks import curvature_ours as ours
from benchmarks.curvature_models import SMALL, SUBJECTS
from curvepress.metering import metered

FILE = Path(__file__).parent / "results" / "curvature_devices.jsonl"
PROBES = 6
OUR_PROBES = 24
CLASSES = 10
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
Way = Callable[[nn.Module, tuple[Tensor, Tensor], str], Iterator[object]]


def _hap(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> Iterator[object]:
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that can be differentiated twice
        yield from curvature_hap.hap(model, batch, PROBES, 0)


def _hap_at_once(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> Iterator[object]:
    with sdpa_kernel(SDPBackend.MATH):
        yield from curvature_hap.hap(model, batch, PROBES, 0, sums=curvature_hap.at_once)


def _ehap(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> Iterator[object]:
    with sdpa_kernel(SDPBackend.MATH):
        yield from curvature_hap.ehap(model, batch, PROBES, 0)


def _ours(estimator: str, **settings: Any) -> Way:
    """An estimate, three times; the median leaves the first, which warms up, out of account."""

    def run(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> Iterator[object]:
        own = precision if precision in ("bfloat16", "float16") else "full"
        for _ in range(3):
            yield ours.traces(model, [batch], estimator=estimator, precision=own, micro=len(batch[1]), **settings)

    return run


WAYS: dict[str, tuple[Way, tuple[str, ...]]] = {
    "hap": (_hap, ("float32", "tf32")),
    "hap_at_once": (_hap_at_once, ("float32", "tf32")),
    "ehap": (_ehap, ("float16",)),
    "hessian": (_ours("hessian", probes=OUR_PROBES), PRECISIONS),
    "exact": (_ours("exact"), PRECISIONS),
    "auto": (_ours("auto"), PRECISIONS),
}
"""Each way and the precisions it knows."""


def measure(device: str, file: Path, small: bool, rounds: int) -> None:
    """Run whatever has no record yet: for each network all ways in all their precisions, in turns."""
    cells = [(s, w, p) for s in SUBJECTS for w, (_, known) in WAYS.items() for p in known if _sensible(s, w, p, device)]
    for turn in range(rounds):
        for subject, way, precision in cells:
            key = {"device": _device_name(device), "small": small, "subject": subject, "way": way, "precision": precision, "round": turn}
            record = records.once(file, key, lambda s=subject, w=way, p=precision: _process(s, w, p, device, small))
            print({k: record.get(k) for k in ("subject", "way", "precision", "seconds", "memory", "failure")}, flush=True)


def _sensible(subject: str, way: str, precision: str, device: str) -> bool:
    """TF32 is of GPUs; the exact trace takes a backward pass a class."""
    return (precision != "tf32" or device == "cuda") and (way != "exact" or SUBJECTS[subject].classes <= CLASSES)


def _process(subject: str, way: str, precision: str, device: str, small: bool) -> records.Record:
    """One cell in a process of its own; what it died of, if it did."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.curvature_devices", "cell", "--device", device]
    command += ["--subject", subject, "--way", way, "--precision", precision, *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def cell(subject: str, way: str, precision: str, *, device: str, small: bool) -> records.Record:
    """``seconds`` of every step and ``memory`` in MiB."""
    model, batch = (SMALL if small else SUBJECTS)[subject].make(0, device)
    parameters = sum(p.numel() for p in model.parameters())
    with _precise(precision), _remembered(device) as memory:
        seconds = _timed(WAYS[way][0](model, batch, precision), device)
    return {
        "seconds": seconds,
        "memory": memory[0],
        "parameters": parameters,
        "examples": len(batch[1]),
        "torch_threads": torch.get_num_threads(),
    }


def _timed(steps: Iterator[object], device: str) -> list[float]:
    seconds = []
    _finish(device)
    start = time.perf_counter()
    for _ in steps:
        _finish(device)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _remembered(device: str) -> Iterator[list[float]]:
    """A list that holds the peak of memory in MiB after the body."""
    found: list[float] = []
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    with metered() as idle:
        pass
    with metered() as taken:
        yield found
    found.append(taken.peak - idle.peak)


def _precise(precision: str) -> AbstractContextManager[None]:
    """TF32 is a switch of the backend; what halves precision does it itself."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return nullcontext()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def table(file: Path) -> None:
    """Print the table in Markdown."""
    found = [r for r in records.read(file) if "seconds" in r]
    groups = sorted({(r["device"], r["subject"], r["way"], r["precision"]) for r in found})
    print("| device | network | way | precision | s a probe, or in all | against HAP float32 | memory, MiB | against HAP float32 |")
    print("|---|---|---|---|---|---|---|---|")
    for device, subject, way, precision in groups:
        mine, base = (_middle(found, device, subject, w, p) for w, p in ((way, precision), ("hap", "float32")))
        ratios = [f"{100 * (m / b - 1):+.0f} %" for m, b in zip(mine, base, strict=True)]
        print(f"| {device} | {subject} | {way} | {precision} | {mine[0]:.3g} | {ratios[0]} | {mine[1]:.0f} | {ratios[1]} |")
    for r in (r for r in records.read(file) if "failure" in r):
        print(f"\n{r['subject']} {r['way']} {r['precision']}: {r['failure']}")


def _middle(found: list[records.Record], *group: str) -> tuple[float, float]:
    rows = [r for r in found if (r["device"], r["subject"], r["way"], r["precision"]) == group]
    probe = [median(r["seconds"][1:] or r["seconds"]) / (OUR_PROBES if group[2] == "hessian" else 1) for r in rows]
    return (median(probe), median(r["memory"] for r in rows)) if rows else (float("nan"), float("nan"))


def main() -> None:
    """Read the command line and do one of the three things."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "cell", "table"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--subject", choices=SUBJECTS)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument("--small", action="store_true", help="networks and batches in a size for tests")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path, default=FILE)
    chosen = parser.parse_args()
    if chosen.what == "cell":
        print(json.dumps(cell(chosen.subject, chosen.way, chosen.precision, device=chosen.device, small=chosen.small)))
    elif chosen.what == "measure":
        measure(chosen.device, chosen.file, chosen.small, chosen.rounds)
    else:
        table(chosen.file)


if __name__ == "__main__":
    main()
