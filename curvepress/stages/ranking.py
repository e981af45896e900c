"""Low-rank implants in a run: prices of ranks of its original model, implants fitted to data, and what the report says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import prod
from typing import Any

from torch import nn

from ..curvature import Stop
from ..files import write_text
from ..implants import Implant, RankPrice, full_rank, names
from ..plan import Plan, dumps, tensors_after
from ..planner.ranks import RankPrices, priced, rank_rise
from ..repairing.refitting import fit_implants, implant_prices
from ..runs.artifacts import load_structure, read_json
from ..runs.desk import Desk
from ..runs.folder import Run
from ..training.batchnorm import reestimate

RANKED = {"format": "curvepress prices of ranks", "version": 1}
FILE = "rank_prices.json"
Settings = Mapping[str, Any]


def truncated(desk: Desk, settings: Settings) -> None:
    """The stage that prices the ranks of all low-rank implants that would save parameters.

    Raises:
        ValueError: if no weight of the model can have one.
    """
    recipe, structure = desk.recipe, load_structure(desk.path("structure.json"))
    batches, others = (recipe.batches("calibration", seed=settings["seed"] + n) for n in range(2))
    prices = implant_prices(
        desk.original(), recipe.loss, batches, structure, held_out=others,
        temperature=settings["temperature"], stop=Stop(examples=settings["examples"]), seed=settings["seed"],
        progress=lambda p: desk.progress("calibration batches", p.samples, p.wanted or p.samples),
    )  # fmt: skip
    if not prices:
        raise ValueError(f"{recipe.name}: no weight of this model can have an implant that is smaller; leave out --implants")
    desk.note(f"{sum(map(len, prices.values()))} ranks of {len(prices)} weights")
    write_text(desk.path(FILE), dumps({**RANKED, "prices": {n: {r: asdict(p) for r, p in own.items()} for n, own in prices.items()}}))


def rank_choice(asked: bool, latency: str | None, per: str | None) -> dict[str, bool]:
    """Whether weights may get implants of low rank; nothing is said where they may not.

    Raises:
        ValueError: beside what cannot be planned with them.
    """
    if asked and latency is not None:
        raise ValueError("--implants has no measured times: the table of a latency budget knows whole layers only; limit --macs instead")
    if asked and per is not None:
        raise ValueError(f"--per {per} is for channels alone: with --implants all is weighed by what it saves of the budget; leave it out")
    return {"implants": True} if asked else {}


def rank_prices(run: Run) -> RankPrices:
    """The prices of ranks in a run; none where it has none.

    Raises:
        ValueError: if they are damaged.
    """
    path = run.folder / FILE
    if not path.exists():
        return {}
    data = read_json(path, RANKED)
    try:
        return {n: {int(r): RankPrice(**p) for r, p in own.items()} for n, own in data["prices"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); make it again with `curvepress compress --implants`"
        ) from None


def predicted_by_implants(run: Run, plan: Plan) -> tuple[float, float] | None:
    """The predicted rise of the loss by the implants of a plan and its standard error; None where one of them has no price."""
    prices = rank_prices(run) if plan.implants else {}
    known = all(i.kind == "low_rank" and i.rank in prices.get(n, {}) for n, i in plan.implants.items())
    return rank_rise(prices, plan) if known else None


def fitted(desk: Desk, small: nn.Module, plan: Plan, examples: int, seed: int) -> nn.Module:
    """The model with its implants fitted to what the original's layers see and to how the loss bends, statistics read again after that.

    A model without implants comes back as it is.
    """
    if not plan.implants:
        return small
    recipe = desk.recipe
    made = fit_implants(small, desk.original(), recipe.batches("calibration", seed=seed), plan, loss=recipe.loss, examples=examples)
    return reestimate(made, recipe.batches("calibration", seed=seed))


def described(run: Run, plan: Plan) -> Iterator[dict[str, Any]]:
    """The implants of a plan as data: kind, rank of at most how many, parameters before and after, and the price where there is one."""
    prices, before, after = rank_prices(run), tensors_after(Plan(plan.structure, plan.keep, plan.skip)), tensors_after(plan)
    for name, implant in plan.implants.items():
        shape = before[name].shape
        known = implant.kind == "low_rank" and implant.rank in prices.get(name, {})
        rise, stderr = priced(prices, plan, name) if known else (None, None)
        sizes = {"before": prod(shape), "after": sum(prod(after[part].shape) for part in names(name, implant))}
        yield {"weight": name, "kind": implant.kind, **_extent(implant, shape), **sizes, "predicted": rise, "stderr": stderr}


def _extent(implant: Implant, shape: tuple[int, ...]) -> dict[str, int]:
    """The rank and the largest there could be, or how many channels of how many have 1x1 filters."""
    low = implant.kind == "low_rank"
    return {"rank": implant.rank, "most": full_rank(shape)} if low else {"rank": len(implant.channels), "most": shape[0]}
