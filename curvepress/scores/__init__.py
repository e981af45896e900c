"""Scores: what removing each channel is predicted to cost.  Arrays by group, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

from torch import nn

from ..curvature import Progress, Sample, Stop
from ..objective import Batches, Loss
from ..structure import Structure
from .data import LOSS_UNIT, RELATIVE_UNIT, Scores, Task, part_of, per_channel, predicted_rise
from .joint import joint_rise
from .quadratic import diagonal, hessian_trace, mask_curvature, second_order
from .reconstruction import reconstruction
from .simple import magnitude, measured, random, taylor
from .slopes import gate_gradient, michel, nvit

__all__ = [
    "LOSS_UNIT",
    "METHODS",
    "RANKING",
    "RELATIVE_UNIT",
    "SHARED",
    "WARMED",
    "Scores",
    "Task",
    "joint_rise",
    "part_of",
    "per_channel",
    "predicted_rise",
    "score",
]


def score(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    structure: Structure,
    *,
    method: str = "mask_curvature",
    samples: int = 32,
    reliability: float | None = None,
    seconds: float | None = None,
    estimator: str = "auto",
    precision: str = "full",
    probes: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    done: MutableMapping[int, Sample] | None = None,
) -> Scores:
    """Scores of every channel of ``structure`` by ``method``, one of :data:`METHODS`.

    Args:
        batches: the calibration batches, one independent sample each.
        samples: at most so many batches.
        reliability: stop earlier when the ranking of the channels is as reliable as this, 0 to 1.
        seconds: stop earlier after so much time.
        estimator: of the curvature: see :data:`curvepress.curvature.ESTIMATORS`.
        precision: of its passes: full, bfloat16 or float16.
        probes: random vectors a batch, for estimators by random probes.
        temperature: of the output curvature (not of ``hessian_trace``).
        done: samples by number; those in it are not computed again, and new ones are put in, so that long work can go on
            where it stopped.

    Raises:
        ValueError: if the method is unknown, nothing can be cut, there are too few batches, or the loss fails.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not structure.free:
        reasons = sorted({g.frozen for g in structure.groups if g.frozen})
        raise ValueError(f"nothing in this model can be cut: {'; '.join(reasons) or 'it has no weights with channels'}")
    stop = Stop(samples=samples, seconds=seconds, reliability=reliability)
    tell, kept = progress or (lambda _: None), {} if done is None else done
    task = Task(loss, batches, stop, seed, estimator, precision, probes, temperature, tell, kept)
    training = model.training
    model.eval()
    try:
        return METHODS[method](model, structure, task)
    finally:
        model.train(training)


_ALL = (
    mask_curvature,
    reconstruction,
    second_order,
    diagonal,
    hessian_trace,
    measured,
    taylor,
    nvit,
    gate_gradient,
    michel,
    magnitude,
    random,
)
METHODS: Mapping[str, Callable[[nn.Module, Structure, Task], Scores]] = {f.__name__: f for f in _ALL}
SHARED = (hessian_trace.__name__, mask_curvature.__name__, diagonal.__name__)
"""Methods whose samples several processes can share out."""
RANKING = (nvit.__name__, michel.__name__, magnitude.__name__, random.__name__)
"""Methods whose scores only rank channels, in no unit that anything else has."""
WARMED = (mask_curvature.__name__, reconstruction.__name__, second_order.__name__, diagonal.__name__)
"""Methods whose scores are of a temperature of the output curvature."""
