"""The estimators by name, each with what it estimates, its formula, its bias and its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..objective import Batch, Loss
from . import gauss_newton as first
from . import products as second
from .examples import Reading, Sums
from .outputs import Outputs
from .recording import View

HESSIAN = "Hessian"
GAUSS_NEWTON = "Gauss-Newton"


@dataclass(frozen=True, eq=False)
class Task:
    """One sample to be made: a batch and how.

    ``outputs`` is the output curvature of the batch, None for estimators that need none; ``threshold`` and ``omit`` are those
    of :class:`~.gauss_newton.Draw`; ``micro`` is the number of examples run at a time.
    """

    view: View
    reading: Reading
    loss: Loss
    batch: Batch
    outputs: Outputs | None
    generator: torch.Generator
    probes: int
    micro: int
    threshold: float
    omit: float


@dataclass(frozen=True, eq=False)
class Estimator:
    """How one sample is made, and what is known about it.  ``vectors`` says whether it needs the output curvature."""

    name: str
    quantity: str
    formula: str
    bias: str
    source: str
    vectors: bool
    sample: Callable[[Task], Sums]


def _vectored(choose: Callable[[Outputs, first.Draw], first.Vectored]) -> Callable[[Task], Sums]:
    def sample(task: Task) -> Sums:
        assert task.outputs is not None
        vectored = choose(task.outputs, first.Draw(task.generator, task.threshold, task.omit))
        return first.summed(task.view, task.reading, task.batch, vectored, task.micro)

    return sample


def _probed(kind: second.Kind) -> Callable[[Task], Sums]:
    return lambda t: second.probed(t.view, t.loss, t.batch, kind, t.probes, t.generator, t.micro)


def _controlled(task: Task) -> Sums:
    total = _vectored(first.exact)(task)
    total.add(_probed(second.gap)(task))
    return total


NO_BIAS = "none"
_ALL = (
    Estimator(
        "hessian",
        HESSIAN,
        "mean over random signs v of v * (H v)",
        NO_BIAS,
        "Hutchinson 1989; as in HAP, Yu et al., WACV 2022",
        False,
        _probed(second.hessian),
    ),
    Estimator(
        "gauss_newton",
        GAUSS_NEWTON,
        "mean over random signs v of v * (G v)",
        NO_BIAS,
        "Hutchinson 1989; Schraudolph 2002",
        False,
        _probed(second.gauss_newton),
    ),
    Estimator(
        "exact",
        GAUSS_NEWTON,
        "sum over examples n and terms k of (J_n' u_nk)^2",
        "none and no error on the given examples; with omit > 0 too small by about that share",
        "Schraudolph 2002",
        True,
        _vectored(first.exact),
    ),
    Estimator(
        "pairs",
        GAUSS_NEWTON,
        "sum over drawn (n, k) of (J_n' u_nk)^2 / pi_nk, pi proportional to |u_nk|^2",
        NO_BIAS,
        "Horvitz & Thompson 1952; Madow 1949",
        True,
        _vectored(first.pairs),
    ),
    Estimator(
        "sketch",
        GAUSS_NEWTON,
        "sum over n of (J_n' S_n e_n)^2, S S' the output curvature, e random signs",
        NO_BIAS,
        "Hutchinson 1989 in the space of outputs",
        True,
        _vectored(first.sketch),
    ),
    Estimator(
        "monte_carlo_fisher",
        GAUSS_NEWTON,
        "sum over n of (J_n' (p_n - onehot(y_n)))^2, y_n drawn from p_n",
        NO_BIAS,
        "Martens, JMLR 2020",
        True,
        _vectored(first.monte_carlo_fisher),
    ),
    Estimator(
        "empirical_fisher",
        "empirical Fisher",
        "sum over n of (gradient of the loss of example n)^2",
        "biased: it is not the Gauss-Newton matrix unless the model is right about every label (Kunstner et al., NeurIPS 2019)",
        "as in optimisers; Kunstner et al., NeurIPS 2019",
        False,
        lambda t: first.empirical(t.view, t.reading, t.loss, t.batch, t.micro),
    ),
    Estimator(
        "controlled",
        HESSIAN,
        "exact diag G + mean over random signs v of v * ((H - G) v)",
        NO_BIAS,
        "control variate: the noise is that of H - G only",
        True,
        _controlled,
    ),
    Estimator(
        "gap",
        "Hessian minus Gauss-Newton",
        "mean over random signs v of v * ((H - G) v)",
        NO_BIAS,
        "what the Gauss-Newton matrix leaves out",
        False,
        _probed(second.gap),
    ),
)
ESTIMATORS: Mapping[str, Estimator] = {e.name: e for e in _ALL}
"""Estimators by name."""
FIRST_ORDER = ("exact", "pairs", "sketch", "monte_carlo_fisher", "empirical_fisher")
"""Those that need no second derivative of the network."""
CONCENTRATED = 0.25
"""Where the examples that carry the output curvature are effectively fewer than this share, drawing pairs pays."""


def suited(outputs: Outputs) -> str:
    """``pairs`` where few examples carry the output curvature, as in well-trained classifiers, otherwise ``sketch``.

    The effective number of examples is ``(sum m)^2 / sum m^2`` over their masses ``m`` (Kish, "Survey Sampling", 1965).
    """
    mass = outputs.mass.sum(1)
    effective = float(mass.sum().square() / mass.square().sum().clamp_min(1e-300))
    return "pairs" if effective < CONCENTRATED * len(mass) else "sketch"
