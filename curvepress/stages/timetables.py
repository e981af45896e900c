"""The latency budget of a run: its table, measured once and kept, and the plan that keeps the budget in the runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..latency import Machine, Table
from ..plan import Plan, tensors_after
from ..planner.alignment import Shape
from ..planner.blocks import Choice
from ..planner.channels import Milliseconds, milliseconds
from ..runs.artifacts import load_structure
from ..runs.desk import Desk
from ..scores import LOSS_UNIT, Scores
from ..stopwatch import RUNTIMES, Met, cached_table, calibrated, layers_of, machine, measured_table, met, table_path
from ..structure import Structure
from ..surgery.cutting import apply

MEASURED = (0.5, 0.25)
"""Shares of all widths at which the model is timed beside the whole one, to tell what it takes besides its layers."""
Settings = Mapping[str, Any]


def here(settings: Settings) -> Machine:
    """This machine with the runtime, threads and batch of the settings.

    Raises:
        ValueError: if the runtime is not installed, or a number is not positive.
    """
    return machine(settings["runtime"], settings["threads"], settings["batch"])


def table_of(desk: Desk, settings: Settings) -> Table:
    """The latency table of the run's model on this machine: read where it is kept, else measured and kept.

    Raises:
        ValueError: if it cannot be measured, or what is kept is damaged or stale.
    """
    model, structure, place = desk.original(), load_structure(desk.path("structure.json")), here(settings)
    layers = layers_of(model, *_example(desk))

    def measure() -> Table:
        desk.note(f"measuring {len(layers)} layers in {place.runtime} {place.version}; once on this machine")
        table = measured_table(layers, structure.tensors, place)
        plans = [Plan(structure), *(_narrow(structure, share) for share in MEASURED)]
        with _track(desk, place) as race:
            seconds = race([_made(desk, model, p) for p in plans])
        return calibrated(table, list(zip(map(tensors_after, plans), seconds, strict=True)))

    return cached_table(table_path(layers, structure.tensors, place), place, measure)


def _narrow(structure: Structure, share: float) -> Plan:
    zeros = {g.name: np.zeros(g.size) for g in structure.free}
    choice = Choice(structure, Scores(zeros, zeros, "none", LOSS_UNIT, 0, 0), Shape())
    return choice.plan({g.name: max(1, round(g.size * share)) for g in structure.free})


def _example(desk: Desk) -> tuple[Tensor, ...]:
    inputs = desk.recipe.inputs()
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"{desk.recipe.name}: a latency budget needs an example of tensors; limit params or macs instead")
    return tuple(inputs)


def _made(desk: Desk, model: nn.Module, plan: Plan) -> nn.Module:
    return apply(model, plan, *desk.recipe.inputs()).eval() if not plan.empty else model


@contextmanager
def _track(desk: Desk, place: Machine) -> Iterator[Callable[[Sequence[nn.Module]], list[float]]]:
    """Where models race: seconds of each for a batch, in turns.  Each is made ready once."""
    runtime, example = RUNTIMES[place.runtime], _example(desk)
    batch = tuple(x[np.arange(place.batch) % len(x)].contiguous() for x in example)
    ready: dict[int, tuple[nn.Module, Any]] = {}  # with the model, whose number would be another's once it is gone
    with tempfile.TemporaryDirectory() as folder:

        def race(models: Sequence[nn.Module]) -> list[float]:
            for m in models:
                if id(m) not in ready:
                    ready[id(m)] = m, runtime.prepare(m, example, Path(folder))
            return runtime.race([ready[id(m)][1] for m in models], batch, place.threads)

        yield race


def timed_plan(desk: Desk, settings: Settings, table: Table, search: Callable[[float], Plan]) -> Met:
    """The plan of a search under ``settings["latency"]`` that keeps this budget when it is measured in the runtime.

    Raises:
        ValueError: if no plan does.
    """
    model, place = desk.original(), here(settings)
    with _track(desk, place) as race:

        def measure(plan: Plan) -> tuple[float, float]:
            whole, small = race([model, _made(desk, model, plan)])
            return small, whole

        found = met(settings["latency"], search, measure, table)
    said = ", ".join(f"{k} {_said(settings, getattr(found, k))}" for k in ("asked", "predicted", "measured"))
    desk.note(f"latency: {said} in {_where(place)}; {found.rounds} plan(s) measured")
    return found


def kept_promise(desk: Desk, original: nn.Module, model: nn.Module) -> dict[str, Any] | None:
    """What latency was asked for and what the finished model takes in the same runtime; ``None`` where none was asked for.

    Both are shares of the original's, or milliseconds where the budget was so.
    """
    settings = desk.run.stages["plan"].settings if "plan" in desk.run.stages else {}
    if settings.get("latency") is None:
        return None
    place = here(settings)
    with _track(desk, place) as race:
        whole, small = race([original, model])
    asked = milliseconds(settings["latency"])
    measured = small * 1000 if isinstance(asked, Milliseconds) else small / whole
    desk.note(f"latency: asked {_said(settings, asked)}, measured {_said(settings, measured)} in {_where(place)}")
    return {"asked": float(asked), "unit": _unit(settings), "measured": measured, **asdict(place)}


def _unit(settings: Settings) -> str:
    return "ms" if isinstance(settings["latency"], str) else "of the original"


def _said(settings: Settings, value: float) -> str:
    return f"{value:.3g} {_unit(settings)}"


def _where(place: Machine) -> str:
    return f"{place.runtime}, {place.threads} thread(s), batch {place.batch}"
