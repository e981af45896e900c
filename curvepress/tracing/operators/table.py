"""The table of operator rules, and what happens to an operator that is not in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..labelling import Dims, Ledger

Arguments = dict[str, Any]
Labelled = Dims | Sequence[Dims]
Rule = Callable[[Ledger, Arguments, Any], Labelled]
"""``(ledger, bound arguments, result) -> dimensions of the result``, or of each result where there are several."""

RULES: dict[str, Rule] = {}
FAMILIES: list[tuple[Callable[[Any, str], bool], Rule]] = []


DECIDING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
"""Operators by which what a model does next can depend on its data."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table under these operator names, written without the underscore of in-place variants."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def family(belongs: Callable[[Any, str], bool]) -> Callable[[Rule], Rule]:
    """Enter a rule for every operator for which ``belongs(operator, name)`` holds and that has no rule of its own."""

    def enter(function: Rule) -> Rule:
        FAMILIES.append((belongs, function))
        return function

    return enter


def unknown(ledger: Ledger, a: Arguments, out: Any) -> Dims:
    """No rule: everything the operator touches is frozen, with the operator's name as the reason."""
    for tensor in tensors_in(list(a.values())):
        ledger.freeze(ledger.of(tensor), f"no rule for {a['op']}")
    return []


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and dicts, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def bound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of an operator by name, with its defaults."""
    schema = func._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in schema), args, strict=False)), **kwargs}


def name_of(func: Any) -> str:
    """The operator's name without namespace, overload and the underscore of an in-place variant."""
    name: str = func._schema.name.split("::")[-1]
    return name.rstrip("_") if not name.startswith("__") else name


def rule_of(func: Any, name: str) -> Rule:
    """The rule of an operator: its own, its family's, or :func:`unknown`."""
    return RULES.get(name) or next((r for belongs, r in FAMILIES if belongs(func, name)), unknown)
