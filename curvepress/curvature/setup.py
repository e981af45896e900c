"""What all samples of an estimate share: checked, chosen and found out once, on the first batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..objective import Batch, Batches, Loss
from .estimators import ESTIMATORS, FIRST_ORDER, Estimator, Task, suited
from .examples import TRIAL, Reading, Sums, examine
from .gauss_newton import curvature_of, screened
from .graph import curved, operation
from .measures import Activation, Direction, Measure, Part, Trace, by_rows, gathered
from .outputs import Outputs
from .recording import View, only, recorded
from .screening import Screen, screen
from .sharding import check, sharded, unwrapped, whole
from .trees import examples, mapped, rows
from .workers import Sample

PRECISIONS: Mapping[str, torch.dtype | None] = {"full": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of the passes.  ``full`` is the model's own.  Sums are always in double precision."""
FEWEST = 10.0
"""Pairs drawn from a batch, however small it is: with fewer the ranking by a single batch is mostly chance."""


@dataclass(frozen=True)
class How:
    """The settings of :func:`~.engine.estimate` that change a sample."""

    estimator: str
    temperature: float
    probes: int
    rate: float
    omit: float
    micro: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("probes", 1), ("micro", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
        for name in ("temperature", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"the {name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.omit < 1:
            raise ValueError(f"omit is a share from 0 up to but not 1, got {self.omit}")


@dataclass(frozen=True, eq=False)
class Setup:
    """All that the samples share: found on the first batch, the same in every process and every run."""

    view: View
    loss: Loss
    how: How
    estimator: Estimator
    reading: Reading
    threshold: float
    notes: tuple[str, ...]
    first: Outputs | None
    screen: Screen | None

    def sample(self, number: int, batch: Batch) -> Sample:
        """One sample of every measure."""
        view, how = self.view, self.how
        batch = mapped(lambda t: t.to(view.device), batch)
        outputs = self.first if number == 0 else None
        if self.estimator.vectors and outputs is None:
            outputs = screened(view, self.screen, self.loss, batch, how.micro, how.temperature)
        entropy = np.random.SeedSequence([how.seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(entropy[0] >> 1))
        task = Task(view, self.reading, self.loss, batch, outputs, generator, how.probes, how.micro, self.threshold, how.omit)
        return _answers(view, self.estimator.sample(task))


def named(estimator: str) -> str:
    """``estimator`` itself, if there is one of that name."""
    if estimator not in ("auto", *ESTIMATORS):
        raise ValueError(f"estimator {estimator!r} is unknown; choose auto or one of {', '.join(ESTIMATORS)}")
    return estimator


def view_of(model: nn.Module, measures: Mapping[str, Measure], displacement: Mapping[str, Tensor], precision: str) -> View:
    """The model with what is asked about it, checked against its parameters and modules."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if not measures:
        raise ValueError("nothing was asked: give at least one measure, such as {'conv1.weight': output_channels('conv1.weight', weight)}")
    parameters, modules = dict(unwrapped(model).named_parameters()), dict(model.named_modules())
    for name, measure in measures.items():
        if isinstance(measure, Activation) and measure.module not in modules:
            raise ValueError(f"measure {name!r} asks about module {measure.module!r}, which this model does not have")
        if not isinstance(measure, Activation):
            for part in measure.parts:
                _fits(name, part, parameters, measure.size)
    double = [n for n, p in parameters.items() if p.dtype == torch.float64]
    if double and PRECISIONS[precision] is not None:
        raise ValueError(
            f"{double[0]!r} is of type float64, which does not go with {precision} passes; take model.float() or full precision"
        )
    own = {**parameters, **displacement}
    moves = {
        name: {p.tensor: whole(m.moves.get(p.tensor, own[p.tensor]).detach()) for p in m.parts}
        for name, m in measures.items()
        if isinstance(m, Direction)
    }
    return View(model, measures, moves, PRECISIONS[precision], by_rows(measures, {n: p.shape for n, p in parameters.items()}))


def _fits(name: str, part: Part, parameters: Mapping[str, nn.Parameter], size: int) -> None:
    if part.tensor not in parameters:
        raise ValueError(f"measure {name!r} asks about parameter {part.tensor!r}, which this model does not have")
    shape = tuple(parameters[part.tensor].shape)
    try:
        fits = np.broadcast_shapes(part.labels.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"the labels of {name!r} have shape {part.labels.shape}, which does not broadcast to {shape} of {part.tensor!r}")
    if part.labels.min() < -1 or part.labels.max() >= size:
        raise ValueError(f"the labels of {name!r} run from {part.labels.min()} to {part.labels.max()}; -1 to {size - 1} are allowed")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def first_of(batches: Batches) -> tuple[Batch, Batches]:
    """The first batch, and all of them with it in front."""
    source = iter(batches)
    try:
        first = next(source)
    except StopIteration:
        raise ValueError("there are no batches; give at least one pair of inputs and targets") from None
    return first, chain([first], source)


def prepare(view: View, loss: Loss, batch: Batch, how: How) -> Setup:
    """Chooses the estimator, finds the threshold of drawing, and learns how this model's gradients can be read."""
    check(view.model, first_order=how.estimator in ("auto", *FIRST_ORDER), half=view.half)
    batch = mapped(lambda t: t.to(view.device), batch)
    few = rows(batch[0], torch.arange(TRIAL) % examples(batch[0]))
    estimator, threshold, notes, outputs, quick = how.estimator, 0.0, [], None, None
    if estimator == "auto" or ESTIMATORS[estimator].vectors:
        estimator, outputs, quick = _chosen(view, loss, batch, how, few)
        threshold = float(outputs.mass.sum()) / max(how.rate * examples(batch[0]), FEWEST)
        reading = examine(view, few, list(outputs.terms))
        notes.append(f"the loss is {outputs.form}")
        notes += ["pairs are drawn by a first pass in bfloat16, which brings no bias"] if quick and quick.half != view.half else []
    elif estimator == "empirical_fisher":
        reading = examine(view, few, None)
    else:
        with only(view.model, list(view.parameters)):
            trial = recorded(view, few, list(view.parameters))
        fused = sorted({operation(n) for n in trial.order if operation(n).startswith("ScaledDotProduct")})
        notes += [f"attention runs in its plain form, as {fused[0]} has no second derivative"] if fused else []
        reading = Reading({}, tuple(curved(trial.order, trial.uses)))
    if how.temperature != 1 and not ESTIMATORS[estimator].vectors:
        raise ValueError(
            f"estimator {estimator!r} has no temperature, got {how.temperature}; choose pairs, sketch or exact, or leave it at 1"
        )
    reading = replace(reading, curved=(*reading.curved, *_joint(view)))
    notes += [f"{n} is read one example at a time" for n in reading.alone]
    return Setup(view, loss, how, ESTIMATORS[estimator], reading, threshold, tuple(notes), None if sharded(view.model) else outputs, quick)


def _chosen(view: View, loss: Loss, batch: Batch, how: How, few: Any) -> tuple[str, Outputs, Screen | None]:
    """The estimator, the output curvature of the first batch, and how first passes are run where pairs are drawn by them."""
    quick = screen(view, few) if how.estimator in ("auto", "pairs") and not sharded(view.model) else None
    outputs = screened(view, quick, loss, batch, how.micro, how.temperature)
    name = suited(outputs) if how.estimator == "auto" else how.estimator
    if name == "pairs":
        return name, outputs, quick if outputs.follows else None
    return name, outputs if quick is None else curvature_of(view, loss, batch, how.micro, how.temperature), None


def _joint(view: View) -> list[str]:
    """Directions in which the outputs may be curved though they are linear in each tensor."""
    tensors = {n: sorted({p.tensor for p in m.parts}) for n, m in view.directions.items()}
    return [f"{n} moves {len(t)} tensors at once" for n, t in tensors.items() if len(t) > 1]


def _answers(view: View, sums: Sums) -> Sample:
    found = {}
    for name, measure in view.measures.items():
        if isinstance(measure, Trace):
            values = torch.stack([gathered(sums.squares[p.tensor], p.labels, measure.size) for p in measure.parts]).sum(0)
        elif name in sums.totals:
            values = sums.totals[name]
        else:
            raise ValueError(f"what {name!r} asks about has no influence on the outputs that the loss reads; leave it out")
        found[name] = values.cpu().numpy()
    return found
