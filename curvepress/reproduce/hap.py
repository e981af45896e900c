"""HAP: the relative Hessian trace of every channel, one threshold for all, and 1x1 filters for the best of what goes.

Source: Yu et al., "Hessian-Aware Pruning and Optimal Neural Implant", WACV 2022, arXiv:2101.08940, and the code its authors released.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
from torch import nn

from .. import curvature
from ..curvature import Sample, Stop
from ..files import write_text
from ..objective import Loss
from ..plan import dumps, to_json
from ..repairing.refitting import zeroed
from ..runs.artifacts import StoredSamples, load_scores, load_structure, save, save_scores
from ..runs.desk import Desk
from ..runs.folder import PLAN, scratch
from ..scores import LOSS_UNIT, Scores, part_of
from ..scores.quadratic import half_mean_square, made_by
from ..stages.findings import REPAIRED
from ..structure import Group, Structure
from ..training.batchnorm import reestimate
from .preset import Correction, Preset, Published
from .sampling import Drawn, apart, one_batch
from .thresholds import Rule, within

Settings = Mapping[str, Any]
CODE = "released code, "
FIRST, INVERTED = "the first channel", "sorted, the kept share limited"
PRESET = Preset(
    "hap",
    "HAP",
    "Yu et al., Hessian-Aware Pruning and Optimal Neural Implant, WACV 2022, arXiv:2101.08940",
    "S_c = tr(H_c) / (2 p_c) * |w_c|^2 for every output channel c of p_c weights (relative Hessian trace)",
    settings={
        "estimator": "hessian",
        "probes": 3,
        "precision": "full",
        "examples": 336,
        "limit": 0.95,
        "keeps": FIRST,
        "implants": 0.1,
        "layers": INVERTED,
        "start": "zeros",
        "epochs": 120,
        "lr": 0.02,
        "weight_decay": 4e-4,
        "schedule": "step",
        "milestones": (0.5, 0.75),
    },
    sources={
        "estimator": CODE + "hessian_fact.py: Rademacher vectors over all weights at once, v * Hv summed over each channel",
        "probes": CODE + "main_prune.py: the command's own value; the function behind it has 300; that of the paper could not be read",
        "precision": CODE + "hessian_fact.py",
        "examples": CODE + "main_prune.py: the last of the unshuffled batches of 512 is taken, which has 336 of 50,000 images",
        "limit": CODE + "config: prune_ratio_limit, the most of a layer that goes",
        "keeps": CODE + "prune_utils.py: where one channel or none is left of a layer, channel 0 is what stays",
        "implants": CODE + "main_prune.py: ni_ratio, of the channels that would go",
        "layers": CODE + "hessian_pruner.py: which layers are limited where there are implants, and by what",
        "start": CODE + "prune_utils.py: 1x1 filters are set to the centres of the kernels, then to zero",
        "epochs": CODE + "main_prune.py",
        "lr": "README of the released code, ResNet-56",
        "weight_decay": "README of the released code, ResNet-56",
        "schedule": CODE + "hessian_pruner.py: divided by ten",
        "milestones": CODE + "hessian_pruner.py: shares of the epochs",
    },
    corrections={
        "probes": Correction(300, "three random vectors leave the ranking to chance for the most part; 300 are the function's own default"),
        "examples": Correction(512, "the batch that is asked for, not the rest of a division"),
        "keeps": Correction("the best channel", "a layer of which little stays should keep the best of it"),
        "layers": Correction(
            "by channel, the lost share limited",
            "with implants the limit on what a layer may lose is tested on what it keeps, so it strikes the most sensitive layers, cuts "
            "them to a twentieth, and takes places in a sorted list for channels",
        ),
        "start": Correction("centres", "the centres of the kernels are computed and then thrown away"),
    },
    deviations=(
        "Channels that a residual sum couples go together: such a channel is worth the most that any layer gives it, as it stays in HAP "
        "while one layer keeps it. HAP also cuts the layers below the threshold alone, and scatters what the others make at run time.",
        "The threshold is set by a budget, not by a share of channels: of all thresholds whose plan fits, that which keeps most is taken.",
        "Pointwise implants are put in where the channels' order is free: not in streams that padded shortcuts carry on.",
        "Images are drawn at random, not the last of the set; statistics of BatchNorm are estimated again before the fine-tune; the best "
        "epoch is chosen on validation images, where the released code chooses on the test images.",
        "Batches are the recipe's (HAP: 64 images), and momentum is Nesterov's.",
        "Of transformers only whole heads go, priced as the sum over their projections: the code for them was not released.",
    ),
    published=(
        Published("CIFAR-10, PreResNet-29", "94.3 % with more than 70 % of the parameters gone, less than 0.1 % lost", "abstract, v1"),
        Published("ImageNet, ResNet-50", "75.1 % with more than 50 % of the parameters gone, 0.5 % lost", "abstract, v1"),
        Published("CIFAR-10, against EigenDamage", "up to 1.2 % better at fewer parameters and operations", "abstract, v1"),
        Published("ImageNet, ResNet-50, against HRank", "up to 2 % better at fewer parameters and operations", "abstract, v1"),
        Published("heads of transformers, against slopes", "up to 0.8 % better with 60 % of the parameters gone", "abstract, v3"),
    ),
    unread=("all rows of its tables (PreResNet-29, ResNet-56, WideResNet-32, VGG-16, ResNet-50, heads)", "its number of random vectors"),
)


def relative_traces(
    model: nn.Module,
    loss: Loss,
    drawn: Drawn,
    structure: Structure,
    *,
    estimator: str = "hessian",
    precision: str = "full",
    seed: int = 0,
    done: MutableMapping[int, Sample] | None = None,
) -> Scores:
    """HAP's score of every channel: ``tr(H_c) / (2 p_c) * |w_c|^2`` of each weight that makes it, joined by :func:`joined`."""
    weights = made_by(model, structure)
    makers = {f"{g.name} {i}": m for g in structure.free for i, m in enumerate(m for m in g.producers() if m.tensor in weights)}
    factors = {name: half_mean_square(m, weights[m.tensor]) for name, m in makers.items()}
    measures = {name: curvature.Trace((part_of(m, weights[m.tensor]),), len(m.rows)) for name, m in makers.items()}
    found = curvature.estimate(
        model, loss, drawn.batches, measures, estimator=estimator, precision=precision, probes=drawn.probes, seed=seed,
        stop=Stop(samples=len(drawn.batches)), decide=lambda s: {n: factors[n] * s[n] for n in factors}, done=done,
    )  # fmt: skip
    pairs = {g.name: joined(g, found.mean, found.stderr) for g in structure.free}
    values, errors = ({g: pair[i] for g, pair in pairs.items()} for i in (0, 1))
    return Scores(values, errors, "relative Hessian trace", LOSS_UNIT, found.samples, seed, str(found))


def joined(group: Group, values: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One score for each channel of what the weights that make it give (``"group i"``): the largest, for a residual sum carries a channel
    as long as one of them makes it; of heads the sum, for their projections go together."""
    own = [name for name in values if name.rpartition(" ")[0] == group.name]
    made, spread = np.stack([values[n] for n in own]), np.stack([errors[n] for n in own])
    if group.kind == "head":
        return made.sum(0), np.sqrt(np.square(spread).sum(0))
    best = made.argmax(0)[None]
    return np.take_along_axis(made, best, 0)[0], np.take_along_axis(spread, best, 0)[0]


def drawn(desk: Desk, settings: Settings) -> Drawn:
    """The calibration images that a system's traces are estimated on."""
    batches, count = desk.recipe.batches("calibration", seed=settings["seed"]), settings["examples"]
    return one_batch(batches, count, settings["probes"]) if settings["estimator"] == "hessian" else apart(batches, count)


def scored(desk: Desk, settings: Settings) -> None:
    """The work of the score stage."""
    structure, how = load_structure(desk.path("structure.json")), {k: settings[k] for k in ("estimator", "precision", "seed")}
    done = StoredSamples(scratch(desk.run, "score", settings))
    save_scores(relative_traces(desk.original(), desk.recipe.loss, drawn(desk, settings), structure, done=done, **how), desk.run.folder)


def planned(desk: Desk, settings: Settings) -> None:
    """The work of the plan stage: one threshold for all channels, and 1x1 filters for the best of those below it."""
    structure, scores = load_structure(desk.path("structure.json")), load_scores(desk.run.folder)
    first, inverted = settings["keeps"] == FIRST, settings.get("layers") == INVERTED
    rule = Rule(settings["limit"], settings.get("implants", 0.0), first=first, inverted=inverted)
    plan = within(settings["budget"], structure, scores, rule, whole=settings["whole"])
    write_text(desk.path(PLAN), to_json(plan))


def started(desk: Desk, settings: Settings) -> None:
    """The work of the repair stage: nothing is refitted, but 1x1 filters may start at zero."""
    small = desk.compressed("pruned.safetensors")
    if settings["start"] == "zeros" and desk.plan().implants:
        small = reestimate(zeroed(small, desk.plan()), desk.recipe.batches("calibration", seed=settings["seed"]))
    metrics = {"with implants": desk.recipe.metrics(small, "validation")} if desk.plan().implants else {}
    save(small, desk.path("repaired.safetensors"))
    facts = {"validation": metrics, "layers": [], "left": {}, "examples": 0, "bytes": 0}
    write_text(desk.path("repaired.json"), dumps({**REPAIRED, **facts}))
