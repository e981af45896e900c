"""Scores, structures and models as files: safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..curvature import Sample
from ..files import write_bytes, write_text
from ..plan import Plan, dumps
from ..scores import Scores
from ..structure import Structure, structure_from_dict, structure_to_dict
from ..surgery.cutting import apply
from ..tracing.watching import model_tensors

MODEL = "curvepress model"
SAMPLE = "curvepress sample of scores"
SCORES: Mapping[str, Any] = {"format": "curvepress scores", "version": 1}
STRUCTURE: Mapping[str, Any] = {"format": "curvepress structure", "version": 1}


def save(model: nn.Module, path: str | Path) -> None:
    """Write the model's parameters and stored buffers to a safetensors file, tied ones once, under their own names."""
    tensors = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in _stored(model).items()}  # views share memory
    write_bytes(Path(path), safetensors.torch.save(tensors, {"format": MODEL}))


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """The given model, filled with the tensors of a file that :func:`save` wrote.

    Raises:
        ValueError: if the file is damaged or foreign, or its tensors are not those of the model.
    """
    tensors = _read_tensors(Path(path), MODEL)
    try:
        return _filled(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path} holds another model: {error}; build the model that the file was saved from") from None


def fill(model: nn.Module, other: nn.Module) -> nn.Module:
    """The given model, filled with the tensors of another.

    Raises:
        ValueError: if these are not those of the model.
    """
    return _filled(model, _stored(other))


def _filled(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    own = _stored(model)
    for name in {**own, **tensors}:
        seen, wanted = _look(tensors.get(name)), _look(own.get(name))
        if seen != wanted:
            raise ValueError(f"{name} is {seen} there and {wanted} in the model to be filled")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model


def restore(model: nn.Module, plan: Plan, path: str | Path, *example: Any) -> nn.Module:
    """A compressed model: ``plan`` applied to a freshly built ``model``, filled with the tensors at ``path``, in evaluation mode.

    Raises:
        ValueError: if the plan is for another model, or the file does not hold its result.
    """
    return load(apply(model, plan, *example), path).eval()


def save_structure(structure: Structure, path: Path) -> None:
    """Write a structure as JSON."""
    write_text(path, dumps({**STRUCTURE, **structure_to_dict(structure)}))


def load_structure(path: Path) -> Structure:
    """Read what :func:`save_structure` wrote."""
    return structure_from_dict(read_json(path, STRUCTURE))


def save_scores(scores: Scores, folder: Path) -> None:
    """Write ``scores.safetensors`` (values and standard errors by group) and ``scores.json`` (how they were made)."""
    tensors = {f"{part}/{g}": v for part in ("values", "stderr") for g, v in getattr(scores, part).items()}
    about = {k: getattr(scores, k) for k in ("method", "unit", "samples", "seed", "detail")}
    write_bytes(folder / "scores.safetensors", safetensors.numpy.save(tensors, {"format": SCORES["format"]}))
    write_text(folder / "scores.json", dumps({**SCORES, **about, "groups": list(scores.values)}))


def load_scores(folder: Path) -> Scores:
    """Read what :func:`save_scores` wrote.

    Raises:
        ValueError: if a file is missing, damaged or foreign.
    """
    about = read_json(folder / "scores.json", SCORES)
    tensors = _read_tensors(folder / "scores.safetensors", SCORES["format"])
    try:
        values, stderr = ({g: tensors[f"{part}/{g}"].numpy() for g in about["groups"]} for part in ("values", "stderr"))
        return Scores(values, stderr, about["method"], about["unit"], about["samples"], about["seed"], about["detail"])
    except KeyError as error:
        raise ValueError(f"the scores in {folder} are damaged: {error} is missing; make them again with `curvepress score`") from None


class StoredSamples(MutableMapping[int, Sample]):
    """Samples of scores by number, one file each in a folder, so that scoring can go on where it stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, number: int) -> Sample:
        if not self._path(number).exists():
            raise KeyError(number)
        return {g: t.numpy() for g, t in _read_tensors(self._path(number), SAMPLE).items()}

    def __setitem__(self, number: int, sample: Sample) -> None:
        write_bytes(self._path(number), safetensors.numpy.save(dict(sample), {"format": SAMPLE}))

    def __delitem__(self, number: int) -> None:
        self._path(number).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(p.stem) for p in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


def read_json(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that carries the ``expected`` entries, without them.

    Raises:
        ValueError: if the file is missing, damaged or foreign.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; run the stage that makes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it and run the stage that makes it") from None
    if not isinstance(data, dict) or any(data.get(k) != v for k, v in expected.items()):
        seen = {k: data.get(k) for k in expected} if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path} is another kind of file: expected {dict(expected)}, found {seen}; give the right one, or make it again")
    return {k: v for k, v in data.items() if k not in expected}


def _stored(model: nn.Module) -> dict[str, Tensor]:
    stored = model.state_dict().keys()
    return {n: t for n, t in model_tensors(model).items() if n in stored}


def _read_tensors(path: Path, form: Any) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing; run the stage that makes it")
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != form:
                raise ValueError(f"{path} is no {form}: its format is {(file.metadata() or {}).get('format')!r}; give the right file")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}; delete it and run the stage that makes it") from None


def _look(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
