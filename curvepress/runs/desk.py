"""What every stage works with: the run, its recipe, and the models that its files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..objective import Batch, Batches
from ..plan import Plan, from_json
from ..structure import Structure
from .artifacts import load, load_structure, restore
from .folder import PLAN, Run, command
from .recipe import Recipe

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@dataclass(frozen=True)
class Desk:
    """A run, its recipe, and whom to tell how far the work is."""

    run: Run
    recipe: Recipe
    progress: Progress = lambda *_: None
    note: Callable[[str], None] = lambda _: None

    def path(self, name: str) -> Path:
        """A file of the run."""
        return self.run.folder / name

    def original(self) -> nn.Module:
        """The model as it was before compression.

        Raises:
            ValueError: if the recipe makes another model now.
        """
        return load(self.recipe.build(trained=False), self.path("original.safetensors")).eval()

    def plan(self) -> Plan:
        """The plan in the folder, which is for the model in the folder.

        Raises:
            ValueError: if it is damaged or for another model.
        """
        try:
            plan = from_json(self.path(PLAN).read_text(encoding="utf-8"))
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:  # of numpy too, for what is no structure
            raise ValueError(f"{self.path(PLAN)}: {error}; mend it, or make one with {command(self.run, 'plan')}") from None
        own = load_structure(self.path("structure.json"))
        if (plan.structure.tensors, plan.structure.groups) != (own.tensors, own.groups):
            seen, again = _difference(plan, own), command(self.run, "plan")
            raise ValueError(f"{self.path(PLAN)} is for another model: {seen}; make one for this model with {again}")
        return plan

    def compressed(self, name: str) -> nn.Module:
        """The plan's model with the tensors of a file of the run."""
        return restore(self.recipe.build(trained=False), self.plan(), self.path(name), *self.recipe.inputs())

    def training_batches(self, seed: int) -> Batches:
        """Those of one epoch, which tell how far they are if they have a length."""
        batches = self.recipe.batches("train", seed=seed)
        return _Ticking(batches, self.progress) if isinstance(batches, Sized) else batches


class _Ticking:
    """Batches that report how far they are."""

    def __init__(self, batches: Any, progress: Progress) -> None:
        self.batches, self.progress = batches, progress

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for n, batch in enumerate(self.batches):
            yield batch
            self.progress("training batches", n + 1, len(self))


def _difference(plan: Plan, own: Structure) -> str:
    """Where the structure of a plan differs from the own one."""
    theirs, mine = plan.structure.tensors, own.tensors
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            seen, wanted = (str(t[name].shape) if name in t else "missing" for t in (theirs, mine))
            return f"{name} is {seen} in the plan and {wanted} here"
    return "its groups are others"
