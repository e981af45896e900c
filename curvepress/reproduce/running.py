"""A published system as a run: its settings for every stage, its own work where it decides otherwise, and the figures of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runs.artifacts import load_structure
from ..runs.desk import Desk
from ..runs.folder import FLOWS, QUANTIZATION, REPRODUCTION, Run
from ..runs.recipe import Recipe
from ..runs.settings import tuning
from ..stages.pipeline import Stage
from ..stages.quantizing import CHOSEN, PRICED, source_files
from ..stages.sessions import BATCHES, kept, started
from . import ehap, hap, hawq_v2, nvit
from .accounts import accounted
from .preset import Preset

SYSTEMS: Mapping[str, Preset] = {p.name: p for p in (hap.PRESET, ehap.PRESET, hawq_v2.PRESET, nvit.PRESET)}
"""The published systems by name."""
WORK: Mapping[str, Mapping[str, Stage]] = {
    "hap": {"score": hap.scored, "plan": hap.planned, "repair": hap.started},
    "ehap": {"score": ehap.scored, "plan": hap.planned},
    "hawq-v2": {"price": hawq_v2.priced, "choose": hawq_v2.assigned},
    "nvit": {"score": nvit.scored, "plan": nvit.planned},
}
"""The stages that a system does in its own way."""
FLOW: Mapping[str, tuple[str, ...]] = {
    "hap": tuple(FLOWS),
    "ehap": (*FLOWS, *QUANTIZATION),
    "hawq-v2": tuple(QUANTIZATION),
    "nvit": tuple(FLOWS),
}
_GRIDS = {"rounding": "nearest", "calibration": 512}
FIT = ("epochs", "lr", "weight_decay", "schedule", "optimizer", "distill")


@dataclass(frozen=True)
class Asked:
    """What is asked of a system.

    Attributes:
        budget: limits of a plan, as :func:`~curvepress.runs.settings.limits` gives them.
        own: settings of the preset that were given, those that are ``None`` were not.
        recovery: settings of the fine-tune (for ``hawq-v2`` of training quantized) that were given, likewise.
        more: ratio, mean bits and order of sensitivity (``hawq-v2``); runtime and batch (``nvit``).
    """

    system: str
    corrected: bool = False
    budget: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    recovery: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """The system's settings, as asked."""
        return SYSTEMS[self.system].chosen(corrected=self.corrected, **self.own)


def reproduce(asked: Asked, task: Recipe, folder: Path, *, again: bool = False) -> Run:
    """The finished run of a published system in a folder, which is made if missing and continued if interrupted.

    Raises:
        ValueError: if a stage fails, or was done otherwise before.
    """
    work = {**WORK[asked.system], "reproduce": accounted}
    with started(folder, task) as run:
        for stage in (*FLOW[asked.system], *REPRODUCTION):
            run = kept(run, task, stage, _settings(asked, Desk(run, task), stage), again=again, work=work.get(stage))
    return run


def _settings(asked: Asked, desk: Desk, stage: str) -> dict[str, Any]:
    common, chosen = {"seed": asked.seed, "threads": asked.threads}, asked.settings
    if stage in FLOWS:
        return _main(asked, desk, stage, chosen, common)
    if stage in QUANTIZATION:
        return _bits(asked, desk, stage, chosen, common)
    return {"system": asked.system, "corrected": asked.corrected, "settings": chosen, "more": dict(asked.more), **common}


def _main(asked: Asked, desk: Desk, stage: str, chosen: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage of the main job."""
    own = {"system": asked.system, **common}
    if stage == "score":
        return {**own, **{k: v for k, v in chosen.items() if k in _SCORING}}
    if stage == "plan":
        return {**own, **{k: v for k, v in chosen.items() if k in _PLANNING}, **_limits(asked), "whole": _whole(asked, desk)}
    if stage == "repair":
        return {**own, "start": chosen["start"]} if asked.system == "hap" else {"examples": 0, **common}
    if stage == "fit":
        return {**recovery(asked, desk.recipe), **common}
    fixed = {"trace": {"threads": asked.threads}, "apply": common, "report": {}}
    return dict(fixed[stage]) if stage in fixed else {"threads": asked.threads, "batches": list(BATCHES)}


_SCORING = ("estimator", "probes", "precision", "examples", "scale", "divisors", "members", "samples")
_PRICING = ("system", "estimator", "probes", "examples", "asymmetric")
_CHOOSING = ("system", "ratio", "mean", "reversed", "bits", "activation_bits", "asymmetric")
_PLANNING = ("limit", "keeps", "implants", "layers", "blocks", "eta")


def _limits(asked: Asked) -> dict[str, Any]:
    """The budget; a latency stands by itself, with the runtime it is measured in."""
    limits = {k: v for k, v in asked.budget.items() if v is not None}
    latency = limits.pop("latency", None)
    return {"budget": limits, "latency": latency, **asked.more}


def _whole(asked: Asked, desk: Desk) -> list[str]:
    """The kinds of groups that stay whole: of a model with heads, HAP cuts these alone."""
    kinds = {g.kind for g in load_structure(desk.path("structure.json")).free}
    return sorted(kinds - {"head"}) if asked.system in ("hap", "ehap") and "head" in kinds else []


def recovery(asked: Asked, task: Recipe) -> dict[str, Any]:
    """The fine-tune: what was given, else the system's own.  Its milestones are shares of the epochs; a single epoch has none and falls
    as a cosine."""
    own = {k: v for k, v in asked.settings.items() if k in FIT}
    found = {"distill": 0.0, "optimizer": "sgd", **own, **{k: v for k, v in asked.recovery.items() if v is not None}}
    milestones = sorted({int(share * found["epochs"]) for share in asked.settings.get("milestones", ())} - {0})
    if found["schedule"] == "step":
        found |= {"milestones": milestones} if milestones else {"schedule": "cosine"}
    return tuning(task, found)


def _bits(asked: Asked, desk: Desk, stage: str, chosen: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage of quantization."""
    if asked.system == "ehap":
        return dict(_eight_bits(asked, desk, stage, chosen, common))
    own = {"system": asked.system, **asked.more, **common}
    if stage == "load":
        return {"source": None, "files": {}, "threads": asked.threads}
    if stage == "price":
        return {k: v for k, v in {**own, **chosen}.items() if k in (*_PRICING, *common)}
    if stage == "choose":
        return {k: v for k, v in {**own, **chosen}.items() if k in _CHOOSING}
    if stage == "quantize":
        given = {"epochs": 0, "lr": 0.002, **{k: v for k, v in asked.recovery.items() if v is not None}}
        return {**tuning(desk.recipe, given), **_GRIDS, "rounding": chosen["rounding"], "ranges": chosen["ranges"], **common}
    return {"batches": list(BATCHES), "exports": ["onnx"], **common}


def _eight_bits(asked: Asked, desk: Desk, stage: str, chosen: Mapping[str, Any], common: Mapping[str, Any]) -> Mapping[str, Any]:
    """EHAP's: eight bits for all, trained for a while."""
    training = {
        "epochs": chosen["qat_epochs"],
        "lr": chosen["qat_lr"],
        "weight_decay": chosen["qat_weight_decay"],
        "schedule": "cosine",
        "optimizer": "sgd",
        "distill": asked.recovery.get("distill") or 0.0,
    }
    precision = {"precision": p} if (p := asked.recovery.get("precision")) else {}
    return {
        "load": {"source": str(desk.run.folder.resolve()), "files": dict(source_files(desk.run.folder)), "threads": asked.threads},
        "price": {**PRICED, "price": "trace", "examples": 256, **common},
        "choose": {**CHOSEN, "bits": chosen["bits"]},
        "quantize": {**tuning(desk.recipe, {**training, **precision}), **_GRIDS, "ranges": chosen["ranges"], **common},
        "deploy": {"batches": list(BATCHES), "exports": ["onnx"], **common},
    }[stage]
