"""Transformers: heads of MiniLM on SST-2 by every score, its encoder by all dimensions, and a vision transformer against latency.

    python -m benchmarks.transformers recovery              # which recovery suits the validation phrases
    python -m benchmarks.transformers heads --seeds 0 1     # 20, 40 and 60 % of the heads; resumes
    python -m benchmarks.transformers encoder --seeds 0 1   # 60 % of the encoder's parameters, by all dimensions
    python -m benchmarks.transformers vit                   # all dimensions, MLPs only, heads only, under latency budgets
    python -m benchmarks.transformers export                # ONNX files of what was measured, of seed 0
    python -m benchmarks.transformers latency               # ONNX Runtime, all of them in turns; leave the machine alone
    python -m benchmarks.transformers table                 # prints the tables of docs/transformers.md; plot draws its figure

Accuracy is that of SST-2's dev sentences and of CIFAR-10's test images, at which nothing but these tables looks.  Every model gets the
same short recovery; where all dimensions go, it is repaired in closed form first, as ``compress`` does it.  Needs the data of the recipes
``sst2`` and ``cifar10`` (``CURVEPRESS_DATA``) and their trained weights.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import records, transformers_table
from benchmarks.latency import latency_table, made, raced
from benchmarks.transformers_models import (
    FILE,
    LIMIT,
    MODELS,
    SPEEDS,
    TEXT,
    VISION,
    Task,
    kinds,
    measured,
    original,
    recovered,
    repaired,
    scored,
    sizes,
)  # fmt: skip
from curvepress.costs import cost
from curvepress.export import compare_latency, to_onnx
from curvepress.latency import Table
from curvepress.plan import Plan, from_json
from curvepress.planner.channels import at_most, search
from curvepress.stopwatch import cached_table, machine, met
from curvepress.surgery.cutting import applied

METHODS = ("mask_curvature", "michel", "magnitude", "random")
WIDE = ("mask_curvature", "reconstruction", "michel", "nvit", "magnitude", "random")
"""Scores of all dimensions.  Michel's and NViT's are those by gradients."""
GONE = (0.2, 0.4, 0.6)
KEPT = 0.4
MULTIPLES = {"embedding": 16, "hidden": 16, "query-key": 8, "value": 8}
PER = ("macs", "channel")
"""What a score is divided by before channels are ranked."""
CUTS = {"all dimensions": (), "MLPs": ("embedding", "head", "query-key", "value"), "heads": ("embedding", "hidden", "query-key", "value")}
"""The kinds of group that stay whole."""
SHARES = (0.7, 0.5, 0.85)


def recovery(seeds: list[int], methods: list[str]) -> None:
    """What validation says of recoveries, 60 % of the heads gone by ``mask_curvature``; the best is what all models get."""
    small = applied(original(TEXT)[0], fewer_heads("mask_curvature", 0.6, 0), TEXT.recipe.example()).model
    for lr, weight in product((2e-5, 5e-5, 1e-4), (0.5, 0.9)):
        key = {"task": TEXT.name, "what": "recovery", "lr": lr, "distill": weight}
        found = lambda lr=lr, weight=weight: recovered(TEXT, small, 0, lr=lr, distill_weight=weight)  # noqa: E731
        record = records.once(FILE, key, lambda found=found: {"validation": TEXT.recipe.evaluate(found(), "validation")})
        print({**key, **record["validation"]}, flush=True)


def heads(seeds: list[int], methods: list[str]) -> None:
    """Shares of all heads, the lowest scores first; one of each layer stays."""
    for seed in seeds:
        measured(TEXT, {"what": "heads", "method": "none", "share": 0.0, "seed": seed}, lambda: Plan(original(TEXT)[1]))
        for share in GONE[::-1]:
            for method in methods or METHODS:
                key = {"what": "heads", "method": method, "share": share, "seed": seed}
                measured(TEXT, key, lambda method=method, share=share, seed=seed: fewer_heads(method, share, seed))


def fewer_heads(method: str, share: float, seed: int) -> Plan:
    """The plan without so many of all heads."""
    _, structure = original(TEXT)
    groups = [g for g in structure.free if g.kind == "head"]
    whole = cost(Plan(structure)).params
    one = whole - cost(Plan(structure, {groups[0].name: tuple(range(1, groups[0].size))})).params
    budget = at_most(params=whole - round(share * sum(g.size for g in groups)) * one)
    return search(structure, scored(TEXT, method, seed), budget, per="channel", floor=0, whole=[k for k in kinds(structure) if k != "head"])


def encoder(seeds: list[int], methods: list[str]) -> None:
    """All dimensions, until 60 % of the encoder's parameters are gone."""
    for seed in seeds:
        for method in methods or WIDE:
            for what, refit in (("encoder", True), ("encoder, not repaired", False)):
                key = {"what": what, "method": method, "share": KEPT, "seed": seed}
                measured(TEXT, key, lambda method=method, seed=seed: smaller_encoder(method, seed, chosen(method)), refit=refit)


def chosen(method: str) -> str:
    """What this score is divided by: what gives the better accuracy on validation phrases after repair, of seed 0."""

    def right(per: str) -> float:
        key = {"task": TEXT.name, "what": "choice", "method": method, "per": per}
        return records.once(FILE, key, lambda: {"validation": _validated(smaller_encoder(method, 0, per))})["validation"]["accuracy"]

    return max(PER, key=right)


def _validated(plan: Plan) -> dict[str, float]:
    small = applied(original(TEXT)[0], plan, TEXT.recipe.example()).model
    return TEXT.recipe.evaluate(repaired(TEXT, small, plan, 0), "validation")


def smaller_encoder(method: str, seed: int, per: str) -> Plan:
    """The first plan, as its multiply-accumulates fall, whose encoder has few enough parameters.

    The table of words has no multiply-accumulates: it is no part of the encoder.
    """
    _, structure = original(TEXT)
    scores, whole = scored(TEXT, method, seed), sizes(Plan(structure))["encoder"]
    plans = lambda share: search(structure, scores, at_most(macs=share), per=per, multiple=MULTIPLES, aligned=True)  # noqa: E731
    low, high = 0.05, 0.7
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if sizes(plans(middle))["encoder"] <= KEPT * whole else (low, middle)
    return plans(low)


def vit(seeds: list[int], methods: list[str]) -> None:
    """Which dimensions may go under latency budgets; and the same recovery of the whole model."""
    for seed in seeds:
        for method in methods or ("mask_curvature",):
            for share in SHARES:
                for what in CUTS:
                    key = {"what": what, "method": method, "share": share, "seed": seed}
                    measured(VISION, key, lambda key=key: faster(**key), refit=True)
        whole = {"what": "all dimensions", "method": "none", "share": 1.0, "seed": seed}
        measured(VISION, whole, lambda: Plan(original(VISION)[1]))


def faster(what: str, method: str, share: float, seed: int) -> Plan:
    """The plan that keeps a budget of latency in ONNX Runtime, batch 1, measured."""
    model, structure = original(VISION)
    scores, table = scored(VISION, method, seed), _table()

    def taken(plan: Plan) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            whole, small = raced([model, made(model, plan)], folder)
        return small, whole

    options: dict[str, Any] = {"per": "latency", "table": table, "whole": CUTS[what]}
    return met(share, lambda aim: search(structure, scores, at_most(latency=aim), **options), taken, table).plan


def _table() -> Table:
    """The vision transformer's, measured once on this machine."""
    return cached_table(MODELS / VISION.name / "latency.json", machine("onnxruntime", 1, 1), lambda: latency_table(*original(VISION)))


def export(seeds: list[int], methods: list[str]) -> None:
    """ONNX files of the originals and of the plans by curvature, those of seed 0; in ONNX Runtime only widths count."""
    for task in (TEXT, VISION):
        model, structure = original(task)
        folder = MODELS / task.name
        files = [p for p in sorted(folder.glob("*-mask_curvature-*-0.json")) if not p.stem.startswith("encoder,")]
        plans = {p.stem: from_json(p.read_text()) for p in files}
        for name, plan in {"original": Plan(structure), **plans}.items():
            if not (folder / f"{name}.onnx").exists():
                to_onnx(applied(model, plan, task.recipe.example()).model, task.recipe.example(), folder / f"{name}.onnx")
            print(task.name, name, flush=True)


def latency(seeds: list[int], methods: list[str]) -> None:
    """Every exported model against its original, all in turns on one thread, batch 1 and 16."""
    for task in (TEXT, VISION):
        paths = {p.stem: p for p in sorted((MODELS / task.name).glob("*.onnx"), key=lambda p: (p.stem != "original", p.stem))}
        known = {r["model"] for r in records.read(SPEEDS) if r["task"] == task.name}
        if paths.keys() - known - {"original"}:
            for name, row in _raced(task, paths).items():
                records.once(SPEEDS, {"task": task.name, "model": name}, lambda row=row: row)


def _raced(task: Task, paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {} for name in paths}
    for t in compare_latency(paths, tree_map(Tensor.numpy, task.timed()), batches=(1, 16), seconds=50.0):
        found[t.name] |= {f"ms{t.batch}": t.wall.median, f"ratio{t.batch}": [t.ratio.low, t.ratio.median, t.ratio.high]}
    return found


WHAT = {"recovery": recovery, "heads": heads, "encoder": encoder, "vit": vit, "export": export, "latency": latency}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*WHAT, "table", "plot"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--models", type=int, default=0, help="measure so many at most in this process; 0 is all")
    parser.add_argument("--out", type=Path, default=Path("docs/transformers.png"))
    given = parser.parse_args()
    LIMIT["models"] = given.models
    torch.set_num_threads(1)
    if given.what in WHAT:
        WHAT[given.what](given.seeds, given.methods)
    else:
        {"table": transformers_table.table, "plot": lambda: transformers_table.plot(given.out)}[given.what]()


if __name__ == "__main__":
    main()
