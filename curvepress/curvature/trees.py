"""Tensors inside whatever a model takes or returns: tensors, sequences, mappings and dataclasses, nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def mapped(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` with each tensor replaced by ``change(tensor)``; what is no tensor and holds none stays as it is."""
    if isinstance(tree, Tensor):
        return change(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = [f.name for f in dataclasses.fields(tree) if f.init]
        return dataclasses.replace(tree, **{f: mapped(change, getattr(tree, f)) for f in fields})
    if isinstance(tree, Mapping):
        return _like(tree, {k: mapped(change, v) for k, v in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(change, v) for v in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(change, v) for v in tree)
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of ``tree``, in the order in which :func:`mapped` meets them."""
    found: list[Tensor] = []
    mapped(lambda t: found.append(t) or t, tree)  # type: ignore[func-returns-value]
    return found


def rebuilt(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """``tree`` with its tensors replaced, in order, by ``tensors``."""
    fresh = iter(tensors)
    return mapped(lambda _: next(fresh), tree)


def examples(tree: Any) -> int:
    """The number of examples of a batch: the first dimension of its first tensor.

    Raises:
        ValueError: if there is no tensor with a dimension.
    """
    sizes = [len(t) for t in leaves(tree) if t.ndim]
    if not sizes:
        raise ValueError(f"the inputs of a batch must hold a tensor whose first dimension counts examples, got {type(tree).__name__}")
    return sizes[0]


def rows(tree: Any, index: Tensor) -> Any:
    """The examples ``index`` of a batch; tensors that do not count examples in their first dimension are shared by all."""
    count = examples(tree)
    return mapped(lambda t: t[index.to(t.device)] if t.ndim and len(t) == count else t, tree)


def concatenated(trees: Sequence[Any]) -> Any:
    """One tree whose tensors are those of ``trees`` joined along the first dimension; scalars are those of the first."""
    if len(trees) == 1:
        return trees[0]
    columns = zip(*(leaves(t) for t in trees), strict=True)
    return rebuilt(trees[0], [torch.cat(c) if c[0].ndim else c[0] for c in columns])


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    return items if type(mapping) is dict else type(mapping)(items)  # type: ignore[call-arg]
