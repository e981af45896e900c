"""Integer files against float ones in the same runtime, taken in turns, and a quantized training step against a float one.

    python -m benchmarks.quantization_speed latency --networks ResNet-20 ResNet-56 EfficientNet-Lite0    # after ptq and peers
    python -m benchmarks.quantization_speed layers    # what OpenVINO runs, and how long each takes
    python -m benchmarks.quantization_speed widths    # by how much, against how many channels there are; random weights
    python -m benchmarks.quantization_speed step
    python -m benchmarks.quantization_speed table

Whatever else the machine does falls on all of them alike: only ratios are to be quoted, and they are of readings of the same round.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from benchmarks import quantizers as peers
from benchmarks import records
from benchmarks.networks import MODELS, NETWORKS, arrays, original
from benchmarks.quantization import bits
from benchmarks.quantization_table import show
from curvepress.export import compare_latency, to_onnx
from curvepress.export.integers import to_integer_onnx
from curvepress.export.latency import Timing
from curvepress.quantization.quantized import Bits, calibrate, quantize
from curvepress_recipes.digits import Block

FILE = Path(__file__).parent / "results" / "quantization_speed.jsonl"
BATCHES = (1, 32)
WIDTHS = (16, 32, 64)
"""Channels of the first of three stages of a residual network; each further one has twice as many."""


def latency(network: str, batches: list[int], runtimes: list[str]) -> Iterator[records.Record]:
    """Records of every file, on one thread."""
    paths = {"float": original(network), "w8a8": _ours(network)}
    paths |= {name: path for name in peers.PEERS if (path := MODELS / f"{network}-{name}.onnx").exists()}
    x = _inputs(network)
    for runtime in runtimes:
        for batch in batches:
            key = {"network": network, "runtime": runtime, "batch": batch}
            yield records.once(FILE, key, lambda runtime=runtime, batch=batch: {"files": _compared(runtime, paths, x, batch)})


def _ours(network: str) -> Path:
    found = sorted(MODELS.glob(f"{network}-w8a8-ptq-*-0.onnx"), reverse=True)
    if not found:
        raise SystemExit(f"there is no file of {network}: run python -m benchmarks.quantization ptq --networks {network}")
    return found[0]


def _inputs(network: str) -> Any:
    """32 images, or sentences of middling length."""
    test = NETWORKS[network].test()
    return tree_map(lambda a: a[:32], arrays(next(islice(iter(test), len(test) // 2, None))[0]))  # sentences are sorted by length


def _compared(runtime: str, paths: dict[str, Path], x: Any, batch: int) -> dict[str, Any]:
    if runtime == "openvino":
        seconds = peers.compare_in_openvino(paths, x, batch)
        return {name: _times_of(own, next(iter(seconds.values()))) for name, own in seconds.items()}
    found = list(compare_latency(paths, x, batches=(batch,), rounds=40, seconds=20))
    return {t.name: _times(t, found[0]) for t in found}


def _times_of(own: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    """As :func:`_times`, from seconds ``[rounds, 2]``, with the quartiles of the ratio of processor time in the same round too."""
    low, middle, high = np.quantile(first / own, (0.25, 0.5, 0.75), axis=0)
    least = np.quantile(own[:, 1], 0.25), np.quantile(first[:, 1], 0.25)
    return {
        "milliseconds": 1000 * float(np.median(own[:, 0])), "cpu_milliseconds": 1000 * float(least[0]), "rounds": len(own),
        "faster": float(middle[0]), "quartiles": [float(low[0]), float(high[0])], "cpu_faster": float(least[1] / least[0]),
        "cpu_quartiles": [float(low[1]), float(high[1])],
    }  # fmt: skip


def _times(t: Timing, first: Timing) -> dict[str, Any]:
    """Ratios by the clock, paired, and by processor time, of the lower quartiles: what others do to the machine lengthens both."""
    quartiles, cpu = [1 / t.ratio.high, 1 / t.ratio.low], first.cpu.low / t.cpu.low
    times = {"milliseconds": t.wall.median, "cpu_milliseconds": t.cpu.low, "rounds": t.rounds}
    return {**times, "faster": 1 / t.ratio.median, "quartiles": quartiles, "cpu_faster": cpu}


def layers(network: str) -> records.Record:
    """What OpenVINO executes of our file and of the float one on 32 images, by kind of layer and kernel."""
    paths = {"float": original(network), "w8a8": _ours(network)}
    key = {"what": "layers", "network": network}
    return records.once(FILE, key, lambda: {"files": {n: peers.executed_in_openvino(p, _inputs(network)) for n, p in paths.items()}})


def widths(width: int, batches: list[int], runtimes: list[str]) -> Iterator[records.Record]:
    """Records of a residual network of twenty layers and random weights on images of 32 by 32, for speed alone."""
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float": Path(folder) / "float.onnx", "w8a8": Path(folder) / "w8a8.onnx"}
        network = _residual(width)
        to_onnx(network, x[:2], paths["float"])
        to_integer_onnx(calibrate(quantize(network, Bits(), x[:2]), [(x, None)]).eval(), [(x, None)], paths["w8a8"])
        for runtime, batch in product(runtimes, batches):
            key = {"network": f"residual network of {width} channels, random weights", "runtime": runtime, "batch": batch}
            yield records.once(FILE, key, lambda r=runtime, b=batch: {"files": _compared(r, paths, x.numpy(), b)})


def _residual(width: int) -> nn.Module:
    torch.manual_seed(0)
    stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
    blocks = [b for before, own, stride in stages for b in (Block(before, own, stride), Block(own, own, 1), Block(own, own, 1))]
    first = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)).eval()


def step(rounds: int = 16) -> records.Record:
    """Processor time of a training step of ResNet-20 on 128 images, quantized over float, in turns."""
    return records.once(FILE, {"what": "step", "rounds": rounds, "network": "ResNet-20"}, lambda: _steps(rounds))


def _steps(rounds: int) -> records.Record:
    of = NETWORKS["ResNet-20"]
    batch = next(iter(of.train(0)))
    chosen, x = bits("ResNet-20", "w4a4"), of.recipe.example()
    modules = {"float": of.model(), "learned": quantize(of.model(), chosen, x), "fixed": quantize(of.model(), chosen, x, learn=False)}
    for name in ("learned", "fixed"):
        calibrate(modules[name], [batch])
    steps = {name: _stepper(module, of.recipe.loss, batch) for name, module in modules.items()}
    spent = np.array([[_cpu(steps[name]) for name in steps] for _ in range(rounds + 1)])[1:]
    ratios = {name: np.quantile(spent[:, n] / spent[:, 0], (0.25, 0.5, 0.75)).tolist() for n, name in enumerate(steps)}
    least = {name: float(spent[:, n].min() / spent[:, 0].min()) for n, name in enumerate(steps)}
    return {"seconds": float(np.median(spent[:, 0])), "ratio": ratios, "least": least}


def _stepper(module: nn.Module, loss: Callable[..., torch.Tensor], batch: Any) -> Callable[[], None]:
    module.train()
    descent = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-4, 0.9)

    def step() -> None:
        descent.zero_grad()
        loss(module(batch[0]), batch[1]).backward()
        descent.step()

    return step


def _cpu(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def table() -> None:
    """Print all records as the documentation shows them."""
    rows = records.read(FILE)
    lines = []
    for r in (r for r in rows if "runtime" in r):
        for name, t in r["files"].items():
            low, high = t["quartiles"]
            times = f"{t['cpu_milliseconds']:.2f}", f"{t['cpu_faster']:.2f}", f"{t['faster']:.2f} ({low:.2f}–{high:.2f})"
            lines.append((r["network"], r["runtime"], str(r["batch"]), name, *times))
    show(("network", "runtime", "batch", "file", "processor ms", "times faster", "by the clock (quartiles)"), lines)
    for r in (r for r in rows if r.get("what") == "layers"):
        lines = [
            (r["network"], name, kind, str(count), f"{ms:.2f}", f"{100 * ms / sum(m for _, m in kinds.values()):.1f} %")
            for name, kinds in r["files"].items()
            for kind, (count, ms) in sorted(kinds.items(), key=lambda k: -k[1][1])
        ]
        show(("network", "file", "OpenVINO runs", "layers", "ms for 32", "share"), lines)
    for r in (r for r in rows if r.get("what") == "step"):
        shown = ", ".join(f"{name} {q[1]:.2f} ({q[0]:.2f}–{q[2]:.2f})" for name, q in r["ratio"].items() if name != "float")
        print(f"\nA training step of {r['network']} over that in float, processor time, by whether scales are learned or fixed: {shown}.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("latency", "layers", "widths", "step", "table"))
    parser.add_argument("--networks", nargs="+", default=["ResNet-20"], choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"], choices=("onnxruntime", "openvino"))
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.what == "table":
        return table()
    work = {
        "step": lambda: [step()],
        "layers": lambda: map(layers, o.networks),
        "widths": lambda: (r for w in WIDTHS for r in widths(w, o.batches, o.runtimes)),
    }
    for record in work.get(o.what, lambda: (r for n in o.networks for r in latency(n, o.batches, o.runtimes)))():
        print(record, flush=True)
    return None


if __name__ == "__main__":
    main()
