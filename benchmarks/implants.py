"""Implants on ResNet-20 at equal parameters: pruning alone, HAP's pointwise implants beside it, and low-rank implants of three kinds.

    python -m benchmarks.implants measure      # minutes on one core; resumes
    python -m benchmarks.implants tune         # a few minutes: one epoch of some of them
    python -m benchmarks.implants table

Accuracy is that on the test images, which no choice looks at: with BatchNorm re-estimated, after repair, and for some after one epoch of
the fine-tune of ``benchmarks.cifar10``.  Pruning takes the price after repair at temperature 4 as its score.  HAP's rule gives a
share of the channels that would go, the most valuable of them, 1x1 filters instead (its released code cuts the most sensitive layers to
a twentieth; this does not); here only where their order is free, that is inside the blocks and in the first stage.  Low-rank implants have
the ranks with the lowest predicted rise within the budget, chosen once by prices along the residual; the three kinds differ in the values
alone.  ``pruned, then low rank`` prunes half of the way, then gives the rest of the budget to ranks; ``planned together`` is the joint
planner's choice of channels and ranks, as ``curvepress compress --implants --temperature 4`` makes it.  Needs the data of the recipe
``cifar10`` (``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import records
from curvepress.costs import cost
from curvepress.curvature import Stop
from curvepress.implants import Implant, RankPrice, full_rank, low_rank_sizes
from curvepress.objective import Batches
from curvepress.plan import Plan, lost, tensors_after
from curvepress.planner.channels import at_most, search
from curvepress.planner.joint import NO_WIRING, search_jointly
from curvepress.repairing.refitting import fit_implants, implant_prices
from curvepress.repairing.sequential import repair
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress.training.batchnorm import reestimate
from curvepress.training.fitting import fit
from curvepress_recipes import cifar10 as recipe

FILE = Path(__file__).parent / "results" / "implants.jsonl"
SHARES = (0.7, 0.5, 0.3)
RETURNED = (0.1, 0.5)
"""Shares of the lost channels that HAP's rule gives 1x1 filters; 0.1 is its default."""
KINDS = (
    "pruned",
    "pointwise, 10% of the lost, centres",
    *(f"pointwise, {r:.0%} of the lost, least squares" for r in RETURNED),
    "low rank, plain",
    "low rank, data",
    "low rank, data and curvature",
    "pruned, then low rank, data and curvature",
    "planned together at one temperature, data and curvature",
)
TUNED = (
    "pruned",
    "pointwise, 10% of the lost, least squares",
    "low rank, data and curvature",
    "pruned, then low rank, data and curvature",
    *KINDS[-1:],
)
SAMPLES, EXAMPLES, WARM = 8, 1024, 4.0


@lru_cache(1)
def network() -> tuple[nn.Module, Structure, Scores]:
    """The trained model, its structure and its channels' scores."""
    model = recipe.model()
    structure = trace(model, recipe.example())
    return model, structure, score(model, recipe.loss, calibration(), structure, method="reconstruction", temperature=WARM, samples=SAMPLES)


def calibration() -> Batches:
    """Training images as they are."""
    return recipe.batches("calibration")


@lru_cache
def prices(temperature: float = 1.0) -> dict[str, dict[int, RankPrice]]:
    """What each rank of each weight is predicted to cost."""
    model, structure, _ = network()
    return implant_prices(model, recipe.loss, calibration(), structure, stop=Stop(samples=SAMPLES // 2), temperature=temperature)


def measure(shares: Sequence[float], kinds: Sequence[str]) -> None:
    """Measure every kind and share that has no record yet."""
    for share in shares:
        for kind in kinds or KINDS:
            print(records.once(FILE, {"share": share, "kind": kind, "epochs": 0}, partial(measured, share, kind)), flush=True)


def tune(shares: Sequence[float], kinds: Sequence[str]) -> None:
    """One epoch of the kinds worth it, whatever has no record yet."""
    for share in shares:
        for kind in kinds or TUNED:
            print(records.once(FILE, {"share": share, "kind": kind, "epochs": 1}, partial(tuned, share, kind)), flush=True)


def plan_of(share: float, kind: str) -> Plan:
    """What a kind makes of the budget."""
    (_, structure, scores), (name, _, how) = network(), kind.partition(", ")
    if name == "pointwise":
        returned = float(how.partition("%")[0]) / 100
        return _within(
            share, structure, lambda s: with_pointwise(search(structure, scores, at_most(params=s), per="channel"), scores, returned)
        )
    if name == "planned together at one temperature":
        return search_jointly(structure, scores, None, NO_WIRING, at_most(params=share), ranks=prices(WARM)).plan
    if name == "low rank":
        return ranked(share, Plan(structure), prices())
    plan = search(structure, scores, at_most(params=(1 + share) / 2 if how else share), per="channel")
    return ranked(share, plan, prices()) if how else plan


def made(plan: Plan, kind: str) -> nn.Module:
    """The network, its implants with the values of this kind, its batch statistics read again."""
    model = network()[0]
    small = apply(model, plan, recipe.example())
    if kind.endswith(("data", "curvature", "least squares")):
        small = fit_implants(small, model, calibration(), plan, loss=recipe.loss if kind.endswith("curvature") else None)
    return reestimate(small, calibration(), examples=2048)


def measured(share: float, kind: str) -> records.Record:
    """Accuracy and loss on test images without and with repair, and what the network costs."""
    plan = plan_of(share, kind)
    small = made(plan, kind)
    again = repair(small, network()[0], calibration(), plan, examples=EXAMPLES).model
    whole, now = cost(Plan(plan.structure)), cost(plan)
    sizes = {"params": now.params / whole.params, "macs": now.macs / whole.macs, "implants": len(plan.implants)}
    return recipe.evaluate(small, "test") | {f"repaired_{k}": v for k, v in recipe.evaluate(again, "test").items()} | sizes


def tuned(share: float, kind: str) -> records.Record:
    """Accuracy and loss after repair and one epoch."""
    plan = plan_of(share, kind)
    small = repair(made(plan, kind), network()[0], calibration(), plan, examples=EXAMPLES).model
    how = {"epochs": 1, "lr": 0.01, "weight_decay": 1e-4, "precision": "bfloat16"}
    return recipe.evaluate(fit(small, recipe.loss, partial(recipe.batches, "train"), **how).model, "test")


def _within(share: float, structure: Structure, made: Callable[[float], Plan]) -> Plan:
    """The plan of the loosest inner share that stays within the budget."""
    low, high, best = 0.5 * share, share, made(0.5 * share)
    for _ in range(12):
        middle = (low + high) / 2
        plan = made(middle)
        if cost(plan).params <= share * cost(Plan(structure)).params:
            low, best = middle, plan
        else:
            high = middle
    return best


def with_pointwise(pruned: Plan, scores: Scores, returned: float) -> Plan:
    """The plan with the most valuable of its lost channels back, made by 1x1 filters, where that is possible."""
    structure, weights = pruned.structure, {}
    for group in structure.free:
        makers = [m.tensor for m in group.members if m.role == "out"]
        try:
            Plan(structure, {}, implants={m: Implant("pointwise", channels=(0,)) for m in makers})
            weights[group.name] = makers
        except ValueError:
            continue
    gone = [(scores.values[g][c], g, int(c)) for g in weights for c in lost(pruned, structure[g])]
    back: dict[str, list[int]] = {}
    for _, name, channel in sorted(gone, reverse=True)[: round(returned * len(gone))]:
        back.setdefault(name, []).append(channel)
    keep = {g: (*c, *back.get(g, ())) for g, c in pruned.keep.items()}
    rows = {(m, g): structure_rows(structure, g, m)[c] for g, c in back.items() for m in weights[g]}
    return Plan(structure, keep, implants={m: Implant("pointwise", channels=tuple(r.tolist())) for (m, _), r in rows.items()})


def structure_rows(structure: Structure, group: str, tensor: str) -> np.ndarray:
    """Which output channel of a weight each channel of a group is."""
    return next(m.rows[:, 0] for m in structure[group].members if (m.tensor, m.dim) == (tensor, 0))


def ranked(share: float, pruned: Plan, prices: dict[str, dict[int, RankPrice]]) -> Plan:
    """The plan with the ranks of least predicted rise at the price of a parameter that just fits the budget."""
    structure, shapes = pruned.structure, tensors_after(pruned)
    saved = {n: {k: prod(shapes[n].shape) - low_rank_sizes(shapes[n].shape, k) for k in r} for n, r in prices.items()}
    able = {n: [k for k, less in s.items() if less > 0 and k <= full_rank(shapes[n].shape)] for n, s in saved.items()}

    def at(price: float) -> Plan:
        best = {n: min(ks, key=lambda k, n=n: prices[n][k].rise - price * saved[n][k]) for n, ks in able.items() if ks}
        chosen = {n: Implant("low_rank", k) for n, k in best.items() if prices[n][k].rise < price * saved[n][k]}
        return Plan(structure, pruned.keep, implants=chosen)

    low, high = -12.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = cost(at(10**middle)).params <= share * cost(Plan(structure)).params
        low, high = (low, middle) if fits else (middle, high)
    return at(10**high)


def table() -> None:
    """Print the table in Markdown."""
    rows = {(r["share"], r["kind"], r["epochs"]): r for r in records.read(FILE)}
    print(
        "| budget | what | parameters | MACs | implants | statistics read again | repaired | one epoch |\n|---|---|---|---|---|---|---|---|"
    )
    for share in SHARES:
        for kind in KINDS:
            if r := rows.get((share, kind, 0)):
                sizes = f"{r['params']:.1%} | {r['macs']:.2f} | {r['implants']}"
                later = rows.get((share, kind, 1))
                trained = f"{later['accuracy']:.2f}" if later else "–"
                print(f"| {share:.0%} | {kind} | {sizes} | {r['accuracy']:.2f} | {r['repaired_accuracy']:.2f} | {trained} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "tune", "table"))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--kinds", nargs="+", default=[], choices=KINDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "table":
        return table()
    return {"measure": measure, "tune": tune}[given.what](given.shares, given.kinds)


if __name__ == "__main__":
    main()
