"""``estimate``: curvature with error bars, as little of it as the decision needs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..objective import Batch, Batches, Loss
from .averaging import average, reliability, stability
from .estimators import GAUSS_NEWTON
from .measures import Measure
from .setup import How, Setup, evaluating, first_of, named, prepare, view_of
from .sharding import agreed, sharded
from .trees import examples
from .workers import Sample, Workers, workers

MICRO = 32
"""Examples run at a time in full precision: enough for arithmetic to outweigh its administration, few enough for caches."""
RATE = 0.04
"""Pairs drawn for each example, though :data:`~.setup.FEWEST` a batch at least.  More of them help less than more examples do."""
CUSHION = (32 << 20) - 4096
"""Bytes of the largest block after whose release the C library keeps what is freed for what comes next (mallopt(3), M_MMAP_THRESHOLD);
until it has seen one it hands activations back to the system and takes new pages for each, a fifth of the time."""


@dataclass(frozen=True)
class Stop:
    """When enough is known.  The first condition that holds ends the work, and its name is recorded.

    Attributes:
        samples: at most so many batches.
        examples: no further batch once there are so many examples.
        seconds: no further batch once so much time has passed on the clock, but two at least.
        reliability: of the ranking of all values by one another, 0 to 1 (see :func:`~.averaging.reliability`).
        stability: of the set of the lowest ``share`` of all values, 0 to 1 (see :func:`~.averaging.stability`).
        every: samples between two looks at reliability and stability, and the least number of samples for a look.
    """

    samples: int | None = None
    examples: int | None = None
    seconds: float | None = None
    reliability: float | None = None
    stability: float | None = None
    share: float = 0.5
    every: int = 4


@dataclass(frozen=True)
class Progress:
    """How far the work is: ``expected`` are the most seconds it can still take under the caps (None if there are none), ``peak``
    the bytes by which memory has grown at its highest, ``reliability`` that of the ranking so far (None before the first look)."""

    samples: int
    wanted: int | None
    examples: int
    seconds: float
    expected: float | None
    peak: int
    reliability: float | None


@dataclass(frozen=True, eq=False)
class Curvature:
    """Means and standard errors by measure: float64 ``[size]``, in units of the loss per square of the weight.

    Attributes:
        stderr: over batches as independent samples of the data (NaN with one sample).  For the error of the estimator alone, on given
            examples, let each batch be those same examples.
        quantity: what was estimated: Hessian, Gauss-Newton or empirical Fisher.
        curved: why the blocks of the Gauss-Newton matrix may differ from those of the Hessian; empty if they are equal.
        bias: of the estimator.
        stopped: which condition ended the work.
        notes: what was done differently from what one might expect.
    """

    mean: Mapping[str, np.ndarray]
    stderr: Mapping[str, np.ndarray]
    estimator: str
    quantity: str
    bias: str
    curved: tuple[str, ...]
    samples: int
    examples: int
    seconds: float
    reliability: float | None
    stopped: str
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        """What was estimated, from how much, and how far to trust it."""
        ranking = "" if self.reliability is None else f", ranking reliable to {self.reliability:.3f}"
        data = f"{self.examples} examples in {self.samples} batches"
        return f"{self.quantity} by {self.estimator}: {data}{ranking}; stopped: {self.stopped}{self._equality()}"

    def _equality(self) -> str:
        if self.quantity != GAUSS_NEWTON:
            return ""
        return f"; differs from the Hessian's blocks by {', '.join(self.curved)}" if self.curved else "; equal to the Hessian's blocks"


def estimate(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    measures: Mapping[str, Measure],
    *,
    estimator: str = "auto",
    precision: str = "full",
    temperature: float = 1.0,
    probes: int = 1,
    rate: float = RATE,
    omit: float = 0.0,
    micro: int | None = None,
    seed: int = 0,
    stop: Stop | None = None,
    displacement: Mapping[str, Tensor] | None = None,
    decide: Callable[[Sample], Sample] | None = None,
    done: MutableMapping[int, Sample] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Curvature:
    """Curvature of ``loss(model(inputs), targets)`` with respect to all ``measures`` in one pass over ``batches``.

    The model is used in evaluation mode and left as it was.  Under ``torch.distributed`` the samples are shared out among
    the processes, and every process returns the same result as one alone.

    Args:
        batches: ``(inputs, targets)``; inputs are a tensor, a tuple of tensors or a mapping of keyword inputs.  Each batch is
            one independent sample, so there should be several.
        measures: what to ask: :class:`Trace`, :class:`Direction`, :class:`Activation`, by a name of your choice.
        estimator: one of :data:`ESTIMATORS`, or ``auto``: the cheapest unbiased one for this model and loss.
        precision: one of :data:`PRECISIONS`.  Which pairs are drawn is decided in bfloat16 wherever the device has it (:mod:`.screening`).
        temperature: of the probabilities in the output curvature of a cross-entropy: 1 for the curvature of the loss itself;
            above 1 examples that the model is sure about count more.
        probes: random vectors a batch (``hessian``, ``gauss_newton``, ``controlled``, ``gap``).
        rate: pairs drawn for each example (``pairs``).
        omit: share of the output curvature that may be left out (``exact``).
        micro: examples run at a time, which bounds memory: by default 32, in half precision 64, which takes about as much.
        stop: when to stop; by default when the batches end.
        displacement: how each parameter of a :class:`Direction` would move; by default its own values.
        decide: a linear map from one sample of the measures to the values that are to be known and ranked.
        done: samples by number: those in it are not made again, new ones are put in, so that work can go on where it stopped.
        progress: called after each sample; the first call says what to expect.

    Raises:
        ValueError: if the estimator, the precision or a measure is unknown, does not fit the loss or the model, or a result is
            not finite; each says what to do instead.
    """
    how = How(named(estimator), temperature, probes, rate, omit, micro or (MICRO if precision == "full" else 2 * MICRO), seed)
    view = view_of(model, measures, displacement or {}, precision)
    team = workers()
    torch.empty(CUSHION, dtype=torch.uint8)  # for the effect of its release
    guard = nullcontext() if sharded(model) else team.together()  # passes of a sharded model are exchanges themselves
    with evaluating(model), torch.enable_grad(), guard:
        first, batches = first_of(batches)
        setup = prepare(view, loss, first, how)
        keep = _Keeping(setup, decide or (lambda sample: sample), {} if done is None else done, team)
        return _estimated(keep, batches, stop or Stop(), progress or (lambda _: None))


@dataclass(frozen=True, eq=False)
class _Keeping:
    setup: Setup
    decide: Callable[[Sample], Sample]
    done: MutableMapping[int, Sample]
    team: Workers
    pending: list[tuple[int, Batch]] = field(default_factory=list)

    def take(self, number: int, batch: Batch) -> bool:
        """Makes sample ``number`` unless it is there or another process's; with a sharded model once every process has one to make.

        Says whether one of one's own was waiting and is there now.
        """
        self.pending.append((number, batch))
        return (len(self.pending) == self.team.count or not sharded(self.setup.view.model)) and self.flush()

    def flush(self) -> bool:
        """Makes what is waiting, and says whether something of one's own was.

        Every process takes part in every pass of a sharded model: one that has no sample to make makes another's and drops it.
        """
        own = [(n, b) for n, b in self.pending if self.team.mine(n)]
        missing = [n for n, _ in own if n not in self.done]
        if self.pending and agreed(self.setup.view.model, len(missing)):
            number, batch = (own or self.pending)[0]
            sample = self.decide(self.setup.sample(number, batch))
            self.done.update(dict.fromkeys(missing, sample))
        self.pending.clear()
        return bool(own)

    def all(self, found: dict[int, Sample], until: int) -> dict[int, Sample]:
        """``found`` and the samples up to ``until``, whoever made them."""
        return found | self.team.shared(self.done, range(len(found), until))


def _estimated(keep: _Keeping, batches: Batches, stop: Stop, progress: Callable[[Progress], None]) -> Curvature:
    started, base, team = time.perf_counter(), peak(), keep.team
    sizes: list[int] = []
    found: dict[int, Sample] = {}
    trusted, reason = None, ""
    for number, batch in enumerate(batches):
        sizes.append(examples(batch[0]))
        if keep.take(number, batch):
            seconds = time.perf_counter() - started
            progress(Progress(len(sizes), stop.samples, sum(sizes), seconds, _expected(stop, sizes, seconds), peak() - base, trusted))
        if len(sizes) % stop.every == 0 or _full(stop, sizes):
            keep.flush()
            found = keep.all(found, len(sizes))
            trusted = _trusted(found, sizes)
            reason = _verdict(stop, found, sizes, trusted)
        if not reason and stop.seconds is not None and len(sizes) > 1 and len(sizes) % team.count == 0:
            late = team.slowest(time.perf_counter() - started) >= stop.seconds
            reason = f"{stop.seconds:g} seconds were allowed" if late else ""
        if reason:
            break
    if len(sizes) < team.count:
        raise ValueError(f"{len(sizes)} batches cannot be shared among {team.count} processes; use fewer processes or smaller batches")
    keep.flush()
    found = keep.all(found, len(sizes))
    return _concluded(keep.setup, found, sizes, time.perf_counter() - started, reason or "all batches are used")


def _table(found: Mapping[int, Sample]) -> np.ndarray:
    return np.stack([np.concatenate([found[n][m] for m in sorted(found[n])]) for n in sorted(found)])


def _trusted(found: Mapping[int, Sample], sizes: Sequence[int]) -> float | None:
    return reliability(_table(found), np.array(sizes)) if len(found) > 1 else None


def _verdict(stop: Stop, found: Mapping[int, Sample], sizes: Sequence[int], trusted: float | None) -> str:
    if stop.reliability is not None and trusted is not None and trusted >= stop.reliability:
        return f"reliability {trusted:.3f} reached {stop.reliability}"
    if stop.stability is not None and len(found) > 1:
        steady = stability(_table(found), np.array(sizes), stop.share)
        if steady >= stop.stability:
            return f"stability {steady:.3f} of the lowest {stop.share:.0%} reached {stop.stability}"
    if _full(stop, sizes):
        return f"{stop.samples} batches were allowed" if len(sizes) == stop.samples else f"{stop.examples} examples were allowed"
    return ""


def _full(stop: Stop, sizes: Sequence[int]) -> bool:
    return len(sizes) == stop.samples or (stop.examples is not None and sum(sizes) >= stop.examples)


def _expected(stop: Stop, sizes: Sequence[int], seconds: float) -> float | None:
    """The most that is left under the caps, at the rate so far."""
    caps = [stop.samples / len(sizes)] if stop.samples else []
    caps += [stop.examples / sum(sizes)] if stop.examples else []
    left = [seconds * (c - 1) for c in caps] + ([stop.seconds - seconds] if stop.seconds is not None else [])
    return max(0.0, min(left)) if left else None


def _concluded(setup: Setup, found: Mapping[int, Sample], sizes: Sequence[int], seconds: float, reason: str) -> Curvature:
    means = {m: average(np.stack([found[n][m] for n in sorted(found)]), np.array(sizes)) for m in found[0]}
    for name, e in means.items():
        if not np.isfinite(e.mean).all():
            raise ValueError(f"the curvature of {name!r} is not finite; look for overflow in the weights or the data")
    return Curvature(
        {n: e.mean for n, e in means.items()},
        {n: e.stderr for n, e in means.items()},
        setup.estimator.name,
        setup.estimator.quantity,
        setup.estimator.bias,
        setup.reading.curved,
        len(sizes),
        sum(sizes),
        seconds,
        _trusted(found, sizes),
        reason,
        setup.notes,
    )


def peak() -> int:
    """The highest memory use so far, in bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
