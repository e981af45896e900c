"""Whole numbers that modules keep beside their tensors and hand to reshapes: which of them repeat a width, and of what.

A module's ``num_heads`` is an ordinary integer.  In a copy of the model it is replaced by an integer that knows where it came
from; wherever such a one reaches a reshape, a split or a new tensor, the label algebra knows the dimension that it sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..tracing.labelling import Dim, Dims, Ledger
from ..tracing.watching import model_tensors

Place = tuple[str, str, int]
"""``(module, attribute, position)``; position is -1 for an attribute that is a number, not a sequence of them."""


class Width(int):
    """A whole number that knows which attribute of which module it is."""

    place: Place

    @classmethod
    def at(cls, value: int, place: Place) -> Width:
        """The number ``value`` from ``place``."""
        width = cls(value)
        width.place = place
        return width

    def __deepcopy__(self, memo: Any) -> Width:
        return self


@dataclass(frozen=True)
class Use:
    """A number was used as the size of a dimension."""

    place: Place
    dim: Dim


def shadow(model: nn.Module) -> nn.Module:
    """A copy of the model with the same tensors, whose modules' whole numbers are :class:`Width`."""
    twin = copy.deepcopy(model, {id(t): t for t in model_tensors(model).values()})
    for name, module in twin.named_modules():
        for key, value in list(module.__dict__.items()):
            if _whole(value):
                module.__dict__[key] = Width.at(value, (name, key, -1))
            elif type(value) is tuple and any(map(_whole, value)):
                module.__dict__[key] = tuple(Width.at(v, (name, key, n)) if _whole(v) else v for n, v in enumerate(value))
    return twin


def _whole(value: Any) -> bool:
    return type(value) is int and value > 1


class Watched(TorchFunctionMode):
    """Collects the uses of widths while a shadow is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, list[Any], Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        if any(isinstance(x, Width) for x in _leaves(given)):
            self.seen.append((getattr(func, "__name__", ""), given, args[0] if args else None, result))
        return result

    def uses(self, ledger: Ledger) -> Iterator[Use]:
        """What the numbers were the sizes of."""
        for name, given, source, result in self.seen:
            if name in SPLITS:
                yield from _split_uses(ledger, given, result)
            elif name in SIZED:
                for dims in ledger.forms(result):
                    yield from _size_uses(dims, name, given, source)


SPLITS = ("split", "split_with_sizes")
SIZED = ("view", "reshape", "unflatten", "expand", "layer_norm", "rms_norm", "zeros", "ones", "new_zeros", "new_ones")


def _leaves(tree: Any) -> Iterator[Any]:
    for x in tree:
        if isinstance(x, (tuple, list)):
            yield from _leaves(x)
        else:
            yield x


def _size_uses(dims: Dims, name: str, given: Sequence[Any], source: Any) -> Iterator[Use]:
    """Sizes of the result, aligned with its dimensions from the right; behind an unflattened dimension come others."""
    sizes = [x for x in _leaves(given) if type(x) in (int, Width)]
    if name == "unflatten":
        dim, *sizes = sizes
        dims = dims[dim % source.ndim : dim % source.ndim + len(sizes)]
    for dim_, size in zip(dims[::-1], sizes[::-1], strict=False):
        if isinstance(size, Width) and len(dim_) == size:
            yield Use(size.place, dim_)


def _split_uses(ledger: Ledger, given: Sequence[Any], result: Sequence[Tensor]) -> Iterator[Use]:
    sizes, *rest = given[1:]
    over = int(rest[0]) if rest else 0
    for part, size in zip(result, [sizes] * len(result) if isinstance(sizes, int) else sizes, strict=True):
        if isinstance(size, Width) and part.shape[over] == size:
            yield Use(size.place, ledger.of(part)[over])


def mend(model: nn.Module, sizes: dict[Place, int]) -> None:
    """Set these numbers in the modules of ``model``."""
    for (name, key, position), size in sizes.items():
        module = model.get_submodule(name)
        old = module.__dict__[key]
        module.__dict__[key] = size if position < 0 else (*old[:position], size, *old[position + 1 :])
