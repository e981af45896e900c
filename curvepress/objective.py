"""What is being minimised: how a model is run on a batch, and the loss of one batch, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Any, Any]
"""``(inputs, targets)``; ``inputs`` is a tensor or a tuple of tensors, the first dimension counts examples."""
Loss = Callable[[Any, Any], Tensor]
"""``(model output, targets) -> scalar``: the mean over the examples of the batch."""
Batches = Iterable[Batch]


def output(model: Callable[..., Any], batch: Batch) -> Any:
    """What ``model`` computes for the inputs of ``batch``."""
    inputs, _ = batch
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def batch_size(batch: Batch) -> int:
    """The number of examples in ``batch``."""
    inputs, _ = batch
    return len(inputs[0] if isinstance(inputs, (tuple, list)) else inputs)


def batch_loss(model: Callable[..., Any], loss: Loss, batch: Batch) -> Tensor:
    """The loss of ``model`` on ``batch``, a finite scalar.

    Raises:
        ValueError: if the loss cannot be computed, is not a scalar tensor or is not finite.
    """
    predicted = output(model, batch)
    try:
        value = loss(predicted, batch[1])
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        seen = f"outputs {_shape(predicted)} and targets {_shape(batch[1])}"
        raise ValueError(f"the loss failed on {seen}: {error}; do the labels fit the outputs?") from error
    if not isinstance(value, Tensor) or value.ndim:
        raise ValueError(f"the loss must be a scalar tensor (the mean over the batch), got {_shape(value)}")
    if not torch.isfinite(value):
        seen = f"the loss of a batch of {batch_size(batch)} is {value.item()}"
        raise ValueError(f"{seen}; look for NaN or infinity in the weights or the data")
    return value


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
