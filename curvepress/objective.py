"""What is being minimised: how a model is run on a batch, and the loss of one batch, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Any, Any]
"""``(inputs, targets)``; ``inputs`` is a tensor, a mapping of keyword inputs, or a tuple of positional ones that may end in such a mapping.
The first dimension counts examples."""
Loss = Callable[[Any, Any], Tensor]
"""``(model output, targets) -> scalar``: the mean over the examples of the batch."""
Batches = Iterable[Batch]
Example = Tensor | Sequence[Any] | Mapping[str, Tensor]
"""Inputs as a model takes them: a tensor, keyword inputs by name, or several in order, of which the last may be such a mapping."""


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a forward pass: what stands alone or in order, and the entries of a mapping at the end."""
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return (given[:-1], dict(given[-1])) if given and isinstance(given[-1], Mapping) else (given, {})


def in_a_tuple(inputs: Any) -> tuple[Any, ...]:
    """Inputs as one tuple: those in order, and at the end the mapping of keyword inputs where there are any."""
    positional, named = arguments(inputs)
    return (*positional, named) if named else positional


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """What ``model`` computes for these inputs."""
    positional, named = arguments(inputs)
    return model(*positional, **named)


def output(model: Callable[..., Any], batch: Batch) -> Any:
    """What ``model`` computes for the inputs of ``batch``."""
    return call(model, batch[0])


STATES = ("hidden_states", "last_hidden_state", "attentions", "model_output", "past_key_values")
"""Ends of the names of what a model shows of its inside, or keeps for its own next call."""


def outputs(result: Any) -> list[Tensor]:
    """The tensors of what a model gave back, in order.

    Of a mapping with logits only what is not a state of its inside counts; keys and values kept for the next call never do.
    """
    if isinstance(result, Mapping):
        inside = STATES if any(k.startswith("logits") for k in result) else STATES[-1:]
        result = {k: v for k, v in result.items() if not k.endswith(inside)}
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def batch_size(batch: Batch) -> int:
    """The number of examples in ``batch``."""
    positional, named = arguments(batch[0])
    return len([*positional, *named.values()][0])


def batch_loss(model: Callable[..., Any], loss: Loss, batch: Batch) -> Tensor:
    """The loss of ``model`` on ``batch``, a finite scalar.

    Raises:
        ValueError: if the loss cannot be computed, is not a scalar tensor or is not finite.
    """
    return checked_loss(loss, output(model, batch), batch[1])


def checked_loss(loss: Loss, predicted: Any, targets: Any) -> Tensor:
    """``loss(predicted, targets)``, a finite scalar; raises as :func:`batch_loss` does."""
    try:
        value = loss(predicted, targets)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        seen = f"outputs {_shape(predicted)} and targets {_shape(targets)}"
        raise ValueError(f"the loss failed on {seen}: {error}; do the labels fit the outputs?") from error
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"the loss must be a scalar tensor (the mean over the batch), got {_shape(value)}")
    if not torch.isfinite(value):
        raise ValueError(f"the loss of a batch is {value.item()}; look for NaN or infinity in the weights or the data")
    return value


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
