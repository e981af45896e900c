"""Networks on integers: accuracy in ONNX Runtime after calibration and after training, beside other quantizers, and what was required.

    python -m benchmarks.quantization ptq --networks ResNet-20 ResNet-56 EfficientNet-Lite0      # minutes
    python -m benchmarks.quantization peers --networks ResNet-20 ResNet-56 EfficientNet-Lite0    # those that are installed
    python -m benchmarks.quantization qat --configurations w4a8 w4a4 mixed3 --eighths 16      # two epochs; resumes after every eighth
    python -m benchmarks.quantization table
    python -m benchmarks.quantization required    # the figures that were asked for

Latency and the cost of a training step are measured by ``benchmarks.quantization_speed``.  Figures are of the test images, which no
choice looks at; calibration uses training images, drawn at random.  Needs the data of the recipes ``cifar10`` and ``imagenette``
(``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import bits as chosen
from benchmarks import quantizers as peers
from benchmarks import records
from benchmarks.networks import MODELS, NETWORKS, float_accuracy, labels, original, percent, predictions, simulated
from benchmarks.quantization_table import required, table
from curvepress.export.integers import to_integer_onnx
from curvepress.quantization.bitwidths import layout_of
from curvepress.quantization.quantized import Bits, bits_from_json, calibrate, layout, observe, packed, quantize, sums_in_float
from curvepress.quantization.quantized.modules import ActivationQuantizer, quantizers
from curvepress.quantization.requantization import ROUNDINGS, requantize
from curvepress.training.fitting import Epoch, fit

FILE = Path(__file__).parent / "results" / "quantization.jsonl"
EXAMPLES = 512
"""Training images that activations are calibrated on."""
EIGHTH = 8
TRAINING = {"lr": 0.002, "weight_decay": 1e-4, "distill_weight": 0.9, "temperature": 4.0, "clip_norm": 1.0}


def bits(network: str, configuration: str) -> Bits:
    """The bits that a name stands for.

    ``w4a8``: weights of 4 and activations of 8 bits, the first and the last layer of 8 as in the literature; ``mixed3``: chosen by
    curvature, 3 bits on average with no exceptions; or the name of a JSON file.
    """
    if configuration.endswith(".json"):
        return bits_from_json(Path(configuration).read_text())
    if configuration == "mixed3":
        path = MODELS / f"{network}-mixed3.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(chosen.choice(network, 3, "direction").bits.to_json())
        return bits_from_json(path.read_text())
    weight, product = int(configuration[1]), int(configuration[3])
    of = NETWORKS[network]
    sites = dict.fromkeys((*of.entry, of.last[1]), 8)
    found = Bits(weights={of.first: 8, of.last[0]: 8}, sites=sites, weight=weight, product=product)
    return replace(found, sites={**sites, **dict.fromkeys(sums_in_float(layout_of(of.model(), of.recipe.example())))})


def ptq(network: str, configuration: str, rounding: str, seed: int) -> records.Record:
    """Calibrate, export, and test in ONNX Runtime."""
    key = {"network": network, "configuration": configuration, "method": "ptq", "rounding": rounding, "seed": seed}
    return records.once(FILE, key, lambda: _tested(_calibrated(key), key))


def qat(
    network: str, configuration: str, rounding: str, seed: int, *, eighths: int, lr: float | None, minutes: float, ends: bool = True
) -> records.Record:
    """Train what calibration gave for eighths of an epoch, with the float network as the teacher; export, and test in ONNX Runtime.

    ``ends``: whether the lower ends of activations learn, beside their scales.
    """
    what = {"network": network, "configuration": configuration, "method": "qat", "rounding": rounding, "seed": seed}
    own = {"lr": lr} if lr else {}
    key = {**what, "eighths": eighths, **TRAINING, **NETWORKS[network].descent, **own, **({} if ends else {"ends": "fixed"})}
    return records.once(FILE, key, lambda: _trained(key, minutes))


@dataclass(frozen=True)
class Eighth:
    """The first eighth of the batches of an epoch, which are in another order each time."""

    batches: Sequence[Any]

    def __len__(self) -> int:
        return len(self.batches) // EIGHTH

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), len(self))


def _calibrated(key: records.Record) -> nn.Module:
    of = NETWORKS[key["network"]]
    module = quantize(of.model(), bits(key["network"], key["configuration"]), of.recipe.example())
    seen = observe(module, of.calibration(key["seed"] + 1), examples=EXAMPLES)
    calibrate(module, seen)
    requantize(module, of.calibration(key["seed"] + 1), method=key["rounding"], examples=EXAMPLES)
    return calibrate(module, seen).eval()


def _trained(key: records.Record, minutes: float) -> records.Record:
    of, start = NETWORKS[key["network"]], time.monotonic()
    settings, module = {k: key[k] for k in (*TRAINING, *of.descent)}, _start(key)
    for quantizer in quantizers(module):
        if isinstance(quantizer, ActivationQuantizer) and "ends" in key:
            quantizer.offset.requires_grad_(False)

    def progress(epoch: Epoch) -> None:
        print(epoch, flush=True)
        if epoch.epoch < key["eighths"] and time.monotonic() - start + epoch.seconds > 60 * minutes:
            sys.exit(f"{minutes:g} minutes are nearly over; the same command goes on")

    trained = fit(
        module,
        of.recipe.loss,
        lambda seed: Eighth(of.train(seed)),
        epochs=key["eighths"],
        teacher=of.model(),
        seed=key["seed"],
        checkpoints=MODELS / _label(key),
        progress=progress,
        **settings,
    )
    return {"train_seconds": sum(e.seconds for e in trained.history)} | _tested(trained.model, key)


def _start(key: records.Record) -> nn.Module:
    """What calibration gave, from the file of ``ptq`` where there is one."""
    of, path = NETWORKS[key["network"]], MODELS / f"{_label({**key, 'method': 'ptq'})}.safetensors"
    if not path.exists():
        packed.save(_calibrated(key), path)
    return packed.load(of.model(), of.recipe.example(), path)


def _label(key: records.Record) -> str:
    trained = f"-{key['eighths']}-{key['lr']}{'-fixed' * ('ends' in key)}" if key["method"] == "qat" else ""
    return f"{key['network']}-{Path(key['configuration']).stem}-{key['method']}-{key['rounding']}-{key['seed']}{trained}"


def _tested(module: nn.Module, key: records.Record) -> records.Record:
    """Accuracy of the file in ONNX Runtime and of the simulation, how many predictions they share, sizes and kernels."""
    of, path = NETWORKS[key["network"]], MODELS / f"{_label(key)}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    agreement = to_integer_onnx(module, of.calibration(key["seed"] + 2), path, examples=128)
    packed.save(module, path.with_suffix(".safetensors"))
    found, simulation, right = predictions(of, path), simulated(of, module), labels(of)
    weights, given = layout(module).weights, bits(key["network"], key["configuration"])
    payload = sum(w.size * (given.of_weight(w.name) or 32) for w in weights) / 8
    return {
        "accuracy": percent(found == right),
        "simulated": percent(simulation == right),
        "same": percent(found == simulation),
        "kernels": str(agreement.kernels),
        "float": dict(agreement.kernels.float),
        "onnx_bytes": agreement.bytes,
        "packed_bytes": path.with_suffix(".safetensors").stat().st_size,
        "payload_bytes": payload,
        "weight_bits": 8 * payload / sum(w.size for w in weights),
        "float_weight_bytes": 4 * sum(w.size for w in weights),
    }


def peer(network: str, name: str) -> records.Record:
    """Another quantizer on the same calibration images, tested in ONNX Runtime."""
    return records.once(
        FILE, {"network": network, "configuration": "w8a8", "method": name}, lambda: _peer(network, name, peers.PEERS[name])
    )


def _peer(network: str, name: str, write: Callable[..., None]) -> records.Record:
    of, path = NETWORKS[network], MODELS / f"{network}-{name}.onnx"
    batches = zip(of.calibration(1), range(EXAMPLES // of.training), strict=False)
    try:
        write(of.model(), original(network), [x.contiguous() for (x, _), _ in batches], path)
    except peers.Missing as reason:
        return {"missing": str(reason)}
    accuracy = percent(predictions(of, path) == labels(of))
    return {"accuracy": accuracy, "kernels": peers.kernels(path), "onnx_bytes": path.stat().st_size}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ptq", "qat", "peers", "table", "required"))
    parser.add_argument("--networks", nargs="+", default=["ResNet-20"], choices=NETWORKS)
    parser.add_argument("--configurations", nargs="+", default=["w8a8"], help="w4a8 and so on, mixed3, or JSON files of bits")
    parser.add_argument("--rounding", default="adaptive", choices=ROUNDINGS)
    parser.add_argument("--peers", nargs="+", default=[*peers.PEERS], choices=peers.PEERS)
    parser.add_argument("--eighths", type=int, default=2 * EIGHTH, help="of an epoch that is trained for")
    parser.add_argument("--lr", type=float, help="the network's own where not given")
    parser.add_argument("--fixed-ends", action="store_true", help="lower ends of activations do not learn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of training, at most: ends between two eighths")
    o = parser.parse_args()
    torch.set_num_threads(1)
    if o.what == "table":
        return table(records.read(FILE))
    if o.what == "required":
        return required(*(records.read(FILE.parent / f"{name}.jsonl") for name in ("quantization", "quantization_speed", "bits")))
    for network in o.networks:
        print(network, "in float", float_accuracy(FILE, network), flush=True)
        for configuration in o.configurations if o.what in ("ptq", "qat") else ():
            options = {} if o.what == "ptq" else {"eighths": o.eighths, "lr": o.lr, "minutes": o.minutes, "ends": not o.fixed_ends}
            print({"ptq": ptq, "qat": qat}[o.what](network, configuration, o.rounding, o.seed, **options), flush=True)
        for name in o.peers if o.what == "peers" else ():
            print(peer(network, name), flush=True)
    return None


if __name__ == "__main__":
    main()
