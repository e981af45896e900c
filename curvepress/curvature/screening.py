"""First passes that only decide which examples are looked at: half precision, normalisation folded into convolutions.

What is drawn by them is run again, and its output curvature is taken from there.  So their errors change how likely an example is
drawn, and with it the variance, but bring no bias (probabilities proportional to an approximate size: Särndal, Swensson and
Wretman, "Model Assisted Survey Sampling", 1992, section 3.6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..objective import output
from .recording import View
from .trees import leaves

NATIVE = ("avx512_bf16", "amx_bf16", "bf16")
"""Capabilities of processors that multiply in bfloat16."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AGREEMENT = 1e-3


@dataclass(frozen=True, eq=False)
class Screen:
    """``half`` is the type of first passes, None for that of the others; ``stand_ins`` take the place of modules meanwhile."""

    half: torch.dtype | None
    stand_ins: Mapping[str, nn.Module] = field(default_factory=dict)

    @contextmanager
    def put(self, view: View) -> Iterator[View]:
        """Within, what to run first passes by; afterwards the model is as it was."""
        before = {n: view.model.get_submodule(n) for n in self.stand_ins}
        try:
            for name, module in self.stand_ins.items():
                view.model.set_submodule(name, module)
            yield replace(view, half=self.half)
        finally:
            for name, module in before.items():
                view.model.set_submodule(name, module)


def screen(view: View, few: Any) -> Screen:
    """How first passes are run, found out on a few examples."""
    single = all(p.dtype == torch.float32 for p in view.model.parameters())
    half = torch.bfloat16 if single and view.half is None and native(view.device) else view.half
    stand_ins = _folded(view.model, few)
    if not _same(view, stand_ins, few):
        return Screen(half)
    return Screen(half, {n: m.to(half) for n, m in stand_ins.items()} if half else stand_ins)


def _same(view: View, stand_ins: Mapping[str, nn.Module], few: Any) -> bool:
    """Whether the model computes with ``stand_ins`` what it does without."""
    single = replace(view, half=None)
    with torch.no_grad():
        plain = leaves(single.run(few))
        with Screen(None, stand_ins).put(single) as quick:
            return all(_close(a, b) for a, b in zip(leaves(quick.run(few)), plain, strict=True))


def native(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(known.get(n) for n in NATIVE)


def _close(a: Tensor, b: Tensor) -> bool:
    return not a.is_floating_point() or bool((a - b).abs().max() <= AGREEMENT * b.abs().max())


def _folded(model: nn.Module, few: Any) -> dict[str, nn.Module]:
    """Convolutions with the normalisation behind them in their weights, and what takes the place of that normalisation."""
    names = {m: n for n, m in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for conv, norm in _pairs(model, few):
        found |= {names[conv]: fuse_conv_bn_eval(conv, norm), names[norm]: nn.Identity()}
    return found


def _pairs(model: nn.Module, few: Any) -> list[tuple[Any, Any]]:
    """Convolutions whose result is taken in by a batch normalisation, if both run once and nothing watches them."""
    seen: list[tuple[nn.Module, Tensor]] = []
    kept = [m for m in model.modules() if type(m) in (*CONVOLUTIONS, *NORMS) and not m._forward_hooks and not m._forward_pre_hooks]
    hooks = [m.register_forward_hook(lambda m, given, made: seen.append((m, made if type(m) in CONVOLUTIONS else given[0]))) for m in kept]
    try:
        with torch.no_grad():
            output(model, (few, None))
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(m for m, _ in seen)
    made = {id(t): m for m, t in seen if type(m) in CONVOLUTIONS and times[m] == 1}
    norms = [(made.get(id(t)), m) for m, t in seen if type(m) in NORMS and times[m] == 1 and m.running_mean is not None]
    return [(conv, norm) for conv, norm in norms if conv is not None]
