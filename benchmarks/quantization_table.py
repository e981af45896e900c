"""Records of quantization as Markdown: everything that was measured, and the figures that were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]
IN_ONNXRUNTIME = "float in ONNX Runtime"
ROUNDING = {"w8a8": "nearest"}
"""Of the weights whose figures are shown among the required ones; adaptive where it is not named here."""


def table(rows: Sequence[Record]) -> None:
    """Print accuracies, sizes and kernels of everything that was measured."""
    floats = _floats(rows)
    heads = ("network", "bits", "how", "test accuracy", "drop", "same as simulation", "kernels", "packed bytes, smaller")
    show(heads, [_row(r, floats.get(r["network"], float("nan"))) for r in rows if "accuracy" in r])


def _floats(rows: Sequence[Record]) -> dict[str, float]:
    return {r["network"]: r["accuracy"] for r in rows if r.get("configuration") == "float"}


def _row(r: Record, original: float) -> tuple[str, ...]:
    how = ", ".join(str(x) for x in (r["method"], r.get("rounding"), _epochs(r)) if x)
    same = f"{r['same']:.2f} %" if "same" in r else "–"
    small = f"{r['packed_bytes']:,}, {r['float_weight_bytes'] / r['packed_bytes']:.1f}×" if "packed_bytes" in r else "–"
    accuracy = f"{r['accuracy']:.2f}", f"{original - r['accuracy']:+.2f}"
    return (r["network"], r["configuration"], how, *accuracy, same, r.get("kernels", "–"), small)


def _epochs(r: Record) -> str:
    return f"{r['eighths'] / 8:g} epoch{'s' if r['eighths'] > 8 else ''}" if "eighths" in r else ""


def required(rows: Sequence[Record], speed: Sequence[Record], bits: Sequence[Record]) -> None:
    """Print each figure that was asked for beside the one that was measured."""
    lines = [*_drops(rows), *_peers(rows), *_mixed(bits), *_exactness(rows), *_latencies(speed), *_step(speed), *_bytes(rows)]
    show(("figure", "required", "measured"), lines)


def _drops(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    floats = _floats(rows)
    asked = (
        *((f"{n}, W8A8, calibrated", n, "w8a8", 0.1) for n in ("ResNet-20", "ResNet-56")),
        ("EfficientNet-Lite0, W8A8, calibrated, 500 images", "EfficientNet-Lite0", "w8a8", 1.0),
        *((f"ResNet-20, {c.upper()}", "ResNet-20", c, limit) for c, limit in (("w4a8", 0.2), ("w4a4", 0.6))),
        ("ResNet-20, mixed 2 to 8 bits, 3 on average, A8", "ResNet-20", "mixed3", 1.0),
    )
    for what, network, configuration, limit in asked:
        ours = [r for r in rows if (r["network"], r["configuration"]) == (network, configuration) and r["method"] in ("ptq", "qat")]
        cells = [_drop(r, floats[network]) for r in ours if r["rounding"] == ROUNDING.get(configuration, "adaptive")]
        yield f"{what}: drop", f"≤ {limit}", "; ".join(cells) or "not measured"


def _peers(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    floats = _floats(rows)
    for r in (r for r in rows if r["method"] not in ("none", "ptq", "qat")):
        found = r.get("missing") or f"{floats[r['network']] - r['accuracy']:+.2f} ({r['accuracy']:.2f} %; {r['kernels']})"
        yield f"{r['network']}, W8A8 by {r['method']}, for comparison: drop", "–", found


def _drop(r: Record, original: float) -> str:
    how = f"trained, {_epochs(r)}" if r["method"] == "qat" else f"calibrated, rounding {r['rounding']}"
    return f"{original - r['accuracy']:+.2f} ({how}: {r['accuracy']:.2f} %)"


def _mixed(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    for network in ("ResNet-20", "ResNet-56"):
        for rounding in ("nearest", "adaptive"):
            found = {r["bits"]: r["accuracy"] for r in rows if (r["network"], r["average"], r["rounding"]) == (network, 3, rounding)}
            for other in ("uniform", "reversed"):
                if other in found and "direction" in found:
                    what = f"{network}, 3 bits on average, nothing trained, rounding {rounding}: chosen against {other}"
                    yield what, "≥ 1 point", f"{found['direction'] - found[other]:+.1f}"


def _exactness(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    for network in ("ResNet-20", "ResNet-56", "EfficientNet-Lite0"):
        ours = [r for r in rows if r["network"] == network and "same" in r]
        if ours:
            least = min(ours, key=lambda r: r["same"])
            yield f"{network}: same predictions, ONNX Runtime and simulation", "≥ 99.5 %", f"{least['same']:.2f} % at worst"
            whole = [r for r in ours if r["configuration"] == "w8a8"]
            left = sum(len(r["float"]) for r in whole)
            yield f"{network}, W8A8: products left in float", "0", f"{left} ({whole[0]['kernels']})"


def _latencies(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    asked = {("onnxruntime", 1): ("ONNX Runtime, batch 1", "≥ 2.0"), ("openvino", 32): ("OpenVINO, batch 32", "≥ 3.0")}
    for r in (r for r in rows if (r.get("runtime"), r.get("batch")) in asked):
        what, limit = asked[r["runtime"], r["batch"]]
        ours = r["files"]["w8a8"]
        others = [f"{name}'s file {t['cpu_faster']:.2f}" for name, t in r["files"].items() if name not in ("float", "w8a8", IN_ONNXRUNTIME)]
        if base := r["files"].get(IN_ONNXRUNTIME):
            others.append(f"{ours['cpu_faster'] / base['cpu_faster']:.2f} against float in ONNX Runtime")
        found = "; ".join((f"{ours['cpu_faster']:.2f} by processor time, {ours['faster']:.2f} by the clock", *others))
        yield f"{r['network']}, W8A8 against float, {what}, one thread", limit, found


def _step(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    for r in (r for r in rows if r.get("what") == "step"):
        yield f"{r['network']}: training step, learned scales, against float", "≤ 1.6", f"{r['ratio']['learned'][1]:.2f}"


def _bytes(rows: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    for r in (r for r in rows if r.get("configuration") == "mixed3"):
        ratio, bits = r["float_weight_bytes"] / r["packed_bytes"], r["weight_bits"]
        yield f"ResNet-20, {bits:.2f} bits on average ({r['method']}): file against float weights", "≥ 9.5", f"{ratio:.1f}"


def show(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table."""
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
