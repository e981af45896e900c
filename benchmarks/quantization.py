"""CIFAR-10 networks on integers: accuracy in ONNX Runtime after calibration and after training, latency, and what a training step costs.

    python -m benchmarks.quantization ptq --depths 20 56                 # minutes
    python -m benchmarks.quantization qat --configurations w4a8 w4a4     # resumes after every epoch; half an hour on one core each
    python -m benchmarks.quantization peers                              # ONNX Runtime's own quantizer, and NNCF where it is installed
    python -m benchmarks.quantization latency                            # minutes; leave the machine alone
    python -m benchmarks.quantization step                               # a minute, likewise
    python -m benchmarks.quantization table

Figures are of the test images, which no choice looks at; calibration uses training images, drawn at random.  Needs the data of the
recipe ``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import quantizers as peers
from benchmarks import records
from curvepress.export import compare_latency, to_onnx
from curvepress.export.integers import to_integer_onnx
from curvepress.export.onnx import open_session
from curvepress.quantized import Bits, bits_from_json, calibrate, layout, packed, quantize
from curvepress.training import fit
from curvepress_recipes import cifar10 as recipe

HERE = Path(__file__).parent / "results"
FILE, MODELS = HERE / "quantization.jsonl", Path("runs/benchmarks/quantization")
EXAMPLES = 512
"""Training images that activations are calibrated on."""
ENDS = {"weights": {"conv1.weight": 8, "linear.weight": 8}, "sites": {"x": 8, "adaptive_avg_pool2d": 8}}
"""The usual exception of the literature: the first and the last layer in eight bits."""
CONFIGURATIONS = {
    "w8a8": Bits(),
    "w4a8": Bits(weight=4, **ENDS),
    "w4a4": Bits(weight=4, product=4, **ENDS),
    "w3a8": Bits(weight=3, **ENDS),
}
TRAINING = {"epochs": 2, "lr": 0.002, "weight_decay": 1e-4, "distill_weight": 0.9, "temperature": 4.0, "clip_norm": 1.0}


def ptq(depths: list[int], configurations: list[str], seed: int = 0) -> None:
    """Calibrate, export, and test in ONNX Runtime whatever has no record yet."""
    for depth in depths:
        model = recipe.model(depth=depth)
        for name in configurations:
            key = {"depth": depth, "configuration": name, "method": "ptq", "seed": seed}
            print(records.once(FILE, key, lambda model=model, key=key: _tested(_calibrated(model, key), key)), flush=True)


def qat(depth: int, configurations: list[str], epochs: int, lr: float, seed: int = 0) -> None:
    """Train what calibration gave, with the float network as the teacher; export, and test in ONNX Runtime."""
    model = recipe.model(depth=depth)
    for name in configurations:
        key = {"depth": depth, "configuration": name, "method": "qat", "seed": seed, **TRAINING, "epochs": epochs, "lr": lr}
        print(records.once(FILE, key, lambda key=key: _trained(model, key)), flush=True)


def _bits(name: str) -> Bits:
    return bits_from_json(Path(name).read_text()) if name.endswith(".json") else CONFIGURATIONS[name]


def _calibrated(model: nn.Module, key: dict[str, Any]) -> nn.Module:
    module = quantize(model, _bits(key["configuration"]), recipe.example())
    return calibrate(module, recipe.batches("calibration", seed=key["seed"] + 1), examples=EXAMPLES)


def _trained(model: nn.Module, key: dict[str, Any]) -> dict[str, Any]:
    start = time.process_time()
    settings = {k: key[k] for k in TRAINING}
    module = fit(
        _calibrated(model, key),
        recipe.loss,
        partial(recipe.batches, "train"),
        teacher=model,
        seed=key["seed"],
        checkpoints=MODELS / _label(key),
        progress=lambda epoch: print(epoch, flush=True),
        **settings,
    ).model
    return {"train_cpu_seconds": time.process_time() - start} | _tested(module, key)


def _label(key: dict[str, Any]) -> str:
    trained = f"-{key['epochs']}-{key['lr']}" if key["method"] == "qat" else ""
    return f"resnet{key['depth']}-{Path(key['configuration']).stem}-{key['method']}-{key['seed']}{trained}"


def _tested(module: nn.Module, key: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the file in ONNX Runtime and of the simulation, how many predictions they share, sizes and kernels."""
    path = MODELS / f"{_label(key)}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    agreement = to_integer_onnx(module, recipe.batches("calibration", seed=key["seed"] + 2), path, examples=128)
    packed.save(module, path.with_suffix(".safetensors"))
    found, simulated, labels = _predictions(path), _simulated(module), _labels()
    weights = layout(module).weights
    bits = _bits(key["configuration"])
    payload = sum(w.size * (bits.of_weight(w.name) or 32) for w in weights) / 8
    return {
        "accuracy": _percent(found == labels),
        "simulated": _percent(simulated == labels),
        "same": _percent(found == simulated),
        "kernels": str(agreement.kernels),
        "float": dict(agreement.kernels.float),
        "onnx_bytes": agreement.bytes,
        "packed_bytes": path.with_suffix(".safetensors").stat().st_size,
        "payload_bytes": payload,
        "weight_bits": 8 * payload / sum(w.size for w in weights),
        "float_weight_bytes": 4 * sum(w.size for w in weights),
    }


def _percent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 4)


def _labels() -> np.ndarray:
    return np.concatenate([labels.numpy() for _, labels in recipe.batches("test", batch_size=250)])


def _predictions(path: Path) -> np.ndarray:
    session = open_session(path)
    name = session.get_inputs()[0].name
    batches = recipe.batches("test", batch_size=250)
    return np.concatenate([session.run(None, {name: x.contiguous().numpy()})[0].argmax(1) for x, _ in batches])


def _simulated(module: nn.Module) -> np.ndarray:
    module.eval()
    with torch.inference_mode():
        return np.concatenate([module(x).argmax(1).numpy() for x, _ in recipe.batches("test", batch_size=250)])


def original(depths: list[int]) -> None:
    """The float networks in ONNX Runtime."""
    for depth in depths:
        path = MODELS / f"resnet{depth}-float.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            to_onnx(recipe.model(depth=depth), recipe.example(), path)
        key = {"depth": depth, "configuration": "float", "method": "none"}
        print(records.once(FILE, key, lambda path=path: {"accuracy": _percent(_predictions(path) == _labels())}), flush=True)


def compare_peers(depths: list[int]) -> None:
    """Other quantizers on the same calibration images, tested in ONNX Runtime."""
    for depth in depths:
        for name, write in peers.PEERS.items():
            path = MODELS / f"resnet{depth}-{name}.onnx"
            key = {"depth": depth, "configuration": "w8a8", "method": name}
            print(records.once(FILE, key, lambda path=path, write=write, depth=depth: _peer(depth, path, write)), flush=True)


def _peer(depth: int, path: Path, write: Callable[..., None]) -> dict[str, Any]:
    images = [x.contiguous() for (x, _), _ in zip(recipe.batches("calibration", seed=1), range(EXAMPLES // 128), strict=False)]
    try:
        write(recipe.model(depth=depth), MODELS / f"resnet{depth}-float.onnx", images, path)
    except peers.Missing as reason:
        return {"missing": str(reason)}
    found = _predictions(path)
    return {"accuracy": _percent(found == _labels()), "kernels": peers.kernels(path), "onnx_bytes": path.stat().st_size}


def latency(depths: list[int]) -> None:
    """ONNX Runtime and OpenVINO, one thread, every file in turns with the float one."""
    x = next(iter(recipe.batches("test", batch_size=32)))[0].contiguous().numpy()
    for depth in depths:
        label = _label({"depth": depth, "configuration": "w8a8", "method": "ptq", "seed": 0})
        paths = {"float": MODELS / f"resnet{depth}-float.onnx", "w8a8": MODELS / f"{label}.onnx"}
        paths |= {name: path for name in peers.PEERS if (path := MODELS / f"resnet{depth}-{name}.onnx").exists()}
        for timing in compare_latency(paths, x, batches=(1, 32), rounds=60, seconds=60):
            key = {"depth": depth, "runtime": "onnxruntime", "file": timing.name, "batch": timing.batch}
            print(records.once(FILE, key, lambda t=timing: _times(t.wall.median, t.ratio)), flush=True)
        for timing in peers.compare_in_openvino(paths, x, batches=(1, 32)):
            key = {"depth": depth, "runtime": "openvino", "file": timing.name, "batch": timing.batch}
            print(records.once(FILE, key, lambda t=timing: _times(t.wall.median, t.ratio)), flush=True)


def _times(milliseconds: float, ratio: Any) -> dict[str, Any]:
    return {"milliseconds": milliseconds, "faster": 1 / ratio.median, "quartiles": [1 / ratio.high, 1 / ratio.low]}


def step(rounds: int = 12) -> None:
    """Processor time of a training step on 128 images, quantized over float, in turns."""
    model, batch = recipe.model(), next(iter(recipe.batches("train")))
    bits = CONFIGURATIONS["w4a4"]
    modules = {
        "float": model,
        "learned": quantize(model, bits, recipe.example()),
        "fixed": quantize(model, bits, recipe.example(), learn=False),
    }
    for name in ("learned", "fixed"):
        calibrate(modules[name], [batch])
    steps = {name: _stepper(module, batch) for name, module in modules.items()}
    spent = np.array([[_cpu(steps[name]) for name in steps] for _ in range(rounds + 1)])[1:]
    ratios = {name: median(spent[:, n] / spent[:, 0]) for n, name in enumerate(steps)}
    print(records.once(FILE, {"what": "step", "rounds": rounds}, lambda: {"seconds": median(spent[:, 0]), "ratio": ratios}))


def _stepper(module: nn.Module, batch: Any) -> Callable[[], None]:
    module.train()
    descent = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-4, 0.9)

    def step() -> None:
        descent.zero_grad()
        recipe.loss(module(batch[0]), batch[1]).backward()
        descent.step()

    return step


def _cpu(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def table() -> None:
    """Print all records as the documentation shows them."""
    rows = records.read(FILE)
    floats = {r["depth"]: r["accuracy"] for r in rows if r.get("configuration") == "float"}
    _print("network", "bits", "how", "test accuracy", "drop", "same as simulation", "kernels", "packed bytes, smaller")
    for r in (r for r in rows if "accuracy" in r):
        _print(*_accuracy_row(r, floats.get(r["depth"], float("nan"))), rule=False)
    _print("network", "runtime", "file", "batch", "ms", "times faster", "quartiles")
    for r in (r for r in rows if "runtime" in r):
        low, high = r["quartiles"]
        times = f"{r['milliseconds']:.3f}", f"{r['faster']:.2f}", f"{low:.2f}–{high:.2f}"
        _print(f"ResNet-{r['depth']}", r["runtime"], r["file"], str(r["batch"]), *times, rule=False)
    for ratio in (r["ratio"] for r in rows if r.get("what") == "step"):
        print(f"\nA step takes {ratio['learned']:.2f} times that in float with learned scales, {ratio['fixed']:.2f} with fixed ones.")


def _accuracy_row(r: dict[str, Any], original: float) -> tuple[str, ...]:
    how = f"{r['method']}, {r['epochs']} epochs" if "epochs" in r else r["method"]
    same = f"{r['same']:.2f} %" if "same" in r else "–"
    small = f"{r['packed_bytes']:,}, {r['float_weight_bytes'] / r['packed_bytes']:.1f}×" if "packed_bytes" in r else "–"
    accuracy = f"{r['accuracy']:.2f}", f"{original - r['accuracy']:+.2f}"
    return (f"ResNet-{r['depth']}", r["configuration"], how, *accuracy, same, r.get("kernels", "–"), small)


def _print(*cells: str, rule: bool = True) -> None:
    print(("\n" if rule else "") + f"| {' | '.join(cells)} |" + ("\n" + "|---" * len(cells) + "|" if rule else ""))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ptq", "qat", "peers", "latency", "step", "table"))
    parser.add_argument("--depths", type=int, nargs="+", default=[20])
    parser.add_argument("--configurations", nargs="+", default=["w8a8"], help="names, or JSON files of bits")
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--lr", type=float, default=TRAINING["lr"])
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.what in ("ptq", "peers", "latency"):
        original(o.depths)
    {
        "ptq": lambda: ptq(o.depths, o.configurations, o.seed),
        "qat": lambda: qat(o.depths[0], o.configurations, o.epochs, o.lr, o.seed),
        "peers": lambda: compare_peers(o.depths),
        "latency": lambda: latency(o.depths),
        "step": step,
        "table": table,
    }[o.what]()


if __name__ == "__main__":
    main()
