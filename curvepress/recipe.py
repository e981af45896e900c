"""A recipe: how a user brings a task.  An ordinary Python file with five functions.

    model(trained=True)            the network in evaluation mode; trained=False: the same network with any weights
    example()                      a small batch that the model accepts: a tensor, or a tuple of tensors
    loss(output, targets)          the mean over the batch, a scalar tensor
    batches(split, seed=0)         (inputs, targets) of "train", "calibration", "validation" or "test"
    evaluate(model, split)         {"accuracy": 91.7, ...}; the first metric is the one that counts, larger is better

They may take further options with defaults (``depth=20``), which are set by name.  A dict ``RECOVERY`` holds the recipe's
own settings of the fine-tune.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .objective import Batch, Batches, Loss, batch_loss

FUNCTIONS = ("model", "example", "loss", "batches", "evaluate")
SHIPPED = "curvepress_recipes"
SPLITS = ("train", "calibration", "validation", "test")


@dataclass(frozen=True)
class Recipe:
    """A task, its options bound.  ``digest`` changes with the file; ``recovery`` are its settings of the fine-tune."""

    name: str
    options: Mapping[str, str]
    digest: str
    recovery: Mapping[str, Any]
    model: Callable[..., nn.Module]
    loss: Loss
    batches: Callable[..., Batches]
    evaluate: Callable[[nn.Module, str], dict[str, float]]
    example: Callable[[], Any]

    def inputs(self) -> tuple[Tensor, ...]:
        """The example as a tuple of tensors.

        Raises:
            ValueError: if it is not a tensor or a tuple of tensors with a first dimension of examples.
        """
        given = self.example()
        inputs = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        if not inputs or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs):
            raise ValueError(f"{self.name}: example() must return a tensor or a tuple of tensors, each with examples first; got {type(given).__name__}")
        return inputs

    def build(self, *, trained: bool) -> nn.Module:
        """The recipe's model in evaluation mode, its weights finite.

        Raises:
            ValueError: if it is not a module or its weights are not finite.
        """
        takes = "trained" in inspect.signature(self.model).parameters
        model = self.model(trained=trained) if takes else self.model()
        if not isinstance(model, nn.Module):
            raise ValueError(f"{self.name}: model() must return a torch.nn.Module; got {type(model).__name__}")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{self.name}: {name} of the model holds NaN or infinity; train it again or load other weights")
        return model.eval()

    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """What ``evaluate`` says of a split, checked.

        Raises:
            ValueError: if it is not a dict of finite numbers with at least one entry.
        """
        found = self.evaluate(model, split)
        if not isinstance(found, dict) or not found:
            raise ValueError(f'{self.name}: evaluate() must return a dict such as {{"accuracy": 91.7}}; got {found!r}')
        for key, value in found.items():
            if not isinstance(value, (int, float)) or value != value:
                raise ValueError(f"{self.name}: evaluate() returned {key}={value!r} for {split!r}; it must be a number")
        return {str(k): float(v) for k, v in found.items()}


def load_recipe(name: str, options: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a Python file, or one shipped with curvepress by its name, with ``options`` bound to its functions.

    Raises:
        ValueError: if it cannot be found or run, lacks one of the five functions, or no function takes an option.
    """
    module, source = _module(name)
    missing = [f for f in FUNCTIONS if not callable(getattr(module, f, None))]
    if missing:
        raise ValueError(f"recipe {name!r} lacks {', '.join(f'{f}()' for f in missing)}; a recipe has {', '.join(f'{f}()' for f in FUNCTIONS)}")
    options = dict(options or {})
    functions = {f: getattr(module, f) for f in FUNCTIONS}
    _check_options(name, functions, options)
    bound = {f: _bound(function, options) for f, function in functions.items()}
    recovery = getattr(module, "RECOVERY", {})
    if not isinstance(recovery, dict):
        raise ValueError(f"recipe {name!r}: RECOVERY must be a dict of settings such as epochs and lr; got {type(recovery).__name__}")
    return Recipe(name, options, hashlib.sha256(source).hexdigest()[:16], recovery, **bound)


def check(recipe: Recipe, model: nn.Module) -> Batch:
    """The first calibration batch, once the model, the loss and the data fit together.

    Raises:
        ValueError: if the batches are not pairs, hold NaN, or the loss of the model on them is not a finite scalar.
    """
    batch = next(iter(recipe.batches("calibration")), None)
    if batch is None:
        raise ValueError(f'{recipe.name}: batches("calibration") is empty; it must yield (inputs, targets)')
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"{recipe.name}: batches() must yield pairs (inputs, targets); got {type(batch).__name__}")
    for x in torch.utils._pytree.tree_leaves(batch):
        if isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all():
            raise ValueError(f"{recipe.name}: a calibration batch holds NaN or infinity; clean the data")
    with torch.no_grad():
        try:
            batch_loss(model, recipe.loss, (batch[0], batch[1]))
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"{recipe.name}: the model does not run on a calibration batch: {error}") from error
    return batch[0], batch[1]


def _module(name: str) -> tuple[ModuleType, bytes]:
    path = Path(name).expanduser()
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"there is no recipe at {path}; give the path of a Python file, or one of {', '.join(shipped())}")
        return _executed(path), path.read_bytes()
    if name not in shipped():
        raise ValueError(f"recipe {name!r} is unknown; give the path of a Python file (ending in .py), or one of {', '.join(shipped())}")
    module = importlib.import_module(f"{SHIPPED}.{name}")
    return module, Path(str(module.__file__)).read_bytes()


def shipped() -> list[str]:
    """The recipes that come with curvepress."""
    return list(importlib.import_module(SHIPPED).__all__)


def _executed(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"recipe {path} does not run: {type(error).__name__}: {error}") from error
    return module


def _check_options(name: str, functions: Mapping[str, Callable[..., Any]], options: Mapping[str, str]) -> None:
    known = {p for f in functions.values() for p, q in inspect.signature(f).parameters.items() if q.default is not q.empty} - {"trained", "seed"}
    for option in options:
        if option not in known:
            allowed = f"its options are {', '.join(sorted(known))}" if known else "it has none"
            raise ValueError(f"recipe {name!r} has no option {option!r}; {allowed}")


def _bound(function: Callable[..., Any], options: Mapping[str, str]) -> Callable[..., Any]:
    taken = {k: _value(v) for k, v in options.items() if k in inspect.signature(function).parameters}
    return partial(function, **taken) if taken else function


def _value(text: str) -> Any:
    """An option as Python writes it (56, 0.1, True), or else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
