"""Weights that a recipe trains once and keeps: one file, written whole, that says what it came from.

The file lies in the folder that the environment variable ``CURVEPRESS_CACHE`` names, else in ``~/.cache/curvepress``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from curvepress.files import write_bytes
from curvepress.training.fitting import Epoch, Fitted

Train = Callable[..., Fitted]
"""``(checkpoints=folder, progress=function, **settings) -> Fitted``."""


def file_of(recipe: str) -> Path:
    """Where the trained weights of a recipe are kept."""
    return Path(os.environ.get("CURVEPRESS_CACHE") or Path.home() / ".cache" / "curvepress").expanduser() / f"{recipe}.safetensors"


def identity(recipe: str) -> dict[str, Any]:
    """The settings and the validation metrics of the weights that are kept.

    Raises:
        ValueError: if there are none, or the file is damaged.
    """
    path = file_of(recipe)
    if not path.is_file():
        raise ValueError(
            f"there are no trained weights at {path}; make them once with `python -m curvepress_recipes.{recipe}` "
            "(see its --help for how long), or begin with trained=False"
        )
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {})["identity"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or was not made by this recipe ({error}); delete it and make it again") from None
    if found.get("recipe") != recipe:
        raise ValueError(f"{path} was made by the recipe {found.get('recipe')!r}; delete it and make it again")
    return dict(found)


def fill(network: nn.Module, recipe: str) -> nn.Module:
    """``network`` with the weights that are kept.

    Raises:
        ValueError: as :func:`identity` does, or if they are those of another network.
    """
    identity(recipe)
    try:
        network.load_state_dict(load_file(file_of(recipe)), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"{file_of(recipe)} does not hold this network: {error}; delete it and make it again") from None
    return network


def keep(recipe: str, train: Train, settings: Mapping[str, Any], **where: Any) -> Path:
    """Train with these settings and write the weights; interrupted, the same call goes on from the last epoch.

    ``where`` are arguments of ``train`` that do not change the result, such as the folder of the data.

    Raises:
        ValueError: if weights of other settings are there already, or training fails.
    """
    path = file_of(recipe)
    if path.exists() and (kept := identity(recipe)["settings"]) != dict(settings):
        raise ValueError(f"{path} was made with {kept}; delete it to make it anew, or name another folder in CURVEPRESS_CACHE")
    if not path.exists():
        checkpoints = path.with_suffix(".training")
        fitted = train(checkpoints=checkpoints, progress=_tell, **where, **settings)
        metrics = dict(fitted.history[-1].metrics) if fitted.history else {}
        note = json.dumps({"recipe": recipe, "settings": dict(settings), "validation": metrics})
        tensors = {n: t.contiguous() for n, t in fitted.model.state_dict().items()}
        write_bytes(path, save(tensors, {"identity": note}))
        shutil.rmtree(checkpoints, ignore_errors=True)
    return path


def _tell(epoch: Epoch) -> None:
    metrics = ", ".join(f"{k} {v:.4g}" for k, v in epoch.metrics.items())
    print(f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, {metrics}, {epoch.seconds:.0f} s", flush=True)


def command(recipe: str, train: Train, about: str, **defaults: Any) -> None:
    """The command line that trains a recipe's weights: every setting with a default is an option."""
    parser = argparse.ArgumentParser(prog=f"python -m curvepress_recipes.{recipe}", description=about)
    parser.add_argument("--data", default="", help="the folder of the data; CURVEPRESS_DATA if not given")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"{value} if not given")
    try:
        given = vars(parser.parse_args())
        path = keep(recipe, train, {k: v for k, v in given.items() if k != "data"}, data=given["data"])
    except ValueError as error:
        raise SystemExit(f"{recipe}: {error}") from None
    print(f"{path}: {identity(recipe)}")
