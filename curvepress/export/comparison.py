"""A quantized module and what was written of it, run on the same real data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..objective import Batches, batch_size, call, in_a_tuple
from ..quantization.quantized.modules import floating
from .onnx import Inputs, evaluating

FLOAT_ERROR = 1e-5
"""Relative differences of outputs that float32 sums in another order make; with no grid at all there are no others."""


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


def refuse_disagreement(runtime: str, module: nn.Module, data: list[Inputs], same: float, mean: float, least_same: float) -> None:
    """See whether a file that gives the same predictions so often, and differs so far on average, computes what the module does.

    Raises:
        ValueError: if outputs differ by more than quantization changes them, or by more than half of that and fewer than
            ``least_same`` percent of the predictions are the same.
    """
    change = rounding_change(module, data)
    if not (mean <= change and (same >= least_same or mean <= change / 2)):
        raise ValueError(
            f"{runtime} gives the same prediction as the simulation for {same:.2f}% of the examples (not {least_same:g}%), "
            f"and its outputs differ by {mean:.2g} on average, where quantization itself changes them by {change:.2g}; "
            "give more examples if these are few, or report the model"
        )


def rounding_change(module: nn.Module, data: list[Inputs]) -> float:
    """The mean absolute difference that quantization makes to an output, and what rounding of float32 may make on top."""
    with floating(module), evaluating(module), torch.no_grad():
        wanted = [[x.numpy() for x in _pytree.tree_leaves(call(module, inputs)) if isinstance(x, Tensor)] for inputs in data]
    left = iter(wanted)
    size = np.mean([np.abs(x).mean() for outputs in wanted for x in outputs])
    return compare(module, data, lambda _: next(left))[3] + FLOAT_ERROR * float(size)


def example_of(inputs: Inputs) -> Inputs:
    """Two examples in memory of their own: what a graph is exported with."""
    return tuple(_pytree.tree_map(lambda x: torch.cat([x, x])[:2].clone(), inputs))
