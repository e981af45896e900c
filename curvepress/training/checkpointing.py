"""Checkpoints of a training run: one file of tensors, and one of JSON that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import write_bytes, write_text

VERSION = 1
STATE = "training.json"

Tensors = dict[str, Tensor]


def save(folder: Path, identity: Mapping[str, Any], history: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensors]) -> None:
    """Write the tensors, then the JSON that names them, which is what makes the checkpoint; then drop older tensors.

    Args:
        identity: what the run was asked, to be met again when it continues.
        history: one record for every finished epoch.
        tensors: tensors by part and name.
    """
    stored = safetensors.torch.save({f"{part}.{name}": t for part, values in tensors.items() for name, t in values.items()})
    name = f"epoch-{len(history)}.safetensors"
    state = {"version": VERSION, "call": identity, "history": list(history)}
    write_bytes(folder / name, stored)
    write_text(folder / STATE, json.dumps({**state, "tensors": name, "sha256": hashlib.sha256(stored).hexdigest()}, indent=1))
    for old in set(folder.glob("epoch-*.safetensors")) - {folder / name}:
        old.unlink()


def read(folder: Path, identity: Mapping[str, Any], parts: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Tensors]] | None:
    """The history and the tensors by part of the checkpoint in ``folder``; ``None`` where there is none.

    Raises:
        ValueError: if it is damaged, or of a run with another identity.
    """
    if not (folder / STATE).exists():
        return None
    made_by, history, tensors = _read(folder, parts)
    differences = [f"{k}: {made_by.get(k)} there, {v} here" for k, v in identity.items() if made_by.get(k) != v]
    if differences:
        raise ValueError(f"the checkpoint in {folder} is of another call ({'; '.join(differences)}); repeat that one or use another folder")
    return history, tensors


def _read(folder: Path, parts: Sequence[str]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Tensors]]:
    try:
        state = json.loads((folder / STATE).read_text())
        if state["version"] != VERSION:
            raise ValueError(f"version {state['version']} instead of {VERSION}")
        stored = (folder / state["tensors"]).read_bytes()
        if hashlib.sha256(stored).hexdigest() != state["sha256"]:
            raise ValueError(f"{state['tensors']} is not what was written")
        named = safetensors.torch.load(stored).items()
        tensors = {p: {n.removeprefix(p + "."): t for n, t in named if n.startswith(p + ".")} for p in parts}
        return dict(state["call"]), [dict(e) for e in state["history"]], tensors
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the checkpoint in {folder} is damaged ({type(error).__name__}: {error}); delete it to start again") from error
