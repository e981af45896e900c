"""What the stages are asked, as people write it, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..planner.channels import milliseconds
from ..planner.joint import Exchange
from ..scores import METHODS, RANKING
from ..stopwatch import machine
from ..training.fitting import fit
from .recipe import Recipe

FIT: Mapping[str, Any] = {
    "epochs": 1,
    "lr": 0.01,
    "optimizer": "sgd",
    "schedule": "cosine",
    "milestones": [],
    "weight_decay": 1e-4,
    "distill": 0.0,
    "precision": "full",
}
"""The settings of the fine-tune where neither the user nor the recipe has others."""
QAT: Mapping[str, Any] = {"epochs": 0, "lr": 0.002, "distill": 0.9, "precision": "full"}
"""Those of training a quantized model, which is nearly there when it starts, where the user has no others; the rate is not above that
of the fine-tune, which suits its optimizer."""


def limits(
    params: str | None, bytes: str | None, macs: str | None, *, bops: str | None = None, latency: str | None = None
) -> dict[str, float | int | str | None]:
    """The budget by cost: a float is a share of the original (from 0.5 or 50%), an integer an absolute number.

    An absolute latency stays the text that it is, such as ``0.8ms``; where latency has no limit, nothing is said of it.

    Raises:
        ValueError: if a limit is neither, or together they limit nothing.
    """
    given = {"params": params, "bytes": bytes, "macs": macs, **({"bops": bops} if bops is not None else {})}
    found: dict[str, float | int | str | None] = {name: None if text is None else _limit(name, text) for name, text in given.items()}
    if latency is not None:
        given, found = {**given, "latency": latency}, {**found, "latency": _latency(latency)}
    if all(v is None for v in found.values()):
        raise ValueError("no budget is given; say how small, such as --params 0.5, --macs 40%, --bytes 100000 or --latency 60%")
    if all(v in (None, 1.0) for v in found.values()):
        said = " ".join(f"--{name} {text}" for name, text in given.items() if text is not None)
        raise ValueError(f"{said} is the whole model; ask for a share below 1, such as 0.5 or 50%, or for a number such as 100000")
    return found


def bit_ranges(bits: str | None, activations: str | None) -> dict[str, list[int]]:
    """The bits that a plan may choose from, if any: ``4``, ``2-8`` or ``2,4,8``; activations have 8 where nothing else is asked.

    Raises:
        ValueError: if they are not from 2 to 8, or there are bits of activations alone.
    """
    if bits is None and activations is not None:
        raise ValueError(f"--activation-bits {activations} needs --bits, those that weights may have, such as --bits 2-8")
    return {} if bits is None else {"bits": _widths("bits", bits), "activation_bits": _widths("activation-bits", activations or "8")}


def exchange(given: Sequence[str], chosen: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the predicted rises of each kind of decision are multiplied with, from texts such as ``channels=0.1``.

    Raises:
        ValueError: if a text is something else, or there are no bits or implants to exchange for.
    """
    rates: dict[str, float] = {}
    for text in given:
        kind, _, rate = text.partition("=")
        try:
            rates[kind.strip()] = float(rate)
            Exchange(**rates)
        except (TypeError, ValueError):
            kinds = ", ".join(f.name for f in fields(Exchange))
            raise ValueError(f"--exchange must be a kind ({kinds}) and a positive number, such as channels=0.1; got {text!r}") from None
    if rates and not chosen:
        raise ValueError("--exchange needs --bits or --implants: without them there is nothing to exchange channels for")
    return {"exchange": rates} if rates else {}


def branch_count(text: str, chosen: Mapping[str, Sequence[int]]) -> int | str:
    """How many residual branches are left out, or ``auto``, with which the planner chooses, beside the bits in ``chosen``.

    Raises:
        ValueError: if it is neither, or the planner cannot choose.
    """
    if text.isdecimal():
        return int(text)
    if text != "auto":
        raise ValueError(f"--branches must be a whole number or auto; got {text!r}")
    if not chosen:
        raise ValueError("--branches auto weighs branches against bits: add --bits, such as --bits 2-8, or say how many branches go")
    if len(chosen["activation_bits"]) > 1:
        raise ValueError("--branches auto takes one number of --activation-bits, such as 8; or say how many branches go")
    return text


def _widths(name: str, text: str) -> list[int]:
    found: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdecimal() or not (high or low).isdecimal():
            raise ValueError(f"--{name} must be like 4, 2-8 or 2,4,8; got {text!r}")
        found |= {*range(int(low), int(high or low) + 1)}
    if not found or min(found) < 2 or max(found) > 8:
        raise ValueError(f"--{name} must be from 2 to 8 bits; got {text!r}")
    return sorted(found)


def bit_choice(
    bits: int | None,
    average: float | None,
    bytes: str | None,
    bops: str | None,
    file: Path | None,
    *,
    rise: float | None,
    activations: Sequence[int],
    target: str,
) -> dict[str, Any]:
    """How bits are to be chosen: the same for all (8 where nothing else is asked), those of a file, or the best within budgets.

    Raises:
        ValueError: if two ways are asked for, or one is out of range.
    """
    budgets = {"average": average, "bytes": bytes, "bops": bops, "rise": rise}
    asked = [f"--{k}" for k, v in {"bits": bits, "bits-file": file}.items() if v is not None]
    asked += [" ".join(f"--{k}" for k, v in budgets.items() if v is not None)] if any(v is not None for v in budgets.values()) else []
    if len(asked) > 1:
        raise ValueError(f"bits are asked for in more than one way ({', '.join(asked)}); give one: the same for all, a file, or budgets")
    widths = sorted({*activations})
    if not widths or not 2 <= widths[0] <= widths[-1] <= 8:
        raise ValueError(f"--activations must be from 2 to 8 bits; got {', '.join(map(str, widths)) or 'none'}")
    if len(widths) > 1 and bops is None:
        raise ValueError(f"--activations {' '.join(map(str, widths))} leaves a choice, which only --bops limits; give that, or one number")
    if average is not None and not 2 <= average <= 32:
        raise ValueError(f"--average must be from 2 to 8 bits (more only where layers stay in float); got {average:g}")
    if rise is not None and not 0 < rise < float("inf"):
        raise ValueError(f"--rise is a rise of the loss above 0, such as 0.01; got {rise:g}")
    return {
        "bits": bits if asked else 8,
        "average": average,
        "bytes": None if bytes is None else _limit("bytes", bytes),
        "bops": None if bops is None else _limit("bops", bops),
        "rise": rise,
        "given": None if file is None else _text_of(file),
        "activations": widths,
        "target": target,
    }


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--bits-file {file} cannot be read: {error}; give the bits.json of another run") from None


def _latency(text: str) -> float | str:
    """A share, or the text of an absolute limit, such as ``0.8ms``."""
    share = text.strip().endswith("%")
    try:
        if text.strip().endswith("ms"):
            milliseconds(text.strip())
            return text.strip()
        value = float(text.strip().removesuffix("%")) / (100 if share else 1)
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise ValueError(f"--latency must be a share above 0 and up to 1 (0.6 or 60%), or a time such as 0.8ms; got {text!r}")
    return value


def _limit(name: str, text: str) -> float | int:
    share = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if share else 1)
    except ValueError:
        value = float("nan")
    if 0 < value <= 1:
        return value
    if not share and 1 < value < float("inf") and value == int(value):
        return int(value)
    raise ValueError(f"--{name} must be a share above 0 and up to 1 (0.5 or 50%), or a whole number above 1; got {text!r}")


def method_of(given: str | None, *, repaired: bool, weighed: Sequence[str] = ()) -> str:
    """The score that is asked for, else the price of a channel as later stages leave it: the one after repair where there is one.

    Beside prices of bits, which have no repair in them, it is the price before.

    Args:
        weighed: the options that need scores in units of the loss.

    Raises:
        ValueError: if the scores that are asked for only rank channels, and more is needed.
    """
    if weighed and given in RANKING:
        units = ", ".join(m for m in METHODS if m not in RANKING)
        raise ValueError(
            f"--method {given} only ranks channels, and {' and '.join(weighed)} weighs them in units of the loss: leave out --method, "
            f"or choose one of {units}"
        )
    return given or ("reconstruction" if repaired else "mask_curvature")


def tuning(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the fine-tune: those given (not ``None``), else the recipe's own, else the usual ones.

    Raises:
        ValueError: if one is unknown, of a wrong type or out of range.
    """
    if unknown := set(recipe.recovery) - set(FIT):
        raise ValueError(f"{recipe.name}: RECOVERY has unknown settings {', '.join(map(repr, unknown))}; allowed are {', '.join(FIT)}")
    own = {k: v for k, v in given.items() if v is not None}
    chosen = {**FIT, **recipe.recovery, **own}
    if chosen["schedule"] != "step" and "milestones" not in own:
        chosen["milestones"] = []  # the recipe's belong to the recipe's schedule
    for name, value in chosen.items():
        kind = (int, float) if isinstance(FIT[name], float) else (list, tuple) if name == "milestones" else type(FIT[name])
        if not isinstance(value, kind):
            raise ValueError(f"{recipe.name}: RECOVERY[{name!r}] must be like {FIT[name]!r}; got {value!r}")
    try:
        _try(descent({**chosen, "seed": 0}))
    except ValueError as error:
        raise ValueError(f"the fine-tune cannot be done so: {error}; change the option, or RECOVERY in {recipe.name}") from error
    return {**chosen, "milestones": list(chosen["milestones"])}


def quantized_tuning(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of training a quantized model, as :func:`tuning` has those of the fine-tune; it raises as that does."""
    return tuning(recipe, {**gently(tuning(recipe, {})), **{k: v for k, v in given.items() if v is not None}})


def gently(usual: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that training a quantized model has of its own, beside a fine-tune with these."""
    return {**QAT, "lr": min(QAT["lr"], usual["lr"])}


def descent(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the fine-tune as :func:`curvepress.fit` takes them."""
    same = ("epochs", "lr", "optimizer", "schedule", "weight_decay", "precision", "seed")
    given = {**{k: settings[k] for k in same}, "milestones": tuple(settings["milestones"])}
    return {**given, "distill_weight": settings["distill"]} if settings["distill"] else given


def _try(given: Mapping[str, Any]) -> None:
    """Have the settings checked by the one who knows, on a model of one weight and without a step."""
    if given["epochs"] < 0:
        raise ValueError(f"epochs must be 0 or more; got {given['epochs']}")
    with torch.random.fork_rng(devices=[]):
        fit(nn.Linear(1, 1), nn.MSELoss(), lambda seed: [], **{**given, "epochs": 0})


def timing(latency: str | None, runtime: str, batch: int, threads: int) -> dict[str, Any]:
    """The settings of a latency budget; none where there is none.

    Raises:
        ValueError: if the runtime is unknown or not installed.
    """
    if latency is None:
        return {}
    machine(runtime, threads, batch)
    return {"runtime": runtime, "batch": batch, "threads": threads}
