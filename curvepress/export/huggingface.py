"""A plain Hugging Face folder, where the architecture's own configuration can say how wide the pruned model is."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import call, outputs

FIELDS = {
    "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_sizes", "intermediate_size", "d_ff", "n_inner", "hidden_dim",
    "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads", "num_key_value_heads", "head_dim", "d_kv",
}  # fmt: skip
"""Entries of configurations that are widths."""

IMPLIED = {
    "head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"],
    "n_inner": lambda c: 4 * c["n_embd"],
}
"""Widths that a configuration may leave open, and what they then are."""

QUERIES = re.compile(r"\b(q_proj|query|q_lin|q)\.(weight|bias)$")
FUSED = re.compile(r"\bc_attn\.(weight|bias)$")
KERNELS = ("attn_implementation", "experts_implementation")
"""What is chosen when a model is loaded and not kept with it."""
COMBINATIONS = 4096
ALTERNATIVE = "or use curvepress.save and curvepress.restore, which take any plan"

Path_ = tuple[str | int, ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Written:
    """What :func:`to_huggingface` wrote: the entries of the configuration that changed, ``{entry: (before, now)}``, and how far
    the outputs of the loaded model are from those of the given one, relative to the largest."""

    fields: Mapping[str, tuple[int, int]]
    relative: float


def to_huggingface(small: nn.Module, original: Any, folder: str | Path, *example: Any, tolerance: float = 1e-4) -> Written:
    """Write a pruned model as a folder that ``from_pretrained`` of the original's class loads without curvepress.

    The widths are read off the tensors of ``small``, which may be a module or a rewritten graph.  The folder is loaded and run on the
    example, and gets its name only if the outputs agree.  Where narrower heads would change the scale of the attention scores,
    the queries' weights take up the difference.

    Args:
        small: what ``apply`` made of ``original``, trained further or not.
        original: the Hugging Face model before pruning; its class, configuration and generation settings are used.
        example: inputs of both models, as they were given to ``trace``.
        tolerance: largest difference allowed, relative to the largest absolute value of the output.

    Raises:
        ValueError: if the configuration cannot express the widths, or the loaded model computes something else; or the folder exists.
    """
    folder = Path(folder)
    if not all(hasattr(original, a) for a in ("config", "save_pretrained", "from_pretrained")):
        raise ValueError(f"{type(original).__name__} is no Hugging Face model; use curvepress.save and curvepress.restore")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; give the name of a new folder")
    state = {n: t.detach() for n, t in small.state_dict().items()}
    wanted = _outputs(small, example)
    trouble = ""
    for fields in _expressed(original, {n: tuple(t.shape) for n, t in state.items()}):
        for tensors in _variants(state, original, fields):
            relative = _attempt(_loaded(original, fields, tensors), original, folder, example, wanted, tolerance)
            if relative <= tolerance:
                before = _fields(original.config.to_dict())
                changed = {".".join(map(str, p)): (before[p], v) for p, v in fields.items() if before[p] != v}
                return Written(changed, relative)
            trouble = trouble or f"with {_spelled(fields)} it computes something else (by {relative:.1g}), as constants follow from widths"
    raise ValueError(f"{type(original.config).__name__} cannot express this model: {trouble}; {ALTERNATIVE}")


def _fields(config: Mapping[str, Any], path: Path_ = ()) -> dict[Path_, int]:
    """The widths of a configuration, nested ones and lists included."""
    found: dict[Path_, int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _fields(value, (*path, key))
        elif key in FIELDS and isinstance(value, (list, tuple)):
            found |= {(*path, key, n): v for n, v in enumerate(value)}
        elif key in FIELDS and isinstance(value, int):
            found[*path, key] = value
    for key, implied in IMPLIED.items():
        if config.get(key) is None:
            with_all = {k for k in ("hidden_size", "num_attention_heads", "n_embd") if isinstance(config.get(k), int)}
            if with_all >= ({"n_embd"} if key == "n_inner" else {"hidden_size", "num_attention_heads"}):
                found[*path, key] = implied(config)
    return found


def _configured(original: Any, fields: Mapping[Path_, int]) -> Any:
    """A configuration with these widths."""
    entries = copy.deepcopy(original.config.to_dict())
    for path, value in fields.items():
        inner: Any = entries
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    config = type(original.config).from_dict(entries)
    for how in KERNELS:
        if hasattr(original.config, f"_{how}"):
            setattr(config, f"_{how}", getattr(original.config, f"_{how}"))
    return config


def _shapes(original: Any, fields: Mapping[Path_, int]) -> Shapes:
    """The tensors' shapes of a model with these widths; nothing if there is no such model."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {n: tuple(t.shape) for n, t in type(original)(_configured(original, fields)).state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError, TypeError):
        return {}


def _expressed(original: Any, shapes: Shapes) -> Iterator[dict[Path_, int]]:
    """Widths of configurations whose models have tensors of these shapes.

    Raises:
        ValueError: if there is none; it names the tensors that stand in the way.
    """
    whole = {n: tuple(t.shape) for n, t in original.state_dict().items()}
    fields = _fields(original.config.to_dict())
    moved = {f: _moved(whole, _shapes(original, {**fields, f: 2 * v})) for f, v in fields.items()}
    fields = {f: v for f, v in fields.items() if moved[f] or f[-1] not in IMPLIED}
    ratios = {(n, d): (a, b) for n, s in whole.items() for d, (a, b) in enumerate(zip(s, shapes.get(n, s), strict=True))}
    values = {f: _values(f, v, moved, ratios) for f, v in fields.items()}
    if prod(map(len, values.values())) > COMBINATIONS:
        name = type(original.config).__name__
        raise ValueError(f"{name} cannot express this model: keep the widths equal in all layers, {ALTERNATIVE}")
    closest, found = "", False
    for choice in product(*values.values()):
        chosen = dict(zip(values, choice, strict=True))
        made = _shapes(original, chosen)
        wrong = [n for n in made if made[n] != shapes.get(n)]
        if made and not wrong:
            found = True
            yield chosen
        elif made:
            closest = min(filter(None, (closest, _misfit(chosen, wrong, made, shapes))), key=len)
    if not found:
        raise ValueError(f"{type(original.config).__name__} cannot express this model: {closest}; {ALTERNATIVE}")


def _moved(before: Shapes, now: Shapes) -> set[tuple[str, int]]:
    return {(n, d) for n, s in now.items() if n in before for d, k in enumerate(s) if before[n][d] != k}


def _values(field: Path_, value: int, moved: Mapping[Path_, set[tuple[str, int]]], ratios: Mapping[Any, tuple[int, int]]) -> Sequence[int]:
    """What a width may be now: scaled as the tensors are that follow it, or all tensors if none does.

    Raises:
        ValueError: if tensors that follow this width alone are of different widths.
    """
    others = set().union(*(m for f, m in moved.items() if f != field))
    alone = {site: ratios[site] for site in sorted(moved[field] - others)}
    sizes = {value * b // a: site for site, (a, b) in reversed(alone.items())}
    if len(sizes) > 1:
        seen = ", ".join(f"{n} needs {v}" for v, (n, _) in sorted(sizes.items())[:3])
        nearest = f"the nearest it can express is {max(sizes)} for all"
        name = ".".join(map(str, field))
        raise ValueError(f"the configuration has one {name} for all layers, and here {seen}: {nearest}; {ALTERNATIVE}")
    if sizes:
        return list(sizes)
    follow = [ratios[s] for s in moved[field]] or list(ratios.values())
    return [value, *sorted({value * b // a for a, b in follow if value * b % a == 0} - {value})]


def _misfit(chosen: Mapping[Path_, int], wrong: Sequence[str], made: Shapes, shapes: Shapes) -> str:
    first = wrong[0]
    return f"with {_spelled(chosen)} {first} is {made[first]} and here {shapes.get(first)}, and so for {len(wrong)} tensors"


def _spelled(fields: Mapping[Path_, int]) -> str:
    return ", ".join(f"{'.'.join(map(str, p))} {v}" for p, v in fields.items())


def _variants(state: Mapping[str, Tensor], original: Any, fields: Mapping[Path_, int]) -> Iterator[Mapping[str, Tensor]]:
    """The tensors as they are, and with queries that make up for a scale that follows from narrower heads."""
    yield state
    before, now = (_head_width(f) for f in (_fields(original.config.to_dict()), fields))
    if before != now:
        yield {n: _rescaled(n, t, (now / before) ** 0.5) for n, t in state.items()}


def _head_width(fields: Mapping[Path_, int]) -> float:
    named = {p[-1]: v for p, v in fields.items() if len(p) == 1}
    if "head_dim" in named:
        return named["head_dim"]
    wide = next((named[k] for k in ("hidden_size", "n_embd", "dim", "d_model") if k in named), 1)
    return wide / next((named[k] for k in ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads") if k in named), 1)


def _rescaled(name: str, tensor: Tensor, factor: float) -> Tensor:
    if QUERIES.search(name):
        return tensor * factor
    if FUSED.search(name):
        scale = torch.ones(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        scale[: len(scale) // 3] = factor
        return tensor * scale
    return tensor


def _loaded(original: Any, fields: Mapping[Path_, int], tensors: Mapping[str, Tensor]) -> Any:
    """A model of these widths that holds the tensors."""
    dtype = next(t.dtype for t in tensors.values() if t.is_floating_point())
    model = type(original)(_configured(original, fields)).to(dtype)
    names = model.state_dict().keys()
    model.load_state_dict({n: t for n, t in tensors.items() if n in names})
    model.generation_config = copy.deepcopy(getattr(original, "generation_config", None))
    return model


def _attempt(model: Any, original: Any, folder: Path, example: tuple[Any, ...], wanted: list[Tensor], tolerance: float) -> float:
    """Write the model beside ``folder``, load it, compare, and let it have the name if it agrees; the relative difference."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        kernels = {how: kind for how in KERNELS if (kind := getattr(original.config, f"_{how}", None))}
        again = type(original).from_pretrained(temporary, dtype=model.dtype, local_files_only=True, **kernels)
        relative = _apart(_outputs(again.to(original.device), example), wanted)
        if relative <= tolerance:
            temporary.replace(folder)
        return relative
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    training = model.training
    with torch.no_grad():
        found = outputs(call(model.eval(), example))
    model.train(training)
    return found


def _apart(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in zip(got, wanted, strict=True))
