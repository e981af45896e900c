"""Quantized tensors in a file: levels in 2 to 8 bits each, without gaps, checked against a digest when read.

A packed file is a safetensors file with few entries, so that its header stays small: all levels, one tensor after the other, each in
``ceil(n * bits / 8)`` bytes; zero points in the same way; all other numbers, one entry for each dtype; and an index
(JSON, compressed by zlib) of names, shapes and schemes in their order, with the plan; and a digest of all that.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import write_bytes
from .quantizer import Grid, Scheme, spread

FORMAT = "curvepress packed 1"
LEVELS, ZEROS, INDEX, DIGEST = "levels", "zero points", "index", "digest"
PART = 1 << 20  # levels at a time; whole bytes at every width
LONGEST_INDEX = 1 << 28


@dataclass(frozen=True, eq=False)
class Packed:
    """What a packed file holds.

    ``tensors`` are stored as they are (biases, norms, what stays float); ``quantized`` maps a parameter's name to its levels (as
    ``quantize`` gives them) and grid; ``activations`` maps a site's name to its grid; ``plan`` is any JSON object.
    """

    tensors: Mapping[str, Tensor]
    quantized: Mapping[str, tuple[Tensor, Grid]]
    activations: Mapping[str, Grid]
    plan: Mapping[str, Any]


def packed_size(elements: int, bits: int) -> int:
    """Bytes of that many levels: ``ceil(elements * bits / 8)``."""
    return (elements * bits + 7) // 8


def pack(levels: Tensor, bits: int) -> Tensor:
    """uint8 ``[packed_size]``: the low ``bits`` bits of every level, the first level in the lowest bits of the first byte.

    Raises:
        ValueError: if the levels are no int8 or uint8 of 2 to 8 bits.
    """
    scheme = Scheme(bits, symmetric=levels.dtype == torch.int8)
    if levels.dtype != scheme.dtype or bool(((levels < scheme.qmin) | (levels > scheme.qmax)).any()):
        raise ValueError(f"levels are int8 or uint8 from {scheme.qmin} to {scheme.qmax}, got {levels.dtype}; quantize the tensor again")
    parts = [_packed_part(part, bits) for part in levels.detach().cpu().contiguous().flatten().split(PART)]
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.uint8))


def unpack(content: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """int8 (signed) or uint8 levels of the given shape.

    Raises:
        ValueError: if the content is not as long as such a tensor's.
    """
    scheme, elements = Scheme(bits, symmetric=signed), math.prod(shape)
    if content.dtype != torch.uint8 or content.shape != (packed_size(elements, bits),):
        raise ValueError(f"{elements} levels of {bits} bits take {packed_size(elements, bits)} bytes, got {len(content)}")
    flat = torch.cat([_unpacked_part(part, bits) for part in content.split(PART * bits // 8)])[:elements]
    sign = 2 ** (bits - 1) if signed else 0
    return ((flat.to(torch.int16) ^ sign) - sign).to(scheme.dtype).reshape(shape)


def save_packed(packed: Packed, path: str | Path) -> None:
    """Write one safetensors file.

    Raises:
        ValueError: if levels are off their grid, or the plan is no JSON.
    """
    entries = _sections(packed)
    write_bytes(Path(path), safetensors.torch.save({**entries, DIGEST: _digest(entries)}, {"format": FORMAT}))


def load_packed(path: str | Path) -> Packed:
    """Read what :func:`save_packed` wrote, bit for bit.

    Raises:
        ValueError: if the file is missing, truncated, altered, or of another kind.
    """
    entries = _read(Path(path))
    try:
        reader = _Reader(entries)
        index = reader.index
        quantized = {str(name): reader.quantized(shape, Scheme(*scheme)) for name, shape, scheme in index["quantized"]}
        activations = {str(name): reader.grid(shape, Scheme(*scheme)) for name, shape, scheme in index["activations"]}
        tensors = {str(name): reader.numbers(dtype, shape) for name, dtype, shape in index["tensors"]}
        reader.finish()
        return Packed(tensors, quantized, activations, dict(index["plan"].items()))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: its index does not fit its content ({error}); pack the model again") from None


def _packed_part(levels: Tensor, bits: int) -> np.ndarray:
    columns = np.unpackbits(levels.view(torch.uint8).numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(columns, bitorder="little")


def _unpacked_part(content: Tensor, bits: int) -> Tensor:
    flat = np.unpackbits(content.numpy(), bitorder="little")
    columns = flat[: len(flat) // bits * bits].reshape(-1, bits)
    return torch.from_numpy(np.packbits(columns, axis=1, bitorder="little")[:, 0])


def _sections(packed: Packed) -> dict[str, Tensor]:
    """The entries of the file."""
    for name, (levels, grid) in packed.quantized.items():
        _check_levels(name, levels, grid)
    grids = [*(grid for _, grid in packed.quantized.values()), *packed.activations.values()]
    numbers = [*(grid.scale for grid in grids), *packed.tensors.values()]
    zeros = [pack(g.zero_point.to(torch.uint8), g.bits) for g in grids if not g.scheme.symmetric]
    return {
        LEVELS: _joined(pack(levels, grid.bits) for levels, grid in packed.quantized.values()),
        ZEROS: _joined(zeros),
        INDEX: torch.frombuffer(bytearray(zlib.compress(_index(packed), 9)), dtype=torch.uint8),
        **{_dtype_name(dtype): _joined(n for n in numbers if n.dtype == dtype) for dtype in sorted({n.dtype for n in numbers}, key=str)},
    }


def _check_levels(name: str, levels: Tensor, grid: Grid) -> None:
    low, high, dtype = grid.scheme.qmin, grid.scheme.qmax, grid.scheme.dtype
    if levels.dtype != dtype or bool(((levels < low) | (levels > high)).any()):
        raise ValueError(f"{name} has {levels.dtype} levels, its grid {dtype} ones from {low} to {high}; quantize it again")
    spread(grid.scale, grid.scheme, levels.shape)  # refuses what does not fit together


def _index(packed: Packed) -> bytes:
    index = {
        "quantized": [
            (name, [*levels.shape, *grid.scale.shape], astuple(grid.scheme)) for name, (levels, grid) in packed.quantized.items()
        ],
        "activations": [(name, list(grid.scale.shape), astuple(grid.scheme)) for name, grid in packed.activations.items()],
        "tensors": [(name, _dtype_name(tensor.dtype), list(tensor.shape)) for name, tensor in packed.tensors.items()],
        "plan": dict(packed.plan),
    }
    return json.dumps(index, allow_nan=False, separators=(",", ":")).encode()


def _joined(parts: Iterable[Tensor]) -> Tensor:
    flat = [part.detach().cpu().flatten() for part in parts]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(entries: Mapping[str, Tensor]) -> Tensor:
    """uint8 ``[32]``: sha256 of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(entries):
        tensor = entries[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; pack a model into it first")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}; pack the model again") from None
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is no {FORMAT!r} file: its format is {about.get('format')!r}; give the right file")
    digest = entries.pop(DIGEST, torch.empty(0))
    if not torch.equal(digest, _digest(entries)):
        raise ValueError(f"{path} is altered: its content does not have the digest written with it; copy or pack it again")
    return entries


class _Reader:
    """Takes tensors from the sections of a file in the order in which they were put there."""

    def __init__(self, entries: Mapping[str, Tensor]) -> None:
        self.entries, self.taken = dict(entries), dict.fromkeys(entries, 0)
        text = zlib.decompressobj().decompress(self.entries[INDEX].numpy().tobytes(), LONGEST_INDEX)
        self.index, self.taken[INDEX] = json.loads(text), len(entries[INDEX])

    def take(self, section: str, elements: int) -> Tensor:
        start = self.taken[section]
        self.taken[section] = start + elements
        if elements < 0 or self.taken[section] > len(self.entries[section]):
            raise ValueError(f"{section} is too short")
        return self.entries[section][start : start + elements].clone()

    def numbers(self, dtype: str, shape: list[int]) -> Tensor:
        return self.take(dtype, math.prod(shape)).reshape(shape)

    def quantized(self, shape: list[int], scheme: Scheme) -> tuple[Tensor, Grid]:
        """``shape`` is that of the levels, followed by that of the scales."""
        dims = len(shape) - (0 if scheme.axis is None else 1 if scheme.group is None else 2)
        content = self.take(LEVELS, packed_size(math.prod(shape[:dims]), scheme.bits))
        levels, grid = unpack(content, scheme.bits, tuple(shape[:dims]), signed=scheme.symmetric), self.grid(shape[dims:], scheme)
        spread(grid.scale, scheme, levels.shape)  # refuses what does not fit together
        return levels, grid

    def grid(self, shape: list[int], scheme: Scheme) -> Grid:
        scale = self.numbers("float32", shape)
        if scheme.symmetric:
            return Grid(scheme, scale, torch.zeros(shape, dtype=torch.int32))
        content = self.take(ZEROS, packed_size(scale.numel(), scheme.bits))
        return Grid(scheme, scale, unpack(content, scheme.bits, tuple(shape), signed=False).to(torch.int32))

    def finish(self) -> None:
        left = {name: len(t) - self.taken[name] for name, t in self.entries.items() if len(t) != self.taken[name]}
        if left:
            raise ValueError(f"nothing tells what the rest of {', '.join(left)} is")
