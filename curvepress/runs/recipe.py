"""A recipe: how a user brings a task.  An ordinary Python file with five functions.

* ``model(trained=True)``: the network in evaluation mode; ``trained=False``: the same network with any weights
* ``example()``: a small batch that the model accepts: a tensor, a dict of keyword inputs, or a tuple of tensors that may end in
  such a dict
* ``loss(output, targets)``: the mean over the batch, a scalar tensor
* ``batches(split, seed=0)``: pairs ``(inputs, targets)`` of "train", "calibration", "validation" or "test"
* ``evaluate(model, split)``: ``{"accuracy": 91.7, ...}``; the first metric is the one that counts, larger is better

They may take further options with defaults (``depth=20``), which are set by name.  A dict ``RECOVERY`` holds the recipe's
own settings of the fine-tune.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..objective import Batch, Batches, Loss, arguments, batch_loss, batch_size
from .recipe_files import Blame, bound_functions, read_module

CHECKED = ("calibration", "train")
"""Splits of which the first batch is tried before any work is done."""


@dataclass(frozen=True)
class Recipe:
    """A task, its options bound.

    ``name`` is the full path of the file, or the name of a shipped recipe; ``digest`` changes with its code;
    ``recovery`` are its settings of the fine-tune.  What goes wrong in the functions is raised as a ``ValueError`` that
    says where.
    """

    name: str
    options: Mapping[str, str]
    digest: str
    recovery: Mapping[str, Any]
    functions: Mapping[str, Callable[..., Any]]
    blame: Blame

    def inputs(self) -> tuple[Any, ...]:
        """The example as a tuple of positional inputs, with a mapping of keyword inputs at its end if there are any.

        Raises:
            ValueError: if it is not made of tensors with a first dimension of examples.
        """
        given = self.functions["example"]()
        positional, named = arguments(given)
        tensors = [*positional, *named.values()]
        if not tensors or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in tensors) or not _words(named):
            seen = _look(given) if isinstance(given, Mapping) else ", ".join(map(_look, tensors)) or "an empty tuple"
            wanted = "a tensor, a dict of tensors by the names of forward's arguments, or a tuple of tensors that may end in such a dict"
            raise ValueError(f"{self.name}: example() must return {wanted}, each tensor with examples first; got {seen}")
        return (*positional, named) if named else positional

    def build(self, *, trained: bool) -> nn.Module:
        """The recipe's model in evaluation mode, its weights finite.

        Raises:
            ValueError: if it is not a module or its weights are not finite.
        """
        function = self.functions["model"]
        model = function(trained=trained) if "trained" in inspect.signature(function).parameters else function()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.name}: model() must return a torch.nn.Module; got {type(model).__name__}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{self.name}: {name} of the model holds NaN or infinity; train it again or load other weights")
        return model.eval()

    @property
    def loss(self) -> Loss:
        """The mean loss of a batch."""
        return self.functions["loss"]

    def batches(self, split: str, *, seed: int = 0) -> Batches:
        """The batches of a split, each checked to be a pair that is not empty; they have a length if the recipe's have one."""
        given = self.functions["batches"](split, seed=seed)
        try:
            return _Counted(self, split, given, len(given))
        except TypeError:  # a stream
            return _Stream(self, split, given)

    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """What ``evaluate`` says of a split, checked; the model is in evaluation mode before and after.

        Raises:
            ValueError: if it is not a dict of finite numbers with at least one entry.
        """
        found = self.functions["evaluate"](model.eval(), split)
        model.eval()
        if not isinstance(found, dict) or not found:
            raise ValueError(
                f'{self.name}: evaluate() must return a dict such as {{"accuracy": 91.7}}; got {reprlib.repr(found)} for {split!r}'
            )
        return {str(k): self._metric(split, k, v) for k, v in found.items()}

    def _metric(self, split: str, key: str, value: Any) -> float:
        single = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
        if not single or not math.isfinite(value):
            raise ValueError(f"{self.name}: evaluate() returned {key} = {value!r} for {split!r}; it must be a finite number")
        return float(value)


def load_recipe(name: str, options: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a Python file, or one shipped with curvepress by its name, with ``options`` bound to its functions.

    Raises:
        ValueError: if it cannot be found or run, lacks one of the five functions, or no function takes an option.
    """
    found = read_module(name)
    options = dict(options or {})
    functions = bound_functions(found, options)
    recovery = getattr(found.module, "RECOVERY", {})
    if not isinstance(recovery, dict):
        raise ValueError(f"{found.name}: RECOVERY must be a dict of settings such as epochs and lr; got {type(recovery).__name__}")
    return Recipe(found.name, options, found.digest, recovery, functions, found.blame)


def check(recipe: Recipe, model: nn.Module) -> None:
    """Try the model, the loss and the data on each other, before any work is done.

    Raises:
        ValueError: if the batches are not pairs, hold NaN, or the loss of the model on them is not a finite scalar that
            gradients can follow to the weights.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{recipe.name}: no parameter of the model requires gradients; call requires_grad_() on what may be trained")
    for split in CHECKED:
        batch = next(iter(recipe.batches(split)), None)
        if batch is None:
            raise ValueError(f"{recipe.name}: batches({split!r}) is empty; it must yield (inputs, targets)")
        _check_batch(recipe, model, split, batch)


def _check_batch(recipe: Recipe, model: nn.Module, split: str, batch: Batch) -> None:
    where = f"{recipe.name}: the first {split} batch"
    for x in tree_leaves(batch):
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(f"{where} holds NaN or infinity; clean the data")
    try:
        value = batch_loss(model, recipe.loss, batch)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"{where}, inputs {_look(batch[0])}: the model does not run on it: {recipe.blame.said(error)}") from error
    if not value.requires_grad:
        raise ValueError(
            f"{where}: gradients do not reach the weights; look for no_grad, detach, argmax or numpy in the model and the loss"
        )


class _Stream:
    """Batches of a split, checked as they come."""

    def __init__(self, recipe: Recipe, split: str, given: Any) -> None:
        self.recipe, self.split, self.given = recipe, split, given

    def __iter__(self) -> Iterator[Batch]:
        with self.recipe.blame.on(f"batches({self.split!r})"):
            iterator = iter(self.given)
        while True:
            with self.recipe.blame.on(f"batches({self.split!r})"):
                batch = next(iterator, self)
            if batch is self:
                return
            yield self._checked(batch)

    def _checked(self, batch: Any) -> Batch:
        where = f"{self.recipe.name}: batches({self.split!r})"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"{where} must yield pairs (inputs, targets); got {_look(batch)}")
        try:
            size = batch_size((batch[0], batch[1]))
        except (TypeError, IndexError):
            size = -1
        if size < 1:
            wanted = "a tensor, a tuple or a dict of tensors whose first dimension counts one or more examples"
            raise ValueError(f"{where} must yield inputs that are {wanted}; got {_look(batch[0])}")
        return batch[0], batch[1]


class _Counted(_Stream):
    def __init__(self, recipe: Recipe, split: str, given: Any, count: int) -> None:
        super().__init__(recipe, split, given)
        self.count = count

    def __len__(self) -> int:
        return self.count


def _words(named: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and k.isidentifier() for k in named)


def _look(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(f'{k} {_look(v)}' for k, v in list(value.items())[:4])}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(map(_look, value[:4]))}{', ...' if len(value) > 4 else ''}"
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
