"""Implants on ResNet-20 at equal parameters: pruning alone, HAP's pointwise implants beside it, and low-rank implants of three kinds.

    python -m benchmarks.implants measure      # minutes on one core; resumes
    python -m benchmarks.implants table

Nothing is trained: accuracy is that on the first ``TESTED`` test images, which no choice looks at, with BatchNorm re-estimated.  Pruning
takes the curvature of each channel's removal as its score.  HAP's rule gives a share of the channels that would go, the most sensitive
of them, 1x1 filters instead (its released code cuts the most sensitive layers to a twentieth; this does not); here only where their order
is free, that is inside the blocks and in the first stage.  Low-rank implants have the ranks with the lowest predicted rise within the
budget, chosen once by prices along the residual; the three kinds differ in the values alone.  Needs the data of the recipe ``cifar10``
(``CURVEPRESS_DATA``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import records
from curvepress.batchnorm import reestimate
from curvepress.costs import cost
from curvepress.curvature import Stop
from curvepress.implants import Implant, RankPrice
from curvepress.plan import Plan, lost
from curvepress.planner import at_most, search
from curvepress.refitting import fit_implants, implant_prices
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery import apply
from curvepress.tracing import trace
from curvepress_recipes import cifar10 as recipe
from curvepress_recipes.images import accuracy

FILE = Path(__file__).parent / "results" / "implants.jsonl"
SHARES = (0.7, 0.5)
RETURNED = (0.1, 0.5)
"""Shares of the lost channels that HAP's rule gives 1x1 filters; 0.1 is its default."""
KINDS = (
    "pruned",
    *(f"pointwise, {r:.0%} of the lost, {start}" for r in RETURNED for start in ("centres", "least squares")),
    "low rank, plain",
    "low rank, data",
    "low rank, data and curvature",
)
TESTED, SAMPLES = 2000, 4


@lru_cache(1)
def network() -> tuple[nn.Module, Structure, Scores, dict[str, dict[int, RankPrice]]]:
    """The trained model, its structure, its channels' scores and its ranks' prices."""
    model = recipe.model()
    structure = trace(model, recipe.example())
    batches = recipe.batches("calibration")
    scores = score(model, recipe.loss, batches, structure, samples=2 * SAMPLES)
    return model, structure, scores, implant_prices(model, recipe.loss, batches, structure, stop=Stop(samples=SAMPLES))


def measure() -> None:
    """Measure every kind and share that has no record yet."""
    torch.set_num_threads(1)
    for share in SHARES:
        for kind in KINDS:
            print(records.once(FILE, {"share": share, "kind": kind}, lambda s=share, k=kind: measured(s, k)), flush=True)


def measured(share: float, kind: str) -> records.Record:
    """Accuracy and loss on test images, and what the network costs."""
    model, structure, scores, prices = network()
    name, _, how = kind.partition(", ")
    if name == "pointwise":
        returned = float(how.partition("%")[0]) / 100
        plan = _within(share, structure, lambda s: with_pointwise(search(structure, scores, at_most(params=s)), scores, returned))
    else:
        plan = search(structure, scores, at_most(params=share)) if name == "pruned" else ranked(share, structure, prices)
    small, batches = apply(model, plan, recipe.example()), recipe.batches("calibration")
    if how.endswith(("data", "curvature", "least squares")):
        small = fit_implants(small, model, batches, plan, loss=recipe.loss if how.endswith("curvature") else None)
    small = reestimate(small, batches, examples=1024)
    whole, now = cost(Plan(structure)), cost(plan)
    sizes = {"params": now.params / whole.params, "macs": now.macs / whole.macs, "implants": len(plan.implants)}
    return {**accuracy(small, islice(recipe.batches("test", batch_size=250), TESTED // 250)), **sizes}


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


def ranked(share: float, structure: Structure, prices: dict[str, dict[int, RankPrice]]) -> Plan:
    """The ranks with the least predicted rise at the price of a parameter that just fits the budget."""

    def at(price: float) -> Plan:
        best = {n: min(r, key=lambda k, r=r: r[k].rise - price * r[k].params) for n, r in prices.items()}
        return Plan(
            structure, {}, implants={n: Implant("low_rank", k) for n, k in best.items() if prices[n][k].rise < price * prices[n][k].params}
        )

    low, high = -12.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        fits = cost(at(10**middle)).params <= share * cost(Plan(structure)).params
        low, high = (low, middle) if fits else (middle, high)
    return at(10**high)


def table() -> None:
    """Print the table in Markdown."""
    rows = {(r["share"], r["kind"]): r for r in records.read(FILE)}
    print("| budget | what | parameters | MACs | implants | accuracy | loss |\n|---|---|---|---|---|---|---|")
    for share in SHARES:
        for kind in KINDS:
            if r := rows.get((share, kind)):
                sizes = f"{r['params']:.1%} | {r['macs']:.2f} | {r['implants']}"
                print(f"| {share:.0%} | {kind} | {sizes} | {r['accuracy']:.1f} | {r['loss']:.3f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "table"))
    {"measure": measure, "table": table}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
