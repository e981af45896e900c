"""What the benchmark of transformers measures: a recipe's model, pruned, repaired where that is asked for, and recovered, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from curvepress.costs import cost
from curvepress.files import write_text
from curvepress.plan import Plan, tensors_after, to_json
from curvepress.repairing.sequential import repair
from curvepress.runs.artifacts import load_scores, save_scores
from curvepress.scores import Scores, score
from curvepress.structure import Structure
from curvepress.surgery.cutting import applied
from curvepress.tracing.watching import trace
from curvepress.training.fitting import fit
from curvepress_recipes import cifar10_vit, sst2

HERE, MODELS = Path(__file__).parent / "results", Path("runs/benchmarks/transformers")
FILE, SPEEDS = HERE / "transformers.jsonl", HERE / "transformers_latency.jsonl"
ENCODER = "encoder.encoder."
SAMPLES = 16
LENGTH = 32
"""Words of the sentences whose latency is measured."""
LIMIT: dict[str, int] = {"models": 0}
NEW: list[dict[str, Any]] = []
"""How many models this process may measure (0: all), and those that it has."""


@dataclass(frozen=True, eq=False)
class Task:
    """A recipe, what is drawn for its recovery and how that is done, and a batch to time."""

    recipe: ModuleType
    drawn: Callable[[int], Any]
    recovery: dict[str, Any]
    timed: Callable[[], Any]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.__name__.rpartition(".")[2]


def _images(seed: int) -> Any:
    """6,400 training images, augmented."""
    return [b for b, _ in zip(cifar10_vit.batches("train", seed), range(50), strict=False)]


def _sentence() -> dict[str, Tensor]:
    ids = torch.arange(1000, 1000 + LENGTH)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


EVERY: dict[str, Any] = {"epochs": 1, "optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 1.0}
TEXT = Task(
    sst2,
    lambda seed: sst2.batches("train", seed, examples=1600),
    {**EVERY, "lr": 5e-5, "distill_weight": 0.9, "precision": "bfloat16"},
    _sentence,
)
VISION = Task(cifar10_vit, _images, {**EVERY, "lr": 5e-4, "distill_weight": 0.5}, lambda: cifar10_vit.example()[:1])


@cache
def original(task: Task) -> tuple[nn.Module, Structure]:
    """The trained model, its structure; its own figures are recorded."""
    model = task.recipe.model()
    structure = trace(model, task.recipe.example())
    found = lambda: {"after": task.recipe.evaluate(model, "test"), **sizes(Plan(structure))}  # noqa: E731
    records.once(FILE, {"task": task.name, "what": "original"}, found)
    return model, structure


def scored(task: Task, method: str, seed: int) -> Scores:
    """The scores of every channel, kept in a folder."""
    model, structure = original(task)
    folder = MODELS / f"{task.name}-{method}-{seed}"
    if not (folder / "scores.json").exists():
        batches = task.recipe.batches("calibration", seed=seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_scores(score(model, task.recipe.loss, batches, structure, method=method, samples=SAMPLES, seed=seed), folder)
    return load_scores(folder)


def repaired(task: Task, small: nn.Module, plan: Plan, seed: int) -> nn.Module:
    """The model that was made by the plan, refitted to what the original computes."""
    return repair(small, original(task)[0], task.recipe.batches("calibration", seed=seed), plan).model


def recovered(task: Task, small: nn.Module, seed: int, **other: Any) -> nn.Module:
    """The model after the short recovery that all get, with the original as the teacher."""
    return fit(small, task.recipe.loss, task.drawn, teacher=original(task)[0], seed=seed, **{**task.recovery, **other}).model


def measured(task: Task, key: dict[str, Any], plan: Callable[[], Plan], *, refit: bool = False) -> None:
    """Prune, test, repair and test if ``refit``, recover, test: once.  The plan is kept in a file.

    Raises:
        SystemExit: once so many models are measured as this process may measure.
    """

    def row() -> dict[str, Any]:
        NEW.append(key)
        try:
            chosen = plan()
        except ValueError as error:
            return {"failure": str(error)}
        write_text(MODELS / task.name / f"{file_of(key)}.json", to_json(chosen))
        made = applied(original(task)[0], chosen, task.recipe.example())
        start = repaired(task, made.model, chosen, key["seed"]) if refit else made.model
        tested = {"before": made.model, "after": recovered(task, start, key["seed"]), **({"repaired": start} if refit else {})}
        return {**{k: task.recipe.evaluate(m, "test") for k, m in tested.items()}, "form": made.form, **sizes(chosen)}

    record = records.once(FILE, {"task": task.name, **key}, row)
    print({**key, **{k: record[k]["accuracy"] for k in ("before", "repaired", "after") if k in record}}, flush=True)
    if 0 < LIMIT["models"] <= len(NEW):
        raise SystemExit(f"{len(NEW)} models measured; the same command goes on")


def file_of(key: dict[str, Any]) -> str:
    """The name of a measured model's files."""
    return "-".join(str(key[k]).replace(" ", "_") for k in ("what", "method", "share", "seed"))


def sizes(plan: Plan) -> dict[str, Any]:
    """Cost of a plan, parameters of the encoder, and the widths that are left by kind."""
    tensors = tensors_after(plan)
    encoder = sum(prod(t.shape) for n, t in tensors.items() if n.startswith(ENCODER) and t.kind == "parameter")
    left = {k: [len(plan.keep.get(g.name, range(g.size))) for g in plan.structure.free if g.kind == k] for k in kinds(plan.structure)}
    return {**vars(cost(plan)), "encoder": encoder, "left": left}


def kinds(structure: Structure) -> list[str]:
    """The kinds of groups that may be cut."""
    return sorted({g.kind for g in structure.free})
