"""Quantization as stages: each reads files of the run folder, calls the library, and writes files there.

What each reads and writes is listed in ``runs.QUANTIZATION``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import curvature
from ..curvature import Stop
from ..export import compare_latency, to_onnx
from ..export.integers import to_integer_onnx
from ..export.openvino import check_in_openvino, version_of_openvino
from ..export.program import to_program
from ..export.running import Running
from ..files import write_text
from ..metering import clock
from ..plan import Plan, dumps, from_json, to_json
from ..quantization.allocation import Allocation, allocate, allocation, refuse_unrunnable, runnable, uniform
from ..quantization.bitwidths import BitPrices, Price, bit_prices, layout_of, left_in_float, prices_from_dict, prices_to_dict
from ..quantization.quantized import Bits, Layout, Site, Weight, bits_from_json, calibrate, layout, observe, packed, sums_in_float
from ..quantization.quantized import quantize as quantized
from ..quantization.requantization import requantize
from ..runs.artifacts import fill, load, read_json, restore, save
from ..runs.desk import Desk
from ..runs.folder import open_run, require, scratch
from ..runs.recipe import check
from ..runs.settings import descent
from ..training.fitting import fit

Settings = Mapping[str, Any]
FLOAT = {"format": "curvepress model before quantization", "version": 1}
TRAINED = {"format": "curvepress quantization", "version": 1}
QUANTIZED = {"format": "curvepress quantized model", "version": 1}
CLIP_NORM = 1.0
COMPARED = 256
"""Validation examples on which the file and the simulation are compared."""
EXPORTS = ("onnx", "openvino", "pt2")
"""``onnx`` is written in any case, ``openvino`` reads the same file, ``pt2`` is a program of ``torch.export``."""
BUDGETS = ("bytes", "average", "bops", "rise")
PRICED: Settings = {
    "price": "direction", "examples": 512, "temperature": 1.0, "in_float": [], "float_sums": False,
    "asymmetric": False, "per_tensor": False,
}  # fmt: skip
CHOSEN: Settings = {
    **dict.fromkeys(("bits", "average", "bytes", "bops", "rise", "given", "group")), "activations": [8], "target": "storage",
    "dynamic": False, "asymmetric": False, "per_tensor": False,
}  # fmt: skip
"""What the stages ``price`` and ``choose`` do where nothing else is said."""
Model = tuple[nn.Module, Plan | None]


def _load(desk: Desk, settings: Settings) -> None:
    model, plan = _given(desk, settings["source"])
    validation = desk.recipe.metrics(model, "validation")
    save(model, desk.path("float.safetensors"))
    facts = {"plan": json.loads(to_json(plan)) if plan else None, "source": settings["source"], "validation": validation}
    write_text(desk.path("float.json"), dumps({**FLOAT, **facts}))


def _given(desk: Desk, source: str | None) -> Model:
    """The model to be quantized: the recipe's, or the compressed one of another run."""
    if source is not None:
        other = Desk(open_run(Path(source)), desk.recipe)
        require(other.run, "export")
        return other.compressed("model.safetensors"), other.plan()
    model = desk.recipe.build(trained=True)
    check(desk.recipe, model)
    try:
        fill(desk.recipe.build(trained=False), model)
    except ValueError as error:
        raise ValueError(f"{desk.recipe.name}: model(trained=False) makes another model than model(): {error}") from error
    return model, None


def float_model(desk: Desk) -> nn.Module:
    """The model before quantization.

    Raises:
        ValueError: if the recipe makes another model now.
    """
    plan, path = read_json(desk.path("float.json"), FLOAT)["plan"], desk.path("float.safetensors")
    fresh = desk.recipe.build(trained=False)
    if plan is None:
        return load(fresh, path).eval()
    return restore(fresh, from_json(json.dumps(plan)), path, *desk.recipe.inputs())


def _price(desk: Desk, settings: Settings) -> None:
    recipe = desk.recipe
    given: dict[str, Any] = {k: settings[k] for k in ("price", "asymmetric", "per_tensor", "temperature", "seed")}
    batches, model = recipe.batches("calibration", seed=settings["seed"]), float_model(desk)
    stop = Stop(examples=settings["examples"])
    given["in_float"] = _in_float(layout_of(model, recipe.inputs()), settings["in_float"], settings["float_sums"])
    prices = bit_prices(model, recipe.loss, batches, recipe.inputs(), stop=stop, progress=lambda p: _forecast(desk, p), **given)
    desk.note(prices.detail)
    write_text(desk.path("prices.json"), dumps(prices_to_dict(prices)))


def _in_float(what: Layout, names: Sequence[str], float_sums: bool) -> list[str]:
    """What stays in float: what is named, and sums that gain nothing by a grid."""
    return [*names, *(n for n in (sums_in_float(what) if float_sums else ()) if n not in names)]


def _forecast(desk: Desk, progress: curvature.Progress) -> None:
    desk.progress("calibration batches", progress.samples, progress.wanted or progress.samples)
    if progress.samples == 1 and progress.expected is not None:
        desk.note(f"at most {clock(progress.expected)} more and {progress.peak / 2**20:.0f} MiB, from the first batch")


def _choose(desk: Desk, settings: Settings) -> None:
    found = chosen(load_prices(desk), settings)
    bits = replace(found.bits, **{k: settings[k] for k in ("group", "dynamic", "asymmetric", "per_tensor")})
    write_text(desk.path("bits.json"), dumps(json.loads(bits.to_json())))


def load_prices(desk: Desk) -> BitPrices:
    """The prices in the folder."""
    return prices_from_dict(read_json(desk.path("prices.json"), {}))


def chosen(prices: BitPrices, settings: Settings) -> Allocation:
    """The bits that the settings ask for: those of a text, or the best that cost no more; the same for all; or the best within budgets.

    Raises:
        ValueError: if bits have no price, or nothing fits.
    """
    if settings["given"] is not None:
        found = allocation(prices, bits_from_json(settings["given"]))
        found = _spread_anew(prices, found, settings["spread"]) if settings.get("spread") else found
    elif settings["bits"] is not None:
        found = uniform(prices, settings["bits"], max(settings["activations"]))
    else:
        return _allocated(prices, settings)
    refuse_unrunnable(prices.layout, settings["target"], found.bits)
    return found


def _allocated(prices: BitPrices, settings: Settings) -> Allocation:
    """The best bits within the limits that were asked for."""
    limits = {k: _absolute(prices.layout, k, settings[k]) for k in BUDGETS if settings[k] is not None}
    allowed = runnable(prices.layout, settings["target"])
    return allocate(prices, weights=allowed, activations=settings["activations"], **limits)


def _spread_anew(prices: BitPrices, found: Allocation, spread: Settings) -> Allocation:
    """The best bits that cost no more than those that were planned before what is left recovered, and what the plan left of the budget."""
    limits = {k: getattr(found, k) + left for k, left in spread["left"].items()}
    allowed = {name: [b for b in spread["weights"] if b in own] for name, own in prices.weights.items()}
    return allocate(prices, weights=allowed, activations=spread["activations"], **limits)


def _absolute(what: Layout, name: str, limit: float) -> float:
    """A share of what the model has in float as a number."""
    if name in ("average", "rise") or isinstance(limit, int):
        return limit
    whole = 4 * sum(w.size for w in what.weights) if name == "bytes" else 32 * 32 * sum(p.macs for p in what.products)
    return int(limit * whole)


def check_choice(desk: Desk, settings: Settings, in_float: list[str], *, float_sums: bool) -> None:
    """See whether bits can be chosen so, which does not depend on the prices.

    Raises:
        ValueError: if not.
    """
    what = layout_of(float_model(desk), desk.recipe.inputs())
    bits, nothing = left_in_float(Bits(), what, _in_float(what, in_float, float_sums)), dict.fromkeys(range(2, 9), Price(0.0, 0.0))
    weights = {w.name: nothing for w in what.weights if bits.of_weight(w.name)}
    sites = {s.name: nothing for s in what.sites if bits.of_site(s) and not (s.weights and not weights.keys() & {*s.weights})}
    chosen(BitPrices(what, weights, sites), settings)


def check_exports(exports: Sequence[str]) -> None:
    """See whether what is asked for can be written.

    Raises:
        ValueError: if a format is unknown, or its runtime is not installed.
    """
    if unknown := sorted(set(exports) - set(EXPORTS)):
        raise ValueError(f"there is no format {', '.join(unknown)} to export to; choose of {', '.join(EXPORTS)}")
    if "openvino" in exports:
        version_of_openvino()


def _quantize(desk: Desk, settings: Settings) -> None:
    recipe, model = desk.recipe, float_model(desk)
    bits = bits_from_json(desk.path("bits.json").read_text(encoding="utf-8"))
    module, left = _calibrated(desk, model, bits, settings)
    before, history, kept = recipe.metrics(module, "validation"), [], "calibrated"
    after = before
    if settings["epochs"]:
        trained = fit(
            module, recipe.loss, desk.training_batches, evaluate=lambda m: recipe.metrics(m, "validation"),
            checkpoints=scratch(desk.run, "quantize", settings), teacher=model if settings["distill"] else None, clip_norm=CLIP_NORM,
            **descent(settings),
        )  # fmt: skip
        history = [{"epoch": e.epoch, "lr": e.lr, "loss": e.loss, "metrics": dict(e.metrics)} for e in trained.history]
        after = recipe.metrics(trained.model, "validation")
        if next(iter(after.values())) >= next(iter(before.values())):
            module, kept = trained.model, "trained"
    packed.save(module, desk.path("quantized.safetensors"))
    facts = {"rounding": settings["rounding"], "rounded to the nearest": left, "kept": kept, "epochs": history}
    validation = {"calibrated": before, **({"trained": after} if settings["epochs"] else {})}
    write_text(desk.path("quantization.json"), dumps({**TRAINED, **facts, "validation": validation}))


def _calibrated(desk: Desk, model: nn.Module, bits: Bits, settings: Settings) -> tuple[nn.Module, list[str]]:
    """The quantized model after calibration, and which weights are rounded to the nearest though another rounding was asked for."""
    batches = desk.recipe.batches("calibration", seed=settings["seed"] + 1)
    module = quantized(model, bits, desk.recipe.inputs())
    seen = observe(module, batches, examples=settings["calibration"])
    calibrate(module, seen, method=settings["ranges"])
    if settings["rounding"] == "nearest":
        return module.eval(), []
    desk.note(f"weights are rounded one layer after the other, {settings['rounding']}")
    left = requantize(module, batches, method=settings["rounding"])
    calibrate(module, seen, method=settings["ranges"])
    return module.eval(), list(left)


def _deploy(desk: Desk, settings: Settings) -> None:
    recipe, model, threads = desk.recipe, float_model(desk), settings["threads"]
    inputs = recipe.inputs()
    module = packed.load(float_model(desk), inputs, desk.path("quantized.safetensors"))
    paths = {name: desk.path(f"{name}.onnx") for name in ("float", "quantized")}
    plain = to_onnx(model, inputs, paths["float"])
    batches = recipe.batches("validation", seed=settings["seed"])
    agreement = to_integer_onnx(module, batches, paths["quantized"], examples=COMPARED, threads=threads)
    others = _others(desk, module, settings)
    running = Running(paths["quantized"], module, *inputs, threads=threads)
    sizes = (plain.sizes[0],) if plain.batch == "static" else tuple(settings["batches"])
    timings = compare_latency(paths, tree_map(Tensor.numpy, inputs), threads=threads, batches=sizes)
    before, done = read_json(desk.path("float.json"), FLOAT), read_json(desk.path("quantization.json"), TRAINED)
    validation = {"float": before["validation"], **done["validation"], "onnxruntime": recipe.metrics(running, "validation")}
    facts = {
        "kept": done["kept"], "validation": validation, "agreement": asdict(agreement), "kernels": str(agreement.kernels),
        "bytes": _sizes(desk, layout(module)), "latency": [asdict(t) for t in timings], "others": others, **_reasons(desk),
    }  # fmt: skip
    write_text(desk.path("quantized.json"), dumps({**QUANTIZED, **facts}))


def _others(desk: Desk, module: nn.Module, settings: Settings) -> dict[str, Any]:
    """How closely what else was asked for computes what the module does; a program that is not asked for goes."""
    program, found = desk.path("quantized.pt2"), {}
    batches = desk.recipe.batches("validation", seed=settings["seed"])
    if "openvino" in settings["exports"]:
        given = check_in_openvino(desk.path("quantized.onnx"), module, batches, examples=COMPARED, threads=settings["threads"])
        found["openvino"] = asdict(given)
    if "pt2" in settings["exports"]:
        found["pt2"] = asdict(to_program(module, batches, program))
    else:
        program.unlink(missing_ok=True)
    return found


def _sizes(desk: Desk, what: Layout) -> dict[str, int]:
    files = {
        name: desk.path(name).stat().st_size for name in ("quantized.safetensors", "float.safetensors", "quantized.onnx", "float.onnx")
    }
    return {**files, "float weights": 4 * sum(w.size for w in what.weights)}


def _reasons(desk: Desk) -> dict[str, Any]:
    """What was chosen, and for every weight and site the price of that and of the next fewer and more bits."""
    prices, bits = load_prices(desk), bits_from_json(desk.path("bits.json").read_text(encoding="utf-8"))
    found = asdict(replace(allocation(prices, bits), bits=Bits()))
    del found["bits"]
    weights = [_reason(w, bits.of_weight(w.name), prices.weights.get(w.name, {})) for w in prices.layout.weights]
    sites = [_reason(s, bits.of_site(s), prices.sites.get(s.name, {})) for s in prices.layout.sites]
    return {"choice": found, "weights": weights, "sites": sites, "prices": prices.detail}


def _reason(what: Weight | Site, bits: int | None, prices: Mapping[int, Price]) -> dict[str, Any]:
    own = prices.get(bits) if bits else None
    beside = {name: [p.rise, p.stderr] if (p := prices.get(bits + n)) else None for name, n in (("fewer", -1), ("more", 1))} if bits else {}
    shown = {"name": what.name, "elements": what.size, "multiply-accumulates": what.macs, "bits": bits}
    return {**shown, "price": [own.rise, own.stderr] if own else None, **beside}


def source_files(source: Path) -> Iterator[tuple[str, str]]:
    """Fingerprints of what makes the model of another run."""
    entries = open_run(source).stages
    for stage in ("trace", "plan", "fit"):
        yield from entries[stage].outputs.items() if stage in entries else ()


STAGES: Mapping[str, Callable[[Desk, Settings], None]] = {
    "load": _load,
    "price": _price,
    "choose": _choose,
    "quantize": _quantize,
    "deploy": _deploy,
}
