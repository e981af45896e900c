"""The one place where a model changes shape."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..objective import call, outputs
from ..plan import Plan, implanted
from ..structure import InputSpec
from ..tracing.labelling import lost_rows
from ..tracing.watching import Trace, atoms_lost, model_tensors, quiet_evaluation, run, watch
from .implanting import implant
from .masking import masked, stay
from .rewriting import rewrite
from .widths import Place, Watched, mend, shadow

log = logging.getLogger("curvepress")

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest accepted difference from the masked original, relative to its largest output; 2e-2 for half precision."""
SPELLED = 4
"""Names in one message."""


@dataclass(frozen=True)
class Applied:
    """A smaller model; ``form`` is ``module`` or ``graph``, and ``reason`` is why slicing the module was not enough."""

    model: nn.Module
    form: str
    reason: str = ""


def apply(model: nn.Module, plan: Plan, *example: Any) -> nn.Module:
    """A copy of ``model`` without the channels and branches the plan removes and with its implants, verified against the masked original.

    The given model is left alone and surviving tensors keep their names.  The result is an ordinary copy of the module
    where its code follows its tensors' shapes.  Where the code holds constants (a reshape to a fixed width, a padded
    shortcut), or runs a branch that is left out, it is a ``torch.fx.GraphModule`` rewritten from the exported graph; which
    one and why is logged.

    Implants begin with truncated weights; they are compared with the original that has the dense weights they amount to, and the rest
    is compared with the masked model that has them.  :func:`curvepress.repairing.refitting.fit_implants` fits them to data.

    Args:
        example: inputs to verify on; without them random inputs of the shapes the structure was traced with.

    Raises:
        ValueError: if the plan is for another model, or if no form of the result computes what the masked original does.
    """
    made = applied(model, plan, *example)
    if made.form == "graph":
        log.info("the result is a graph module, as the model's own code holds constants: sliced in place it %s", made.reason)
    return made.model


def applied(model: nn.Module, plan: Plan, *example: Any) -> Applied:
    """What :func:`apply` returns, with its form and the reason for it."""
    _check(model, plan)
    if plan.empty:
        return Applied(copy.deepcopy(model), "module")
    example = example or _on_device_of(model, synthetic(plan.structure.inputs))
    if plan.implants:
        model, plan = _with_implants(model, plan, example), implanted(plan)
        if plan.empty:
            return Applied(model, "module")
    seen = Watched()
    trace = watch(model, lambda: _run_shadow(model, example, seen), example)
    gone = atoms_lost(trace, plan, model_tensors(model))
    wanted = masked(model, plan, example, trace, gone)
    trouble = "has code that runs the branches that are left out"
    if not plan.skip:
        small = _in_place(model, plan, trace, gone, seen)
        if not (trouble := _disagreement(small, example, wanted)):
            return Applied(small, "module")
    try:
        graph = rewrite(model, plan, example)
        still = _disagreement(graph, example, wanted)
    except ValueError as error:
        still = f"cannot be made: {error}"
    if still:
        where = _in_the_way(model, plan, example, trace, seen)
        raise ValueError(f"the plan cannot be applied: cut in {where}, the model {trouble}; rewritten as a graph it {still}")
    return Applied(graph, "graph", trouble)


def _in_place(model: nn.Module, plan: Plan, trace: Trace, gone: np.ndarray, seen: Watched) -> nn.Module:
    """The sliced module with the widths mended that its code repeats; not verified."""
    small = sliced(model, plan)
    mend(small, _widths_left(trace, gone, seen))
    return small


def _in_the_way(model: nn.Module, plan: Plan, example: tuple[Any, ...], trace: Trace, seen: Watched) -> str:
    """The weights whose channels the model's own code does not let go, one group at a time, and what to do about them."""
    if plan.skip:
        return f"{', '.join(plan.skip)}, which {'is' if len(plan.skip) == 1 else 'are'} left out"
    found = []
    for group in (g for g in plan.structure.groups if g.name in plan.keep):
        alone = Plan(plan.structure, {group.name: plan.keep[group.name]})
        gone = atoms_lost(trace, alone, model_tensors(model))
        wanted = masked(model, alone, example, trace, gone)
        if _disagreement(_in_place(model, alone, trace, gone, seen), example, wanted):
            found.append(group)
    found = found or [g for g in plan.structure.groups if g.name in plan.keep]
    more = f" and {len(found) - SPELLED} more" if len(found) > SPELLED else ""
    names = ", ".join(g.producers()[0].tensor for g in found[:SPELLED]) + more
    attended = any(g.kind in ("query-key", "value") for g in found)
    advice = "leave their groups whole" + (", or the widths of queries, keys and values aligned" if attended else "")
    return f"{names} ({advice})"


def _with_implants(model: nn.Module, plan: Plan, example: tuple[Any, ...]) -> nn.Module:
    """The model with the plan's implants, compared with the original that has the weights they amount to."""
    made = implant(model, plan)
    with torch.no_grad(), quiet_evaluation(made.reference):
        wanted = call(made.reference, example)
    if trouble := _disagreement(made.model, example, wanted):
        raise ValueError(f"the implants cannot be put into this model: with them it {trouble}; its code may read the weights itself")
    return made.model


def _run_shadow(model: nn.Module, example: tuple[Any, ...], seen: Watched) -> Any:
    with seen:
        return run(shadow(model), example)


def _widths_left(trace: Trace, gone: np.ndarray, seen: Watched) -> dict[Place, int]:
    """The new value of every number that is the size of dimensions that are cut, where all of them agree."""
    left: dict[Place, set[int]] = {}
    for use in seen.uses(trace.ledger):
        if use.dim.labelled:
            size = int((~lost_rows(trace.ledger.atoms, use.dim.labels, gone)).sum())
            left.setdefault(use.place, set()).add(size)
    return {place: sizes.pop() for place, sizes in left.items() if len(sizes) == 1}


def synthetic(inputs: tuple[InputSpec, ...], seed: int = 0) -> tuple[Any, ...]:
    """Random inputs of the traced shapes: normal for floating point, uniform below the traced bound for integers, masks of ones."""
    generator = torch.Generator().manual_seed(seed)

    def one(spec: InputSpec) -> Tensor:
        dtype = getattr(torch, spec.dtype)
        if "mask" in spec.name:
            return torch.ones(spec.shape, dtype=dtype)
        if dtype.is_floating_point:
            return torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(dtype)
        return torch.randint(max(spec.high, 1), spec.shape, generator=generator).to(dtype)

    named = {i.name: one(i) for i in inputs if i.name}
    return (*(one(i) for i in inputs if not i.name), *([named] if named else []))


def _on_device_of(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    device = next((t.device for t in model_tensors(model).values()), torch.device("cpu"))
    return tuple(torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs))


def sliced(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy with tensors sliced and the widths that known layers repeat as attributes mended; not verified."""
    small = copy.deepcopy(model)
    tensors, cuts = model_tensors(small), stay(plan)
    names = {id(t): n for n, t in tensors.items()}
    new = {n: _narrowed(t, cuts.get(n, {})) for n, t in tensors.items()}
    for module in small.modules():
        own = {k: names[id(t)] for k, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        if any(new[n] is not tensors[n] for n in own.values()):
            _mend(module, {k: cuts.get(n, {}).get(0) for k, n in own.items()}, {k: new[n] for k, n in own.items()})
        for key, name in own.items():
            setattr(module, key, new[name])
    return small


def _narrowed(tensor: Tensor, cuts: Mapping[int, np.ndarray]) -> Tensor:
    if not cuts:
        return tensor
    data = tensor.detach()
    for dim, rows in cuts.items():
        data = data.index_select(dim, torch.as_tensor(rows, device=data.device))
    data = data.contiguous(memory_format=torch.preserve_format)
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _mend(module: nn.Module, rows: Mapping[str, np.ndarray | None], new: Mapping[str, Tensor]) -> None:
    """Set the attributes that repeat a width which a tensor already has."""
    weight: Any = new.get("weight")
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = _groups_left(module.weight.shape[0], module.groups, rows["weight"])
        first, second = weight.shape[0], weight.shape[1] * groups
        outer, inner = (second, first) if module.transposed else (first, second)
        module.out_channels, module.in_channels, module.groups = outer, inner, groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(next(t for t in new.values() if t.ndim))
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = _groups_left(module.num_channels, module.num_groups, rows["weight"])
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def _groups_left(size: int, groups: int, rows: np.ndarray | None) -> int:
    return groups if rows is None else len(np.unique(rows // (size // groups)))


def _check(model: nn.Module, plan: Plan) -> None:
    tensors = {n: tuple(t.shape) for n, t in model_tensors(model).items()}
    for name, spec in plan.structure.tensors.items():
        if spec.kind != "activation" and tensors.get(name) != spec.shape:
            seen = tensors.get(name, "no such tensor")
            raise ValueError(f"this plan is for another model: it has {name} of shape {spec.shape}, this model {seen}")


def _disagreement(model: nn.Module, example: tuple[Any, ...], wanted: Any) -> str:
    """How the model's output differs from the wanted one; empty if it does not."""
    try:
        with torch.no_grad(), quiet_evaluation(model):
            got = call(model, example)
    except Exception as error:
        return f"fails with {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    shapes, wanted_shapes = ([tuple(t.shape) for t in outputs(x)] for x in (got, wanted))
    if shapes != wanted_shapes:
        return f"gives outputs of shape {shapes}, not {wanted_shapes}"
    for a, b in zip(outputs(got), outputs(wanted), strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        apart = float((a - b).abs().max()) if b.numel() else 0.0
        if not apart <= TOLERANCE.get(b.dtype, 2e-2) * max(scale, 1e-6):
            return f"differs from what it should compute by {apart:.2g} where its largest output is {scale:.2g}"
    return ""
