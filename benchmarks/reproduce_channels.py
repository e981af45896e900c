"""Cells of the results page about channels: HAP beside other scores, EHAP's half precision beside full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from benchmarks import peer, records
from benchmarks.cifar10 import FILE as CIFAR10
from curvepress.costs import cost
from curvepress.curvature import spearman
from curvepress.objective import Batches
from curvepress.plan import Plan, lost
from curvepress.planner.channels import at_most, search
from curvepress.repairing.refitting import zeroed
from curvepress.repairing.sequential import repair
from curvepress.reproduce.ehap import released_traces
from curvepress.reproduce.hap import relative_traces
from curvepress.reproduce.sampling import apart, one_batch
from curvepress.reproduce.thresholds import Rule, shares, within
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress.training.batchnorm import reestimate
from curvepress.training.fitting import fit
from curvepress_recipes import cifar10, digits

Key = Mapping[str, Any]


@dataclass(frozen=True)
class Net:
    """A trained network, its data, and the fine-tune that every way gets."""

    recipe: ModuleType
    options: Mapping[str, Any]
    epochs: int
    lr: float
    precision: str

    def model(self, seed: int) -> nn.Module:
        """The trained network: of digits, which are trained on the spot, another one for each seed."""
        return self.recipe.model(**({"seed": seed} if self.recipe is digits else self.options))


NETS = {
    "digits": Net(digits, {}, 5, 0.02, "full"),
    **{f"ResNet-{depth}": Net(cifar10, {"depth": depth}, 1, 0.01, "bfloat16") for depth in (20, 32, 56)},
}
PEER, MASKED, BETTER = "Torch-Pruning", "curvepress, mask_curvature", "curvepress, reconstruction"
OURS = f"{BETTER} per parameter"
"""What `compress` does by itself."""
RELEASED, CORRECTED = "HAP, as released", "HAP, corrected"
WAYS = (
    RELEASED,
    f"{RELEASED}, implants",
    CORRECTED,
    f"{CORRECTED}, implants",
    "HAP, 32 probes",
    MASKED,
    BETTER,
    OURS,
    "magnitude",
    "taylor",
    "random",
    PEER,
)
SUMS = "HAP's score, 96 vectors, sums"
SHOWN = (*WAYS[:5], SUMS, *WAYS[5:])
"""Ways in the order of the table: one, which adds up what coupled layers give, comes from records of ``benchmarks.cifar10`` alone."""
BORROWED = {
    "hessian_trace": SUMS,
    "magnitude": "magnitude",
    "taylor": "taylor",
    "random": "random",
    "torch-pruning": PEER,
    "mask_curvature, repaired": MASKED,
    "reconstruction, repaired": BETTER,
    "reconstruction per parameter, repaired": OURS,
}
LEFT = (0.5, 0.3, 0.1)
SAMPLES = {MASKED: 32, BETTER: 16, OURS: 16, "taylor": 48}
PROBED, IMAGES = 32, 128
"""Random vectors and images with which precisions are compared."""
TURN = {"ResNet-20": 0, "ResNet-56": 16, "ResNet-32": 22}
"""How late each network has its turn; second seeds and the ways that decide less come after all first ones."""
TRACES = ("full", "bfloat16", "float16", "full, other vectors", "released scale, float16", "exact")
AGREED = (0.5, 0.1)
"""Shares of the parameters at which the chosen channels are compared."""


def passes(network: str) -> tuple[str, ...]:
    """The precisions that are compared: convolutions in float16 take a processor so long that the digits alone have them."""
    return tuple(t for t in TRACES if network == "digits" or (not t.endswith(" float16") and t != "float16"))


def cells() -> Iterator[tuple[int, dict[str, Any], Any]]:
    """``(rank, key, measure)``: of HAP's table and of the agreement of precisions."""
    known = {(r["network"], r["seed"], r["left"], r["way"]) for r in borrowed()}
    few = (RELEASED, CORRECTED, f"{CORRECTED}, implants", OURS, "magnitude", PEER)
    for network, seed, left, way in product(("digits", *TURN), range(3), LEFT, WAYS):
        rank = -40 + 10 * seed if network == "digits" else TURN[network] + 40 * seed + (0 if way in few else 20)
        wanted = network == "digits" or not seed or (seed == 1 and network == "ResNet-20")
        if wanted and (way in few or network in ("digits", "ResNet-20")):
            key = {"part": "hap", "network": network, "seed": seed, "left": left, "way": way, "epochs": NETS[network].epochs}
            if (network, seed, left, way) not in known and (way != PEER or (network != "digits" and left > LEFT[-1])):
                yield rank + LEFT.index(left), key, recovered
    for network, seed in product(("digits", "ResNet-32", "ResNet-56"), range(3)):
        if network == "digits" or seed < 2:
            rank = {"digits": -35, "ResNet-32": 4, "ResNet-56": 14}[network] + 10 * seed
            yield rank, {"part": "agreement", "network": network, "seed": seed, "probes": PROBED}, agreement
    for network, seed, left, name in product(("digits", "ResNet-32"), range(3), AGREED, TRACES[:3]):
        if name in passes(network) and (network == "digits" or (seed < 2 and left == AGREED[-1])):
            rank = 10 * seed + (-35 if network == "digits" else 5)
            key = {"part": "ehap", "network": network, "seed": seed, "trace": name, "probes": PROBED, "left": left}
            yield rank, {**key, "epochs": NETS[network].epochs}, half


def borrowed() -> list[records.Record]:
    """Rows of HAP's table that ``benchmarks.cifar10`` has measured already, with the same fine-tune."""
    rows = {(r["depth"], r.get("seed"), r.get("share"), r["method"], r.get("epochs")): r for r in records.read(CIFAR10)}
    found = []
    for (depth, seed, left, method, epochs), r in rows.items():
        if epochs == 1 and method in BORROWED and (before := rows.get((depth, seed, left, method, 0))):
            whole = rows[depth, None, None, "original", None]
            sizes = {k: r[k] / whole[k] for k in ("params", "macs")}
            key = {"part": "hap", "network": f"ResNet-{depth}", "seed": seed, "left": left, "way": BORROWED[method], "epochs": 1}
            found.append({**key, "pruned": before["accuracy"], "accuracy": r["accuracy"], **sizes, "environment": r["environment"]})
    return found


@cache
def network(name: str, seed: int) -> tuple[nn.Module, Structure]:
    """The trained network and its structure."""
    model = NETS[name].model(seed)
    return model, trace(model, NETS[name].recipe.example())


def calibration(name: str, seed: int, **more: Any) -> Batches:
    """Training images, drawn at random."""
    return NETS[name].recipe.batches("calibration", seed=seed, **more)


def recovered(key: Key) -> records.Record:
    """Accuracy on the test images right after pruning and after the fine-tune."""
    small, plan = smaller(key["network"], key["seed"], key["left"], key["way"])
    return _tuned(small, key) | _sizes(key, small) | ({} if plan is None else shares(plan))


def _tuned(small: nn.Module, key: Key) -> records.Record:
    net = NETS[key["network"]]
    before = net.recipe.evaluate(small, "test")
    how = {"epochs": key["epochs"], "lr": net.lr, "weight_decay": 1e-4, "precision": net.precision, "seed": key["seed"]}
    tuned = fit(small, net.recipe.loss, partial(net.recipe.batches, "train"), **how).model
    return {"pruned": before["accuracy"], "accuracy": net.recipe.evaluate(tuned, "test")["accuracy"]}


def _sizes(key: Key, small: nn.Module) -> records.Record:
    _, structure = network(key["network"], key["seed"])
    whole, now = cost(Plan(structure)), cost(Plan(trace(small, NETS[key["network"]].recipe.example())))
    return {"params": now.params / whole.params, "macs": now.macs / whole.macs}


def smaller(name: str, seed: int, left: float, way: str) -> tuple[nn.Module, Plan | None]:
    """The network of a way at a share of the parameters, statistics re-estimated, or refitted where that is part of the way."""
    (model, structure), example, batches = network(name, seed), NETS[name].recipe.example(), calibration(name, seed)
    if way == PEER:
        return reestimate(peer.prune(model, example, left), batches), None
    own = way.startswith("HAP")
    plan = (
        hap_plan(name, seed, left, way)
        if own
        else search(structure, scores(name, seed, way), at_most(params=left), per="params" if way == OURS else "channel")
    )
    small = apply(model, plan, example)
    if way.startswith(RELEASED) and plan.implants:
        small = zeroed(small, plan)
    small = reestimate(small, batches)
    return (repair(small, model, batches, plan).model if way.startswith("curvepress") else small), plan


def hap_plan(name: str, seed: int, left: float, way: str) -> Plan:
    """HAP's plan: as released from 3 random vectors on 336 images, or corrected from the exact trace on 512."""
    _, structure = network(name, seed)
    released, implants = way.startswith(RELEASED), 0.1 if way.endswith("implants") else 0.0
    rule = Rule(implants=implants, first=released, inverted=released)
    return within({"params": left}, structure, scores(name, seed, way.removesuffix(", implants")), rule)


@cache
def scores(name: str, seed: int, way: str) -> Scores:
    """The scores of every channel."""
    (model, structure), loss, batches = network(name, seed), NETS[name].recipe.loss, calibration(name, seed)
    if way == RELEASED:
        return relative_traces(model, loss, one_batch(batches, 336, 3), structure, seed=seed)
    if way == CORRECTED:
        return relative_traces(model, loss, apart(batches, 512), structure, estimator="exact", seed=seed)
    if way.startswith("HAP"):
        return relative_traces(model, loss, one_batch(batches, 128, 32), structure, seed=seed)
    method = {MASKED: "mask_curvature", BETTER: "reconstruction", OURS: "reconstruction"}.get(way, way)
    how = {"samples": SAMPLES.get(way, 2), "seed": seed, "temperature": 4.0 if way in (BETTER, OURS) else 1.0}
    return score(model, loss, batches, structure, method=method, **how)


@cache
def traced(network_name: str, seed: int, name: str) -> Scores:
    """HAP's score of every channel, by the precision of its passes."""
    (model, structure), loss = network(network_name, seed), NETS[network_name].recipe.loss
    if name == "exact":
        images = apart(calibration(network_name, seed, batch_size=64), IMAGES)
        return relative_traces(model, loss, images, structure, estimator="exact")
    drawn = one_batch(calibration(network_name, seed), IMAGES, PROBED)
    if name.startswith("released"):
        precision = name.rpartition(" ")[2]
        return released_traces(model, loss, drawn.batches[0], structure, probes=300, done={}, precision=precision, seed=seed)
    own = seed + 100 if name.endswith("vectors") else seed
    return relative_traces(model, loss, drawn, structure, precision=name.partition(",")[0], seed=own)


def agreement(key: Key) -> records.Record:
    """How far rankings and chosen sets agree with those of full precision, and with those of the exact trace."""
    _, structure = network(key["network"], key["seed"])
    found = {name: traced(key["network"], key["seed"], name) for name in passes(key["network"])}
    flat = {name: np.concatenate([s.values[g.name] for g in structure.free]) for name, s in found.items()}
    rows = {}
    for name in found:
        gone = {left: [_gone(structure, found[n], left) for n in (name, "full")] for left in AGREED}
        rows[name] = {
            "spearman with full": spearman(flat[name], flat["full"]),
            "spearman with exact": spearman(flat[name], flat["exact"]),
            "same gone": {str(left): len(a & b) / max(1, len(b)) for left, (a, b) in gone.items()},
            "negative": float((flat[name] < 0).mean()),
        }
    return {"rows": rows}


def _gone(structure: Structure, scores: Scores, left: float) -> set[tuple[str, int]]:
    plan = search(structure, scores, at_most(params=left), per="channel")
    return {(g.name, int(c)) for g in structure.free for c in lost(plan, g)}


def half(key: Key) -> records.Record:
    """Accuracy of the network chosen by passes of a precision, after the same fine-tune."""
    (model, structure), example = network(key["network"], key["seed"]), NETS[key["network"]].recipe.example()
    plan = within({"params": key["left"]}, structure, traced(key["network"], key["seed"], key["trace"]), Rule())
    small = reestimate(apply(model, plan, example), calibration(key["network"], key["seed"]))
    return _tuned(small, key) | _sizes(key, small)
