"""Plans of widths, bits and ranks from the files of a run: prices of bits of its original model, and the family of plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

from ..bitplan import BitPlan, Multiplication, Wiring
from ..curvature import Stop
from ..files import write_text
from ..plan import Plan, after, dropped, dumps
from ..planner.alignment import Shape
from ..planner.depth import Removal, shorten
from ..planner.joint import Bitwidths, Exchange, Family, family, joint_problem
from ..planner.wiring import bits_of_plan, wiring
from ..quantization.allocation import SUM
from ..quantization.bitwidths import bit_prices, layout_of, prices_from_dict, prices_to_dict
from ..quantization.quantized import Bits
from ..runs.artifacts import load_structure, read_json
from ..runs.desk import Desk
from ..runs.folder import Run, command
from ..scores import WARMED, Scores
from ..structure import Structure
from ..surgery.cutting import applied
from ..training.batchnorm import reestimate
from .ranking import rank_prices

Settings = Mapping[str, Any]
WEIGHED = {"format": "curvepress prices of bits for a plan", "version": 1}
AUTO = "auto"
"""Says that the planner chooses how many branches, and which."""
SHORTENED = 3
"""Calibration batches on which branches are left out on trial."""


def weighed(desk: Desk, settings: Settings) -> None:
    """The stage that prices all bits of the original model, or of what is left of it without the branches that cost least."""
    recipe, model = desk.recipe, desk.original()
    structure = load_structure(desk.path("structure.json"))
    asked = settings.get("branches", 0)
    skip, branches = ((), measured_branches(desk, structure)) if asked == AUTO else (left_out(desk, structure, asked), {})
    if skip:
        without = Plan(structure, skip=skip)
        model, structure = applied(model, without, *recipe.inputs()).model, after(without)
        model = reestimate(model, recipe.batches("calibration", seed=settings["seed"])).eval()
    found = wiring(model, structure, recipe.inputs())
    batches = recipe.batches("calibration", seed=settings["seed"])
    show = lambda p: desk.progress("calibration batches", p.samples, p.wanted or p.samples)  # noqa: E731
    prices = bit_prices(
        model, recipe.loss, batches, recipe.inputs(), stop=Stop(examples=settings["examples"]), seed=settings["seed"], progress=show,
        temperature=settings.get("temperature", 1.0),
    )  # fmt: skip
    desk.note(prices.detail)
    what = {"skip": skip, "branches": branches, "wiring": asdict(found), "prices": prices_to_dict(prices)}
    write_text(desk.path("bit_prices.json"), dumps({**WEIGHED, **what}))


def left_out(desk: Desk, structure: Structure, count: int) -> tuple[str, ...]:
    """So many branches, those that cost least by the loss on calibration batches.

    Raises:
        ValueError: if the model has fewer.
    """
    if not count:
        return ()
    gone = _shortened(desk, structure, count)
    desk.note(f"without {', '.join(r.name for r in gone)}: the loss rises by {gone[-1].rise:.3g} ± {gone[-1].stderr:.2g} before repair")
    return tuple(r.name for r in gone)


def measured_branches(desk: Desk, structure: Structure) -> dict[str, tuple[float, float]]:
    """By how much the loss rises without each branch, and its standard error, for the half of them that cost least: each left out after
    those that cost less, so that the sum of any of them is that of their going together, or more.

    Raises:
        ValueError: if the model has none.
    """
    if not structure.branches:
        raise ValueError("--branches auto: this model has no residual branches; leave it out")
    gone = _shortened(desk, structure, (len(structure.branches) + 1) // 2)
    before = [0.0, *(r.rise for r in gone)]
    return {r.name: (max(r.rise - b, 0.0), r.stderr) for r, b in zip(gone, before, strict=False)}


def _shortened(desk: Desk, structure: Structure, count: int) -> tuple[Removal, ...]:
    recipe, tell = desk.recipe, lambda n: desk.progress("branches measured", n, max(n, len(structure.branches)))
    batches = list(islice(recipe.batches("calibration", seed=0), SHORTENED))
    return shorten(desk.original(), recipe.loss, batches, structure, count, example=recipe.inputs(), progress=tell)


def weighed_without(run: Run) -> tuple[str, ...]:
    """The branches without which the bits of a run were priced."""
    return tuple(read_json(run.folder / "bit_prices.json", WEIGHED).get("skip", ()))


def temperature_of(run: Run, stage: str) -> float:
    """That of the output curvature behind the prices that a stage made; 1 where its method knows none."""
    made = run.stages[stage].settings
    return float(made.get("temperature", 1.0)) if made.get("method", WARMED[0]) in WARMED else 1.0


def check_unit(run: Run, settings: Settings) -> None:
    """See whether all prices that a plan adds up are of one temperature: those of 4 are about ten times those of 1.

    Raises:
        ValueError: if they are not.
    """
    known = {stage: temperature_of(run, stage) for stage in ("score", "weigh", "truncate") if stage in run.stages}
    for stage, kind in (("weigh", "bits"), ("truncate", "implants")):
        if settings.get(kind) and known.get(stage, known["score"]) != known["score"]:
            raise ValueError(
                f"scores are of temperature {known['score']:g} and prices of {kind} of {known[stage]:g}, so that they cannot be added up; "
                f"have all prices made at that of the scores, with {command(run, stage)}"
            )


def joint_family(run: Run, structure: Structure, scores: Scores, settings: Settings) -> Family:
    """All candidates for the budgets in the settings.

    Raises:
        ValueError: if prices of bits or ranks are missing or damaged, or as :func:`~curvepress.planner.joint.joint_problem` does.
    """
    prices = rank_prices(run) if settings.get("implants") else {}
    if settings.get("implants") and not prices:
        raise ValueError(f"{run.folder} has no prices of ranks, which --implants needs; make them with {command(run, 'truncate')}")
    ranks = {n: p for n, p in prices.items() if n in structure.tensors}
    problem = joint_problem(
        structure, scores, **(_weighed(run, settings) if settings.get("bits") else {}), ranks=ranks,
        shape=Shape(settings["multiple"], settings["floor"], settings.get("whole", ()), settings.get("aligned", False)),
        exchange=Exchange(**settings.get("exchange", {})),
    )  # fmt: skip
    return family(problem, [k for k in ("params", "bytes", "macs", "bops") if settings.get(k) is not None] or ["bytes"])


def _weighed(run: Run, settings: Settings) -> dict[str, Any]:
    """What the run knows of bits and of branches, as the planner takes it."""
    data = read_json(run.folder / "bit_prices.json", WEIGHED)
    w = data["wiring"]
    products = tuple(Multiplication(p["tensor"], p["positions"], tuple(p["factors"])) for p in w["products"])
    return {
        "prices": prices_from_dict(data["prices"]),
        "wiring": Wiring(products, w["axes"], tuple(w["gone"]), w["biases"], w["constants"]),
        "bits": Bitwidths(settings["bits"], settings["activation_bits"]),
        "branches": {name: (rise, stderr) for name, (rise, stderr) in data.get("branches", {}).items()},
    }


def rewired(desk: Desk, plan: Plan, product: int) -> Plan:
    """A plan whose branches were chosen with its bits, with the activations that are left without them, on ``product`` bits where products
    read them."""
    if plan.bits is None or not plan.skip:
        return plan
    recipe, without = desk.recipe, Plan(plan.structure, skip=plan.skip, implants=plan.implants)
    model = applied(desk.original(), without, *recipe.inputs()).model
    wired, what = wiring(model, after(without), recipe.inputs()), layout_of(model, recipe.inputs())
    sites = {s.name: product if s.role == "product" else SUM for s in what.sites}
    gone = dropped(plan)
    inner = {g.name for g in plan.structure.groups if gone.issuperset(m.tensor for m in g.members)}
    keep = {n: c for n, c in plan.keep.items() if n not in inner}
    weights = {n: b for n, b in plan.bits.weights.items() if n not in gone}
    return Plan(plan.structure, keep, plan.skip, plan.implants, BitPlan(weights, sites, wired))


def given_bits(plan: Plan) -> str:
    """The bits of a plan as the stage that chooses bits takes them."""
    bits: Bits = bits_of_plan(plan)
    return json.dumps(json.loads(bits.to_json()))
