"""What a published system made of a model, stage by stage: accuracy, parameters, multiply-accumulates, bytes, latency; as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from ..costs import cost
from ..export import compare_latency
from ..export.running import Running
from ..files import write_text
from ..plan import Plan, dumps
from ..runs.artifacts import read_json
from ..runs.desk import Desk
from ..stages.findings import HISTORY, PRUNED, REPAIRED, environment
from ..stages.pipeline import METRICS, ORIGINAL
from ..stages.quantizing import QUANTIZED, float_model
from ..stages.sessions import BATCHES
from .thresholds import shares

REPRODUCTION = {"format": "curvepress reproduction", "version": 1}
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Account:
    """A model on the way: metrics of the validation and, of what counts, of the test images; sizes; latency by batch size.

    ``latency`` has the lower quartile, median and upper quartile of the ratio to the original's file, in turns; empty where a model of the
    same shape is timed in a later row.  ``bytes`` is the size of ``file``.
    """

    stage: str
    file: str
    validation: Metrics
    params: int
    macs: int
    bytes: int
    test: Metrics
    latency: Mapping[str, tuple[float, float, float]]


def accounted(desk: Desk, settings: Mapping[str, Any]) -> None:
    """The work of the last stage: the figures of all others, the test images of the integer file, and latency of all files in turns."""
    rows = accounts(desk, settings["threads"])
    facts = {**shares(desk.plan())} if _pruned_at_all(desk) else {}
    facts |= {"average bits": read_json(desk.path("quantized.json"), QUANTIZED)["choice"]["average"]} if _quantized_at_all(desk) else {}
    about = {k: settings[k] for k in ("system", "corrected", "settings", "more", "seed")}
    done = {"stages": [asdict(r) for r in rows], "facts": facts, "seconds": {n: e.taken for n, e in desk.run.stages.items()}}
    write_text(desk.path("reproduction.json"), dumps({**REPRODUCTION, **about, **done, "environment": environment(desk.run.stages)}))


def accounts(desk: Desk, threads: int) -> list[Account]:
    """The stages of any run that has pruned or quantized, or both; the test images are looked at, and all files timed in turns."""
    times, pruned = _raced(desk, threads), _pruned_at_all(desk)
    return [*(_pruned(desk, times) if pruned else ()), *(_quantized(desk, times, first=not pruned) if _quantized_at_all(desk) else ())]


def _pruned_at_all(desk: Desk) -> bool:
    return desk.path("pruned.json").exists()


def _quantized_at_all(desk: Desk) -> bool:
    return desk.path("quantized.json").exists()


def _pruned(desk: Desk, times: Mapping[str, Any]) -> Iterator[Account]:
    plan = desk.plan()
    before, after = cost(Plan(plan.structure)), cost(plan)
    test = read_json(desk.path("metrics.json"), METRICS)["test"]
    cut, started = read_json(desk.path("pruned.json"), PRUNED), read_json(desk.path("repaired.json"), REPAIRED)
    history = read_json(desk.path("history.json"), HISTORY)
    whole = read_json(desk.path("original.json"), ORIGINAL)["validation"]

    def row(stage: str, file: str, validation: Metrics, **more: Any) -> Account:
        now = before if file.startswith("original") else after
        return Account(stage, file, validation, now.params, now.macs, _size(desk, file), more.get("test", {}), more.get("latency", {}))

    yield row("original", "original.safetensors", whole, test=test["original"], latency=times.get("original.onnx", {}))
    yield row("pruned", "pruned.safetensors", cut["validation"]["re-estimated"])
    for name, metrics in started["validation"].items():
        yield row(name, "repaired.safetensors", metrics)
    yield row("fine-tuned", "model.safetensors", history["validation"], test=test["recovered"], latency=times.get("model.onnx", {}))


def _quantized(desk: Desk, times: Mapping[str, Any], *, first: bool) -> Iterator[Account]:
    facts = read_json(desk.path("quantized.json"), QUANTIZED)
    params, macs = (sum(w[k] for w in facts["weights"]) for k in ("elements", "multiply-accumulates"))
    model, found = float_model(desk), facts["validation"]
    running = Running(desk.path("quantized.onnx"), model, *desk.recipe.inputs())

    def row(stage: str, file: str, validation: Metrics, **more: Any) -> Account:
        return Account(stage, file, validation, params, macs, _size(desk, file), more.get("test", {}), more.get("latency", {}))

    if first:
        test = desk.recipe.metrics(model, "test")
        yield row("float", "float.safetensors", found["float"], test=test, latency=times.get("float.onnx", {}))
    for stage in ("calibrated", "trained"):
        if stage in found:
            yield row(stage, "quantized.safetensors", found[stage])
    test = desk.recipe.metrics(running, "test")
    yield row("integers", "quantized.onnx", found["onnxruntime"], test=test, latency=times.get("quantized.onnx", {}))


def _size(desk: Desk, file: str) -> int:
    return desk.path(file).stat().st_size


def _raced(desk: Desk, threads: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Quartiles of the latency of every file over that of the first, by file and batch size."""
    names = ("original.onnx", "model.onnx", "quantized.onnx") if desk.path("original.onnx").exists() else ("float.onnx", "quantized.onnx")
    paths = {n: desk.path(n) for n in names if desk.path(n).exists()}
    latency = read_json(desk.path("latency.json"), {}) if desk.path("latency.json").exists() else {}
    static = [a["sizes"][0] for a in latency.get("agreement", {}).values() if a["batch"] == "static"]
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    example = tree_map(Tensor.numpy, desk.recipe.inputs())
    for t in compare_latency(paths, example, threads=threads, batches=tuple(static[:1]) or BATCHES):
        found.setdefault(t.name, {})[str(t.batch)] = (t.ratio.low, t.ratio.median, t.ratio.high)
    return found
