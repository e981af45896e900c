"""NViT: five dimensions of a vision transformer by squared Taylor scores, less what their removal saves in measured latency.

Source: Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023, arXiv:2110.04869; its released code may not
be used commercially and none of it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
from torch import nn

from ..costs import cost
from ..curvature import Sample, Stop
from ..files import write_text
from ..latency import model_seconds
from ..objective import Batch, Batches, Loss
from ..plan import Plan, tensors_after, to_json
from ..planner.channels import at_most
from ..runs.artifacts import load_scores, load_structure, save_scores
from ..runs.desk import Desk
from ..runs.folder import PLAN
from ..scores import RELATIVE_UNIT, Scores, Task, per_channel
from ..scores.data import averaged, gradient
from ..stages.timetables import table_of, timed_plan
from ..structure import Group, Member, Structure
from .preset import Correction, Preset, Published

Settings = Mapping[str, Any]
CODE = "released code, "
PRESET = Preset(
    "nvit",
    "NViT",
    "Yang et al., Global Vision Transformer Pruning with Hessian-Aware Saliency, CVPR 2023, arXiv:2110.04869",
    "I_S = (sum over s in S of w_s dL/dw_s)^2 - eta * (Lat(W) - Lat(W without S)) (eq. 6 and 7)",
    settings={
        "divisors": {"embedding": 12, "head": 12, "query-key": 2, "value": 2, "hidden": 1},
        "members": "queries alone of query-key; of embeddings the readers too",
        "blocks": {"embedding": 16, "head": 2, "query-key": 8, "value": 8, "hidden": 16},
        "eta": 5e-4,
        "samples": 100,
        "epochs": 300,
        "lr": 2e-4,
        "optimizer": "adamw",
        "weight_decay": 0.05,
        "schedule": "cosine",
        "distill": 0.5,
    },
    sources={
        "divisors": CODE + "of sums, before they are squared",
        "members": CODE + "which weights are summed",
        "blocks": CODE + "group_criteria: what goes at once",
        "eta": CODE + "a second",
        "samples": CODE + "batches between two steps of pruning",
        "epochs": "TRAINING.md of the released code",
        "lr": "TRAINING.md of the released code, for 512 images a step",
        "optimizer": "TRAINING.md of the released code",
        "weight_decay": "TRAINING.md of the released code",
        "schedule": "TRAINING.md of the released code",
        "distill": "TRAINING.md of the released code: distill-alpha",
    },
    corrections={
        "divisors": Correction(
            {}, "the paper's main text has no divisors: squared, they make embeddings and heads cheaper by 144, widths of heads by 4"
        ),
        "members": Correction("all that make the channel", "eq. 6 sums over all weights of a structure"),
    },
    deviations=(
        "Scores are taken once, from calibration batches of the trained network; NViT takes them while it trains, averages them over "
        "the steps, and removes two blocks every 100 steps. The latency term is brought up to date after every block, as there.",
        "The gradient is that of the recipe's loss; NViT adds distillation from a convolutional network and 1e5 times a divergence from "
        "the dense model, so its eta has another scale and may weigh nothing here, or all: --eta sets it.",
        "The latency is that of ONNX Runtime on this machine, from a table of layers; NViT has one of blocks on a V100.",
        "Biases are among the weights that make a channel only where the structure says so; tokens and depth are not pruned, as there.",
    ),
    published=(
        Published("ImageNet, NViT-B from DeiT-B (83.36 %)", "83.29 %, 2.57 times fewer parameters, 1.86 times as fast (V100)", "table 1"),
        Published("ImageNet, NViT-H", "82.95 %, 2.84 times fewer parameters, 2.01 times as fast", "table 1"),
        Published("ImageNet, NViT-S", "82.19 %, 4.18 times fewer parameters, 2.52 times as fast", "table 1"),
        Published("ImageNet, NViT-T", "76.21 %, 12.47 times fewer parameters, 4.97 times as fast", "table 1"),
    ),
    unread=("appendices A to C: hyper-parameters, the latency table, ablations",),
)


def squared_taylor(model: nn.Module, loss: Loss, batches: Batches, structure: Structure, settings: Settings, *, seed: int = 0) -> Scores:
    """``((sum of g * w) / divisor)^2`` of every channel, a mean over batches."""
    members = {g.name: summed(g, structure, settings["members"]) for g in structure.free}
    watched = {m.tensor for own in members.values() for m in own}
    weights = {n: p.detach() for n, p in model.named_parameters() if n in watched}
    divisors = {g.name: settings["divisors"].get(g.kind, 1) for g in structure.free}

    def sample(batch: Batch) -> Sample:
        slopes = gradient(model, loss, batch, weights)
        moved = {n: slopes[n] * w for n, w in weights.items()}
        sums = {g: np.sum([per_channel(m, moved[m.tensor]) for m in own if m.tensor in moved], axis=0) for g, own in members.items()}
        return {g: np.square(s / divisors[g]) for g, s in sums.items()}

    model.eval()
    task = Task(loss, islice(batches, settings["samples"]), Stop(samples=settings["samples"]), seed)
    return averaged(sample, task, "squared Taylor", RELATIVE_UNIT)


def summed(group: Group, structure: Structure, which: str) -> list[Member]:
    """The members of a group that its score sums over: those that make it, or those of the released code."""
    makers = list(group.producers())
    if which == "all that make the channel":
        return makers
    if group.kind == "query-key":
        return makers[:1]
    readers = [m for m in group.members if m.role == "in"] if group.kind == "embedding" else []
    large = [m for m in (*makers, *readers) if len(structure.tensors[m.tensor].shape) > 1]
    return large or makers


def greedy(
    structure: Structure,
    scores: Scores,
    seconds: Callable[[Plan], float],
    blocks: Mapping[str, int],
    *,
    eta: float,
    fits: Callable[[Plan], bool],
) -> Plan:
    """Blocks of channels go one after the other, each time the one of the least score less ``eta`` times the seconds that it saves now.

    A group keeps one block at least.

    Raises:
        ValueError: if what can go is not enough.
    """
    left = {g.name: np.argsort(-scores.values[g.name], kind="stable") for g in structure.free}
    steps = {g.name: min(_channels(g, blocks), g.size) for g in structure.free}
    plan = _plan(structure, left)
    while not fits(plan):
        now, best = seconds(plan) if eta else 0.0, None
        for name, order in left.items():
            if len(order) <= steps[name]:
                continue
            fewer = {**left, name: order[: _next(len(order), steps[name])]}
            block = float(scores.values[name][order[len(fewer[name]) :]].sum())
            worth = block - eta * (now - seconds(_plan(structure, fewer))) if eta else block
            if best is None or worth < best[0]:
                best = worth, fewer
        if best is None:
            raise ValueError("no plan fits the budget, and no block of channels is left that may go; allow more")
        left = best[1]
        plan = _plan(structure, left)
    return plan


def _channels(group: Group, blocks: Mapping[str, int]) -> int:
    return blocks.get(group.kind, 1)


def _next(width: int, step: int) -> int:
    return (ceil(width / step) - 1) * step


def _plan(structure: Structure, left: Mapping[str, np.ndarray]) -> Plan:
    return Plan(structure, {n: tuple(np.sort(order).tolist()) for n, order in left.items()})


def scored(desk: Desk, settings: Settings) -> None:
    """The work of the score stage."""
    batches = desk.recipe.batches("calibration", seed=settings["seed"])
    structure = load_structure(desk.path("structure.json"))
    save_scores(squared_taylor(desk.original(), desk.recipe.loss, batches, structure, settings, seed=settings["seed"]), desk.run.folder)


def planned(desk: Desk, settings: Settings) -> None:
    """The work of the plan stage: the plan that keeps the latency budget in the runtime, or one of another budget."""
    structure, scores = load_structure(desk.path("structure.json")), load_scores(desk.run.folder)
    budget, eta, latency = settings["budget"], settings["eta"], settings["latency"]
    table = table_of(desk, settings) if eta or latency is not None else None
    whole = cost(Plan(structure), table)

    def seconds(plan: Plan) -> float:
        return model_seconds(tensors_after(plan), table) if table else 0.0

    def search(limit: float | None) -> Plan:
        limits = at_most(**budget, **({} if limit is None else {"latency": limit}))
        return greedy(structure, scores, seconds, settings["blocks"], eta=eta, fits=lambda p: limits(cost(p, table), whole))

    plan = search(None) if latency is None or table is None else timed_plan(desk, settings, table, search).plan
    write_text(desk.path(PLAN), to_json(plan))
