"""EHAP: HAP's criterion from half-precision passes, then a fine-tune and eight-bit training: one pipeline, an integer file at its end.

Source: Chong, Gupta and Chen, "Resource Efficient Neural Networks Using Hessian Based Pruning", 2023, arXiv:2306.07030, and the code its
authors released.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from ..curvature import Sample
from ..objective import Batch, Loss
from ..runs.artifacts import StoredSamples, load_structure, save_scores
from ..runs.desk import Desk
from ..runs.folder import scratch
from ..scores import RELATIVE_UNIT, Scores
from ..structure import Structure
from . import hap
from .preset import Correction, Preset, Published
from .sampling import Drawn

CODE = "released code, "
Settings = Mapping[str, Any]
WEIGHTS = (256.0, 1.0, 1 / 256)
"""What the released scale multiplies the products of the random vectors with; from the fourth on float16 leaves nothing of them."""
PRESET = Preset(
    "ehap",
    "EHAP",
    "Chong, Gupta and Chen, Resource Efficient Neural Networks Using Hessian Based Pruning, 2023, arXiv:2306.07030",
    "S_c = tr(H_c) / p_c * |w_c|^2 as in HAP, with the trace from float16 passes",
    settings={
        "estimator": "hessian",
        "probes": 300,
        "precision": "float16",
        "scale": "divided by 256 before every vector",
        "examples": 336,
        "limit": 0.95,
        "keeps": hap.FIRST,
        "epochs": 300,
        "lr": 0.0512,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "qat_epochs": 30,
        "qat_lr": 1e-4,
        "qat_weight_decay": 1e-4,
        "bits": 8,
        "ranges": "minmax",
    },
    sources={
        "estimator": CODE + "hutchinson.py",
        "probes": CODE + "hutchinson.py",
        "precision": CODE + "hutchinson.py: autocast around the forward pass and the loss, weights and sums in float32",
        "scale": CODE + "hutchinson.py: the scale of the products is divided by 256 inside the loop and never taken out of them",
        "examples": CODE + "the last of the unshuffled batches of 512 is taken, which has 336 of 50,000 images",
        "limit": CODE + "as in HAP, of which it is a rewrite",
        "keeps": CODE + "as in HAP, of which it is a rewrite",
        "epochs": "README of the released code",
        "lr": "README of the released code",
        "weight_decay": "README of the released code",
        "schedule": "README of the released code",
        "qat_epochs": CODE + "and README",
        "qat_lr": CODE + "and README",
        "qat_weight_decay": CODE + "and README",
        "bits": "abstract; " + CODE + "uniform8: weights symmetric by output channel, activations asymmetric by tensor",
        "ranges": CODE + "quant_utils: running least and largest values; weights by their largest",
    },
    corrections={
        "scale": Correction(
            "held, and taken out again",
            "the vectors weigh 256, 1, 1/256 and from the fourth on nothing in float16: of 300 only the first counts",
        ),
        "examples": Correction(512, "the batch that is asked for, not the rest of a division"),
        "keeps": Correction("the best channel", "a layer of which little stays should keep the best of it"),
    },
    deviations=(
        "All of HAP's, but for implants, which EHAP has none of.",
        "As released, only the three vectors that count are made: the others come out as zero.",
        "Where float16 overflows, the passes are run again at the next smaller scale; the released code ends.",
        "Training on eight bits runs on the exported graph with BatchNorm folded, learns its scales, and takes Nesterov's "
        "momentum; sums of residuals have eight bits where the released code simulates sixteen.",
        "Activations have a zero point in use; the released code computes one and takes unsigned numbers.",
        "What is deployed is a file of integer operators that is run and compared; the released code simulates integers.",
    ),
    published=(
        Published("time of the trace, float16 against float32", "17 to 44 % less, over networks and GPUs", "abstract"),
        Published("GPU memory of the trace, ResNet-32 and ResNet-56", "about 40 % less", "abstract"),
        Published("accuracy, float16 against float32", "no noticeable difference", "abstract"),
    ),
    unread=("all rows of its tables: accuracy, parameters, operations, seconds and memory of each GPU, and those after eight bits",),
)


def released_traces(
    model: nn.Module, loss: Loss, batch: Batch, structure: Structure, *, probes: int, done: MutableMapping[int, Sample], **how: Any
) -> Scores:
    """HAP's score as EHAP's released loss scale leaves it: the sum over random vectors of :data:`WEIGHTS` times each, divided by all.

    Only ranks.  Standard errors are the spread of single vectors, weighted so.
    """
    found = hap.relative_traces(model, loss, Drawn([batch] * len(WEIGHTS), 1), structure, done=done, **how)
    samples = [done[n] for n in range(len(WEIGHTS))]
    sums = {name: np.average([s[name] for s in samples], axis=0, weights=WEIGHTS) * sum(WEIGHTS) / probes for name in samples[0]}
    spread = {name: np.std([s[name] for s in samples], axis=0, ddof=1) * np.hypot.reduce(WEIGHTS) / probes for name in samples[0]}
    pairs = {g.name: hap.joined(g, sums, spread) for g in structure.free}
    values, errors = ({g: pair[i] for g, pair in pairs.items()} for i in (0, 1))
    return replace(found, values=values, stderr=errors, unit=RELATIVE_UNIT, samples=1)


def scored(desk: Desk, settings: Settings) -> None:
    """The work of the score stage."""
    if settings["scale"] == PRESET.corrections["scale"].value or settings["estimator"] != "hessian":
        return hap.scored(desk, settings)
    structure, how = load_structure(desk.path("structure.json")), {k: settings[k] for k in ("precision", "seed", "probes")}
    batch = hap.drawn(desk, settings).batches[0]
    done = StoredSamples(scratch(desk.run, "score", settings))
    save_scores(released_traces(desk.original(), desk.recipe.loss, batch, structure, done=done, **how), desk.run.folder)
    return None
