"""The frontier of a run: plans from the whole model to the smallest, what each is predicted to cost, and what it is measured to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..costs import cost
from ..export import compare_latency, to_onnx
from ..export.integers import to_integer_onnx
from ..files import write_text
from ..plan import Plan, dumps
from ..planner.joint import Choice, frontier
from ..planner.wiring import bits_of_plan
from ..quantization.quantized import calibrate, quantize
from ..report import picture
from ..runs.artifacts import load_scores, load_structure
from ..runs.desk import Desk
from ..surgery.cutting import applied
from ..training.batchnorm import reestimate
from .planning import check_unit, joint_family
from .ranking import fitted

Settings = Mapping[str, Any]
FRONTIER = {"format": "curvepress frontier", "version": 1}
CALIBRATED = 512
"""Examples that ranges of activations are found on where a point is measured."""
COMPARED = 64
"""Examples on which a file of integers is compared with what it was made from."""
ORIGINAL, SECONDS = "original", 2.0
"""Name of the model that times are compared with, and clock seconds for each point."""


def drawn_frontier(desk: Desk, settings: Settings, *, count: int, measure: bool) -> tuple[list[Choice], dict[str, Any]]:
    """The frontier of a run by bytes, and the same as data, which is written to ``frontier.json`` and drawn in ``frontier.svg``.

    Measured points are made, rounded and tested on the validation split without training, exported to ONNX and timed in turns with the
    original in ONNX Runtime, one example at a time.
    """
    structure = load_structure(desk.path("structure.json"))
    check_unit(desk.run, settings)
    choices = frontier(joint_family(desk.run, structure, load_scores(desk.run.folder), settings), count)
    found = (
        measured(desk, choices, seed=settings["seed"], threads=settings["threads"])
        if measure
        else [{"measured": None, "latency": None}] * len(choices)
    )
    points = [{**_predicted(n, c), **f} for n, (c, f) in enumerate(zip(choices, found, strict=True), 1)]
    data: dict[str, Any] = {ORIGINAL: cost(Plan(structure)).known(), "points": points}
    write_text(desk.path("frontier.json"), dumps({**FRONTIER, **data}))
    write_text(desk.path("frontier.svg"), picture(points, data[ORIGINAL]))
    return choices, data


def _predicted(number: int, choice: Choice) -> dict[str, Any]:
    return {
        "number": number,
        "cost": asdict(choice.cost),
        "predicted": asdict(choice.predicted) | {"rise": choice.predicted.rise},
    }


def measured(desk: Desk, choices: list[Choice], *, seed: int, threads: int) -> list[dict[str, Any]]:
    """For each choice its metrics on the validation split, and the quartiles of its latency over the original's; none where it cannot be
    exported, of which a note tells the reason."""
    with TemporaryDirectory() as folder:
        paths, metrics = {ORIGINAL: Path(folder) / f"{ORIGINAL}.onnx"}, []
        to_onnx(desk.original(), desk.recipe.inputs(), paths[ORIGINAL])
        for n, choice in enumerate(choices, 1):
            small, path = untrained(desk, choice.plan, seed), Path(folder) / f"{n}.onnx"
            metrics.append(dict(desk.recipe.metrics(small, "validation")))
            try:
                _export(desk, small, choice.plan, path)
                paths[str(n)] = path
            except ValueError as error:
                desk.note(f"point {n} has no latency: {error}")
            desk.progress("plans", n, len(choices))
        times = _latencies(desk, paths, threads)
        return [{"measured": m, "latency": times.get(str(n))} for n, m in enumerate(metrics, 1)]


def untrained(desk: Desk, plan: Plan, seed: int) -> nn.Module:
    """The model of a plan with statistics re-estimated and everything rounded, nothing trained."""
    recipe = desk.recipe
    small = fitted(desk, applied(desk.original(), plan, *recipe.inputs()).model, plan, CALIBRATED, seed)
    small = reestimate(small, recipe.batches("calibration", seed=seed)).eval()
    if plan.bits is None:
        return small
    module = quantize(small, bits_of_plan(plan), recipe.inputs())
    return calibrate(module, recipe.batches("calibration", seed=seed + 1), examples=CALIBRATED).eval()


def _export(desk: Desk, small: nn.Module, plan: Plan, path: Path) -> None:
    recipe = desk.recipe
    if plan.bits is None:
        to_onnx(small, recipe.inputs(), path)
    else:
        to_integer_onnx(small, recipe.batches("validation"), path, examples=COMPARED, least_same=0.0)


def _latencies(desk: Desk, paths: Mapping[str, Path], threads: int) -> dict[str, dict[str, float]]:
    inputs = tree_map(Tensor.numpy, desk.recipe.inputs())
    timings = compare_latency(paths, inputs, threads=threads, batches=(1,), seconds=SECONDS * len(paths))
    return {t.name: asdict(t.ratio) for t in timings}


def picked(choices: list[Choice], number: int) -> Plan:
    """The plan of a point of the frontier, by its number in the table.

    Raises:
        ValueError: if there is no such point.
    """
    if not 1 <= number <= len(choices):
        raise ValueError(f"--pick {number}: the points of this frontier are 1 to {len(choices)}")
    return choices[number - 1].plan
