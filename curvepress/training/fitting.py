"""Changing the values of the weights by gradients: recovery and distillation in one loop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sized
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..objective import Batch, Batches, Loss, batch_loss, batch_size, output
from . import checkpointing

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("full", "bfloat16")
SCHEDULES = ("cosine", "step", "constant")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Epoch:
    """One pass over the training batches, ``epoch`` counted from 1.

    ``lr`` is the learning rate of its first step, ``loss`` the mean over its examples of what was minimised,
    ``seconds`` its wall time with evaluation (not compared), ``metrics`` what ``evaluate`` returned after it.
    """

    epoch: int
    lr: float
    loss: float
    seconds: float = field(compare=False)
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Fitted:
    """A trained model in eval mode, and the record of every epoch."""

    model: nn.Module
    history: tuple[Epoch, ...]


@dataclass(frozen=True)
class _Settings:
    epochs: int
    lr: float
    optimizer: str
    schedule: str
    milestones: tuple[int, ...]
    momentum: float
    weight_decay: float
    temperature: float
    distill_weight: float
    clip_norm: float
    precision: str
    seed: int

    def __post_init__(self) -> None:
        rising, stepped = list(self.milestones) == sorted(set(self.milestones)), self.schedule == "step"
        checks = {
            "epochs": (isinstance(self.epochs, int) and self.epochs >= 0, "a whole number, 0 or more"),
            "lr": (0 < self.lr < math.inf, "a positive number"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            "schedule": (self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
            "milestones": (rising and stepped == bool(self.milestones), "rising epochs, given for the step schedule and no other"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "temperature": (0 < self.temperature < math.inf, "a positive number"),
            "distill_weight": (0 <= self.distill_weight <= 1, "in [0, 1]"),
            "clip_norm": (self.clip_norm > 0, "a positive number, or infinity"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            "seed": (isinstance(self.seed, int) and self.seed >= 0, "a whole number, 0 or more"),
        }
        for name, (fine, allowed) in checks.items():
            if not fine:
                raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Batches],
    *,
    epochs: int,
    lr: float,
    optimizer: str = "sgd",
    schedule: str = "cosine",
    milestones: tuple[int, ...] = (),
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    distill_weight: float = 0.9,
    clip_norm: float = math.inf,
    precision: str = "full",
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    seed: int = 0,
    checkpoints: Path | str | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """A trained copy of ``model``, in eval mode, from its best epoch; ``model`` itself is untouched.

    The best epoch is the one with the largest first metric of ``evaluate`` (of equal ones the earliest);
    without ``evaluate`` it is the last.  The same call gives the same weights, bit for bit, also when it was
    interrupted and continues from ``checkpoints``.  Parameters that do not require gradients stay as they are.

    Args:
        batches: from a seed to the batches of one epoch, on the model's device; called anew every epoch, with
            a seed drawn from ``(seed, epoch)``.  Where they have no length, the cosine schedule counts them first.
        optimizer: ``sgd`` with Nesterov ``momentum``, or ``adamw``, whose first beta ``momentum`` is.
        schedule: ``cosine`` falls to zero over all steps, ``step`` divides ``lr`` by ten after each of the
            ``milestones`` (numbers of finished epochs), ``constant`` does not change it.
        teacher: a model whose softened predictions are learnt too (Hinton, Vinyals and Dean, 2015):
            ``(1 - distill_weight) * loss + distill_weight * temperature² * KL(teacher || model)``.  Both models
            must then return logits ``[examples, classes]``.
        clip_norm: gradients whose norm over all parameters is larger are shortened to it; training on low bits needs that.
        precision: ``full``, or ``bfloat16`` for automatic mixed precision: weights and their updates stay in full precision.
        evaluate: metrics on a validation split; the first one counts, larger is better.
        checkpoints: a folder where the state after each epoch is kept, for the same call to continue from.
            The settings, the given model and the teacher must be the same; the data and the loss are taken to be.
        progress: called with the record of each epoch once its checkpoint is written.

    Raises:
        ValueError: if an argument is out of range, the loss is not finite, or the checkpoint is damaged or of another call.
    """
    descent = epochs, lr, optimizer, schedule, tuple(milestones), momentum, weight_decay
    settings = _Settings(*descent, temperature, distill_weight, clip_norm, precision, seed)
    if not callable(batches):
        raise ValueError(f"batches must be a function of a seed that returns the batches of one epoch; got a {type(batches).__name__}")
    student, guide = deepcopy(model), None if teacher is None else deepcopy(teacher).eval()
    objective = loss if guide is None else _distilled(loss, settings)
    run = _Run(settings, student, guide, objective, batches, evaluate, _optimizer(student, settings))
    folder = None if checkpoints is None else Path(checkpoints)
    identity = _identity(run, model, teacher)
    history, best = _restore(folder, identity, run) if folder else ((), {})
    with torch.random.fork_rng(devices=sorted({t.device.index for t in _tensors(model).values() if t.is_cuda})):
        for done in range(len(history), epochs):
            history = (*history, _epoch(run, done))
            if evaluate and _best(history) == done:
                best = _snapshot(run.model)
            if folder:
                state = {"model": _snapshot(run.model), "best": best, "optimizer": _moments(run.descent)}
                checkpointing.save(folder, identity, [asdict(e) for e in history], state)
            if progress:
                progress(history[-1])
    _assign(run.model, best)
    return Fitted(run.model.eval(), history)


@dataclass(frozen=True)
class _Run:
    settings: _Settings
    model: nn.Module
    teacher: nn.Module | None
    objective: Loss
    batches: Callable[[int], Batches]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    descent: torch.optim.Optimizer

    @cached_property
    def steps(self) -> int:
        """The number of batches in the first epoch, gone through once."""
        with torch.random.fork_rng(devices=[]):
            return sum(1 for _ in self.batches(_epoch_seed(self.settings.seed, 0)))


def _optimizer(model: nn.Module, settings: _Settings) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, settings.lr, betas=(settings.momentum, 0.999), weight_decay=settings.weight_decay)
    return torch.optim.SGD(weights, settings.lr, settings.momentum, weight_decay=settings.weight_decay, nesterov=settings.momentum > 0)


def _epoch_seed(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:4], "big")


def _epoch(run: _Run, done: int) -> Epoch:
    """Train the run's model for the epoch after ``done`` epochs."""
    start, seed = time.perf_counter(), _epoch_seed(run.settings.seed, done)
    torch.manual_seed(seed)  # dropout repeats, so that no state of a generator needs to be stored
    data = run.batches(seed)
    steps = len(data) if isinstance(data, Sized) else run.steps if run.settings.schedule == "cosine" else 1
    run.model.train()
    total, examples = 0.0, 0
    for step, batch in enumerate(data):
        rate = _rate(run.settings, done, min(step / steps, 1.0))
        try:
            value = _descend(run, batch, rate)
        except ValueError as error:
            advice = "the steps before went well: try a smaller lr" if step or done else "it is the first: look at the model and the data"
            raise ValueError(f"training stopped in epoch {done + 1}, step {step + 1}, at lr {rate:.3g}: {error}; {advice}") from error
        total, examples = total + value * batch_size(batch), examples + batch_size(batch)
    if not examples:
        raise ValueError(f"epoch {done + 1} had no batches: batches(seed) must return a new, non-empty iterable at every call")
    if not all(p.isfinite().all() for p in run.model.parameters()):
        raise ValueError(f"the last step of epoch {done + 1} made weights that are not finite: try a smaller lr than {run.settings.lr:.3g}")
    metrics = _metrics(run.evaluate, run.model.eval()) if run.evaluate else {}
    return Epoch(done + 1, _rate(run.settings, done, 0.0), total / examples, time.perf_counter() - start, metrics)


def _rate(settings: _Settings, done: int, fraction: float) -> float:
    """The learning rate after ``done`` epochs and a ``fraction`` of the next."""
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * (done + fraction) / settings.epochs)) / 2
    return settings.lr * 0.1 ** sum(m <= done for m in settings.milestones)


def _descend(run: _Run, batch: Batch, rate: float) -> float:
    """The loss of ``batch``, one step down from which the model is moved."""
    for group in run.descent.param_groups:
        group["lr"] = rate
    run.descent.zero_grad()
    if run.teacher is not None:
        with torch.no_grad():
            batch = batch[0], (batch[1], output(run.teacher, batch))
    device = next(run.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=run.settings.precision == "bfloat16"):
        value = batch_loss(run.model, run.objective, batch)
    value.backward()
    if run.settings.clip_norm < math.inf:
        nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.clip_norm)
    run.descent.step()
    return value.item()


def _distilled(loss: Loss, settings: _Settings) -> Loss:
    weight, temperature = settings.distill_weight, settings.temperature

    def objective(predicted: Any, targets: tuple[Any, Any]) -> Tensor:
        hard, soft = targets
        if not isinstance(predicted, Tensor) or predicted.ndim != 2 or predicted.shape != soft.shape:
            raise ValueError("distillation needs logits [examples, classes] from the model, and as many from the teacher")
        student, teacher = F.log_softmax(predicted / temperature, 1), F.log_softmax(soft / temperature, 1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - weight) * loss(predicted, hard) + weight * temperature**2 * divergence

    return objective


def _metrics(evaluate: Callable[[nn.Module], Mapping[str, float]], model: nn.Module) -> dict[str, float]:
    metrics = {name: float(value) for name, value in evaluate(model).items()}
    if not metrics or not math.isfinite(next(iter(metrics.values()))):
        raise ValueError(f"evaluate must return metrics of which the first is a finite number; got {metrics}")
    return metrics


def _best(history: tuple[Epoch, ...]) -> int:
    return max(range(len(history)), key=lambda e: next(iter(history[e].metrics.values())))  # max takes the first of equals


def _tensors(model: nn.Module) -> Tensors:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _snapshot(model: nn.Module) -> Tensors:
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in _tensors(model).items()}


def _assign(model: nn.Module, values: Tensors) -> None:
    own = _tensors(model)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def _moments(descent: torch.optim.Optimizer) -> Tensors:
    state = descent.state_dict()["state"]
    return {f"{n}.{key}": t.contiguous() for n, moments in state.items() for key, t in moments.items() if isinstance(t, Tensor)}


def _identity(run: _Run, model: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
    """What must be equal for one call to continue another's work."""
    beside = {"evaluate": run.evaluate is not None, "model": _digest(model), "teacher": _digest(teacher)}
    return {**asdict(run.settings), "milestones": list(run.settings.milestones), **beside}


def _digest(model: nn.Module | None) -> str:
    digest = hashlib.sha256()
    for name, t in _tensors(model).items() if model is not None else ():
        digest.update(f"{name} {t.dtype} {tuple(t.shape)} {t.requires_grad}".encode())
        digest.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _restore(folder: Path, identity: dict[str, Any], run: _Run) -> tuple[tuple[Epoch, ...], Tensors]:
    """The history and the best tensors so far; the run's model and optimizer go back to where they were."""
    found = checkpointing.read(folder, identity, ("model", "best", "optimizer"))
    if found is None:
        return (), {}
    records, parts = found
    _assign(run.model, parts["model"])
    moments: dict[int, Tensors] = {}
    for name, t in parts["optimizer"].items():
        number, key = name.split(".", 1)
        moments.setdefault(int(number), {})[key] = t
    run.descent.load_state_dict({**run.descent.state_dict(), "state": moments})
    return tuple(Epoch(**e) for e in records), parts["best"]
