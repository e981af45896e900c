"""Models that ``torch.distributed.fsdp.fully_shard`` has spread over processes (FSDP2).

Their parameters are whole only while the module that holds them runs, and each pass is the work of all processes: one that
made a pass less than another would leave it waiting for ever.  So processes agree on the number of passes before they begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .workers import most


def sharded(model: nn.Module) -> bool:
    """Whether the parameters of ``model`` are spread over processes."""
    return any(spread(p) for p in model.parameters())


def spread(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one process's part of a larger one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with the parts of all processes."""
    return tensor.full_tensor() if spread(tensor) else tensor  # type: ignore[attr-defined]


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` itself, if it is not inside one of torch's older wrappers for several processes.

    Raises:
        ValueError: if it is.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, whose passes wait for each other; give the model inside, .module"
        )
    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("the model is wrapped in FullyShardedDataParallel, which hides its parameters; shard it with fully_shard instead")
    return model


def check(model: nn.Module, *, first_order: bool, half: torch.dtype | None) -> None:
    """Sees whether the curvature of a model that may be sharded can be estimated.

    Raises:
        ValueError: if it is sharded and the estimator or the precision does not allow for that.
    """
    if sharded(model) and not first_order:
        raise ValueError(
            "second derivatives do not pass through a model sharded with fully_shard; choose a first-order estimator "
            "(exact, pairs, sketch, monte_carlo_fisher, empirical_fisher), or give the whole model"
        )
    if sharded(model) and half == torch.float16:
        raise ValueError("in float16 each process repeats other passes, which a sharded model does not allow; choose bfloat16 or full")


@contextmanager
def in_use(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within, the parameters by name as the passes of ``model`` use them: of a sharded model once they have been used."""
    own = dict(model.named_parameters())
    if not sharded(model):
        yield dict(own)
        return
    seen: dict[str, Tensor] = {}
    hooks = [m.register_forward_pre_hook(partial(_seeing, f"{n}." if n else "", seen)) for n, m in model.named_modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _seeing(prefix: str, seen: dict[str, Tensor], module: nn.Module, _inputs: Any) -> None:
    seen.update({prefix + n: p for n, p in module.named_parameters() if not spread(p)})


def spans(model: nn.Module, count: int, size: int) -> list[tuple[int, int, bool]]:
    """Ranges that cover ``count`` examples, ``size`` at a time, and whether each counts.

    With a sharded model a process that has fewer than another gets more of its first example, which do not count.
    """
    own = [(a, min(a + size, count), True) for a in range(0, count, size)]
    return own + [(0, 1, False)] * (agreed(model, len(own)) - len(own))


def agreed(model: nn.Module, number: int) -> int:
    """The largest ``number`` that a process gives if they share a sharded model, else one's own."""
    return most(number) if sharded(model) else number
