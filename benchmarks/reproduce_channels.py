"""Cells of the results page about channels: HAP beside other scores, EHAP's half precision beside full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
from torch import nn

from benchmarks import peer, records
from benchmarks.cifar10 import FILE as CIFAR10
from curvepress.batchnorm import reestimate
from curvepress.costs import cost
from curvepress.curvature import spearman
from curvepress.plan import Plan, lost
from curvepress.planner import at_most, search
from curvepress.refitting import zeroed
from curvepress.repairing import repair
from curvepress.reproduce.ehap import released_traces
from curvepress.reproduce.hap import relative_traces
from curvepress.reproduce.sampling import apart, one_batch
from curvepress.reproduce.thresholds import Rule, shares, within
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery import apply
from curvepress.tracing import trace
from curvepress.training import fit
from curvepress_recipes import cifar10 as recipe

Key = Mapping[str, Any]
PEER, DEFAULT, BETTER = "Torch-Pruning", "curvepress, default", "curvepress, reconstruction"
RELEASED, CORRECTED = "HAP, as released", "HAP, corrected"
WAYS = (
    RELEASED,
    f"{RELEASED}, implants",
    CORRECTED,
    f"{CORRECTED}, implants",
    "HAP, 32 probes",
    DEFAULT,
    BETTER,
    "magnitude",
    "taylor",
    "random",
    PEER,
)
BORROWED = {
    "magnitude": "magnitude",
    "taylor": "taylor",
    "random": "random",
    "torch-pruning": PEER,
    "mask_curvature, repaired": DEFAULT,
    "reconstruction, repaired": BETTER,
}
LEFT = (0.5, 0.3, 0.1)
SAMPLES = {DEFAULT: 32, BETTER: 16, "taylor": 48}
PROBED, IMAGES = 32, 128
"""Random vectors and images with which precisions are compared."""
TRACES = ("full", "bfloat16", "float16", "full, other vectors", "released scale, float16", "exact")
AGREED = (0.5, 0.1)
"""Shares of the parameters at which the chosen channels are compared."""


def cells() -> Iterator[tuple[int, dict[str, Any], Any]]:
    """``(rank, key, measure)``: of HAP's table and of the agreement of precisions."""
    known = {(r["depth"], r["seed"], r["left"], r["way"]) for r in borrowed()}
    for depth, seed, left, way in product((20, 56), (0, 1), LEFT, WAYS):
        rank = 10 * seed + (30 if depth == 56 else 0) + LEFT.index(left) + (5 if way in ("taylor", "random", "HAP, 32 probes") else 0)
        if (depth, seed, left, way) in known:
            continue
        if depth == 20 or (seed == 0 and way in (RELEASED, CORRECTED, f"{CORRECTED}, implants", DEFAULT, BETTER, "magnitude", PEER)):
            yield rank, {"part": "hap", "depth": depth, "seed": seed, "left": left, "way": way, "epochs": 1}, recovered
    for depth, seed in product((32, 56), (0, 1)):
        yield 4 + 20 * seed + (10 if depth == 56 else 0), {"part": "agreement", "depth": depth, "seed": seed, "probes": PROBED}, agreement
    for depth, seed, name in product((32,), (0, 1), ("full", "bfloat16", "float16")):
        key = {"part": "ehap", "depth": depth, "seed": seed, "trace": name, "probes": PROBED, "left": 0.1, "epochs": 1}
        yield 8 + 20 * seed, key, half


def borrowed() -> list[records.Record]:
    """Rows of HAP's table that ``benchmarks.cifar10`` has measured already, with the same fine-tune."""
    rows = {(r["depth"], r.get("seed"), r.get("share"), r["method"], r.get("epochs")): r for r in records.read(CIFAR10)}
    found = []
    for (depth, seed, left, method, epochs), r in rows.items():
        if epochs == 1 and method in BORROWED and (before := rows.get((depth, seed, left, method, 0))):
            whole = rows[depth, None, None, "original", None]
            sizes = {k: r[k] / whole[k] for k in ("params", "macs")}
            key = {"part": "hap", "depth": depth, "seed": seed, "left": left, "way": BORROWED[method], "epochs": 1}
            found.append({**key, "pruned": before["accuracy"], "accuracy": r["accuracy"], **sizes, "environment": r["environment"]})
    return found


@cache
def network(depth: int) -> tuple[nn.Module, Structure]:
    """The trained network and its structure."""
    model = recipe.model(depth=depth)
    return model, trace(model, recipe.example())


def recovered(key: Key) -> records.Record:
    """Accuracy on the test images right after pruning and after the fine-tune."""
    small, plan = smaller(key["depth"], key["seed"], key["left"], key["way"])
    return _tuned(small, key) | _sizes(key["depth"], small) | ({} if plan is None else shares(plan))


def _tuned(small: nn.Module, key: Key) -> records.Record:
    before = recipe.evaluate(small, "test")
    how = {"epochs": key["epochs"], "lr": 0.01, "weight_decay": 1e-4, "precision": "bfloat16", "seed": key["seed"]}
    tuned = fit(small, recipe.loss, partial(recipe.batches, "train"), **how).model
    after = recipe.evaluate(tuned, "test")
    return {"pruned": before["accuracy"], "accuracy": after["accuracy"]}


def _sizes(depth: int, small: nn.Module) -> records.Record:
    _, structure = network(depth)
    whole, now = cost(Plan(structure)), cost(Plan(trace(small, recipe.example())))
    return {"params": now.params / whole.params, "macs": now.macs / whole.macs}


def smaller(depth: int, seed: int, left: float, way: str) -> tuple[nn.Module, Plan | None]:
    """The network of a way at a share of the parameters, statistics re-estimated, or refitted where that is part of the way."""
    model, structure = network(depth)
    batches = recipe.batches("calibration", seed=seed)
    if way == PEER:
        return reestimate(peer.prune(model, recipe.example(), left), batches), None
    own = way.startswith("HAP")
    plan = hap_plan(depth, seed, left, way) if own else search(structure, scores(depth, seed, way), at_most(params=left))
    small = apply(model, plan, recipe.example())
    if way.startswith(RELEASED) and plan.implants:
        small = zeroed(small, plan)
    small = reestimate(small, batches)
    return (repair(small, model, batches, plan).model if way.startswith("curvepress") else small), plan


def hap_plan(depth: int, seed: int, left: float, way: str) -> Plan:
    """HAP's plan: as released from 3 random vectors on 336 images, or corrected from the exact trace on 512."""
    _, structure = network(depth)
    released, implants = way.startswith(RELEASED), 0.1 if way.endswith("implants") else 0.0
    rule = Rule(implants=implants, first=released, inverted=released)
    return within({"params": left}, structure, scores(depth, seed, way.removesuffix(", implants")), rule)


@cache
def scores(depth: int, seed: int, way: str) -> Scores:
    """The scores of every channel."""
    model, structure = network(depth)
    batches = recipe.batches("calibration", seed=seed)
    if way == RELEASED:
        return relative_traces(model, recipe.loss, one_batch(batches, 336, 3), structure, seed=seed)
    if way == CORRECTED:
        return relative_traces(model, recipe.loss, apart(batches, 512), structure, estimator="exact", seed=seed)
    if way.startswith("HAP"):
        return relative_traces(model, recipe.loss, one_batch(batches, 128, 32), structure, seed=seed)
    method = {DEFAULT: "mask_curvature", BETTER: "reconstruction"}.get(way, way)
    how = {"samples": SAMPLES.get(way, 2), "seed": seed, "temperature": 4.0 if way == BETTER else 1.0}
    return score(model, recipe.loss, batches, structure, method=method, **how)


@cache
def traced(depth: int, seed: int, name: str) -> Scores:
    """HAP's score of every channel, by the precision of its passes."""
    model, structure = network(depth)
    batches = recipe.batches("calibration", seed=seed)
    drawn, precision = (
        one_batch(batches, IMAGES, PROBED),
        name.rpartition(" ")[2] if name.startswith("released") else name.partition(",")[0],
    )
    if name == "exact":
        return relative_traces(
            model, recipe.loss, apart(recipe.batches("calibration", seed=seed, batch_size=64), IMAGES), structure, estimator="exact"
        )
    if name.startswith("released"):
        return released_traces(model, recipe.loss, drawn.batches[0], structure, probes=300, done={}, precision=precision, seed=seed)
    own = seed + 100 if name.endswith("vectors") else seed
    return relative_traces(model, recipe.loss, drawn, structure, precision=precision, seed=own)


def agreement(key: Key) -> records.Record:
    """How far rankings and chosen sets agree with those of full precision, and with those of the exact trace."""
    depth, seed = key["depth"], key["seed"]
    _, structure = network(depth)
    found = {name: traced(depth, seed, name) for name in TRACES}
    flat = {name: np.concatenate([s.values[g.name] for g in structure.free]) for name, s in found.items()}
    rows = {}
    for name in TRACES:
        gone = {left: [_gone(structure, found[n], left) for n in (name, "full")] for left in AGREED}
        rows[name] = {
            "spearman with full": spearman(flat[name], flat["full"]),
            "spearman with exact": spearman(flat[name], flat["exact"]),
            "same gone": {str(left): len(a & b) / max(1, len(b)) for left, (a, b) in gone.items()},
            "negative": float((flat[name] < 0).mean()),
        }
    return {"rows": rows}


def _gone(structure: Structure, scores: Scores, left: float) -> set[tuple[str, int]]:
    plan = search(structure, scores, at_most(params=left))
    return {(g.name, int(c)) for g in structure.free for c in lost(plan, g)}


def half(key: Key) -> records.Record:
    """Accuracy of the network chosen by passes of a precision, after the same fine-tune."""
    model, structure = network(key["depth"])
    plan = within({"params": key["left"]}, structure, traced(key["depth"], key["seed"], key["trace"]), Rule())
    small = reestimate(apply(model, plan, recipe.example()), recipe.batches("calibration", seed=key["seed"]))
    return _tuned(small, key) | _sizes(key["depth"], small)
