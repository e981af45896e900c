"""Accuracy right after pruning, with batch statistics read again, and after repair in closed form; nothing is trained.

    python -m benchmarks.repair measure --depth 20 --method mask_curvature --budget params --shares 0.7 0.5     # resumes
    python -m benchmarks.repair table

Figures are of the test images, looked at once for every row; nothing is chosen by them.  Needs the data of the recipe ``cifar10``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import peer, records
from curvepress.costs import Cost, cost
from curvepress.plan import Plan
from curvepress.planner.channels import search
from curvepress.planner.depth import around, shorten
from curvepress.repairing.sequential import repair
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress.training.batchnorm import reestimate
from curvepress_recipes import cifar10 as recipe

FILE = Path(__file__).parent / "results" / "repair.jsonl"
METHODS = ("magnitude", "hessian_trace", "mask_curvature", "reconstruction")
PEER = "torch-pruning"
TEMPERATURES = {"reconstruction": 4.0}
SAMPLES, EXAMPLES, BATCHES = 8, 1024, 3
NAMES = {"hessian_trace": "relative trace", "mask_curvature": "curvature", PEER: "Torch-Pruning"}


def measure(depth: int, method: str, budget: str, shares: list[float], *, inner: bool, branches: int, seed: int) -> None:
    """Whatever has no record yet."""
    keys: list[dict[str, Any]] = [
        {"depth": depth, "method": method, "budget": budget, "share": share, "inner": inner, "branches": branches, "seed": seed}
        for share in shares
    ]
    missing = [k for k in keys if not any(all(r.get(n) == v for n, v in k.items()) for r in records.read(FILE))]
    if not missing:
        return
    model = recipe.model(depth=depth)
    structure = trace(model, recipe.example())
    scores, skip = _scored(model, structure, method, seed), _skipped(model, structure, branches, seed)
    for key in missing:
        if scores is None:
            plan = _peer_plan(model, structure, key["share"])
        else:
            plan = around(structure, scores, skip, _search(budget, key["share"], cost(Plan(structure)), inner=inner))
        record = records.once(FILE, key, partial(_measured, model, plan, seed))
        print({k: v for k, v in record.items() if k != "environment"}, flush=True)


def _search(budget: str, share: float, whole: Cost, *, inner: bool) -> Callable[[Structure, Scores], Plan]:
    """Channels under a share of the whole model's cost."""

    def fits(now: Cost, _: Cost) -> bool:
        return getattr(now, budget) <= share * getattr(whole, budget)

    per = "macs" if budget == "macs" else "channel"
    return lambda structure, scores: search(structure, scores, fits, per=per, whole=_stream(structure) if inner else ())


def _skipped(model: nn.Module, structure: Structure, branches: int, seed: int) -> list[str]:
    """So many blocks, those without which the loss rises least."""
    batches = list(islice(recipe.batches("calibration", seed=seed), BATCHES))
    found = shorten(model, recipe.loss, batches, structure, branches, example=(recipe.example(),)) if branches else ()
    return [r.name for r in found]


def _scored(model: nn.Module, structure: Structure, method: str, seed: int) -> Scores | None:
    """The scores of channels, or none where Torch-Pruning has its own."""
    if method == PEER:
        return None
    estimator = "gauss_newton" if method == "hessian_trace" else "auto"
    batches = recipe.batches("calibration", seed=seed)
    how = {"method": method, "estimator": estimator, "temperature": TEMPERATURES.get(method, 1.0)}
    return score(model, recipe.loss, batches, structure, samples=SAMPLES, seed=seed, **how)


def _stream(structure: Structure) -> list[str]:
    """The groups of the residual stream: all but the inner channels of blocks."""
    return [g.name for g in structure.free if not g.name.endswith(".conv1")]


def _peer_plan(model: nn.Module, structure: Structure, share: float) -> Plan:
    """The channels that Torch-Pruning keeps, found by their filters: it cuts inner channels only, whose filters stay whole."""
    small, keep = peer.prune(model, recipe.example(), share), {}
    for group in structure.free:
        if group.name.endswith(".conv1"):
            before, after = (dict(m.named_parameters())[f"{group.name}.weight"].detach().flatten(1) for m in (model, small))
            keep[group.name] = tuple(int(i) for i in (before[:, None] == after).all(-1).any(1).nonzero())
    return Plan(structure, keep)


def _measured(model: nn.Module, plan: Plan, seed: int) -> dict[str, Any]:
    small = apply(model, plan, recipe.example())
    calibration = partial(recipe.batches, "calibration", seed=seed)
    again = reestimate(small, calibration(), examples=2048)
    start = time.process_time()
    repaired = repair(again, model, calibration(), plan, examples=EXAMPLES)
    took = {"repair_cpu_seconds": time.process_time() - start, "repair_mib": repaired.bytes / 2**20}
    tested = {"reestimated": recipe.evaluate(again, "test")["accuracy"], "repaired": recipe.evaluate(repaired.model, "test")["accuracy"]}
    now, whole = cost(plan), cost(Plan(plan.structure))
    return tested | took | {k: _share(now, whole, k) for k in ("params", "macs")}


def _share(now: Cost, whole: Cost, what: str) -> float:
    return getattr(now, what) / getattr(whole, what)


def table() -> None:
    """Print the table in Markdown."""
    rows = records.read(FILE)
    print("| network | parameters | MACs | score | cut | statistics read again | repaired | repair, CPU s | MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: (r["depth"], r["budget"] == "macs", -r["share"], r["repaired"])):
        cut = "inner channels" if r["inner"] or r["method"] == PEER else "all channels"
        cut += f", {r['branches']} blocks" if r["branches"] else ""
        accuracies = f"{r['reestimated']:.2f} | {r['repaired']:.2f}"
        sizes, took = f"{r['params']:.1%} | {r['macs']:.1%}", f"{r['repair_cpu_seconds']:.0f} | {r['repair_mib']:.0f}"
        print(f"| ResNet-{r['depth']} | {sizes} | {NAMES.get(r['method'], r['method'])} | {cut} | {accuracies} | {took} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "table"))
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--method", choices=(*METHODS, PEER), default="mask_curvature")
    parser.add_argument("--budget", choices=("params", "macs"), default="params")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--inner", action="store_true", help="leave the residual stream whole")
    parser.add_argument("--branches", type=int, default=0, help="blocks to leave out whole first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "table":
        table()
    else:
        how = {"inner": options.inner, "branches": options.branches, "seed": options.seed}
        measure(options.depth, options.method, options.budget, options.shares, **how)


if __name__ == "__main__":
    main()
