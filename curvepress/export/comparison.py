"""A quantized module and what was written of it, run on the same real data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..objective import Batches, batch_size, call, in_a_tuple
from ..quantized.modules import floating
from .onnx import Inputs, evaluating


def take(batches: Batches, examples: int) -> list[Inputs]:
    """The inputs of whole batches until ``examples`` were taken, or all were.

    Raises:
        ValueError: if there are none.
    """
    taken: list[Inputs] = []
    count = 0
    for batch in batches:
        taken.append(_pytree.tree_map(lambda x: x.detach().contiguous(), in_a_tuple(batch[0])))
        count += batch_size(batch)
        if count >= examples:
            break
    if not taken:
        raise ValueError("there were no batches to compare the file with the module on")
    return taken


def compare(module: nn.Module, data: list[Inputs], run: Callable[[Inputs], Sequence[np.ndarray]]) -> tuple[int, float, float, float]:
    """Examples, the percentage of predictions that are the same, and the largest and the mean absolute difference of an output.

    A prediction is the index of the largest number in the last dimension of the first output.
    """
    apart, equal = [], []
    with evaluating(module), torch.no_grad():
        for inputs in data:
            found = run(inputs)
            wanted = [x.numpy() for x in _pytree.tree_leaves(call(module, inputs)) if isinstance(x, Tensor)]
            apart.append(np.concatenate([np.abs(w - f).ravel() for w, f in zip(wanted, found, strict=True)]))
            equal.append((wanted[0].argmax(-1) == np.asarray(found[0]).argmax(-1)).ravel())
    difference, same = np.concatenate(apart), np.concatenate(equal)
    return sum(batch_size((i, None)) for i in data), 100 * float(same.mean()), float(difference.max()), float(difference.mean())


def rounding_change(module: nn.Module, data: list[Inputs]) -> float:
    """The mean absolute difference that quantization makes to an output."""
    with floating(module), evaluating(module), torch.no_grad():
        wanted = [[x.numpy() for x in _pytree.tree_leaves(call(module, inputs)) if isinstance(x, Tensor)] for inputs in data]
    left = iter(wanted)
    return compare(module, data, lambda _: next(left))[3]


def example_of(inputs: Inputs) -> Inputs:
    """Two examples in memory of their own: what a graph is exported with."""
    return tuple(_pytree.tree_map(lambda x: torch.cat([x, x])[:2].clone(), inputs))
