"""Do prices predict?  Predicted against measured rise of the loss, of single channels and of whole plans.

    python -m benchmarks.prices measure --network ResNet-20 --seconds 300     # goes on where it stopped
    python -m benchmarks.prices table                                         # prints the tables of docs/prices.md
    python -m benchmarks.prices plot docs/prices.png

Prices are of calibration examples, rises of validation examples.  ``before`` repair the readings of what goes are zero and nothing else
changes; ``after`` repair all that reads it is refitted by least squares, each weight by itself.
Needs the data and the weights of the recipes ``cifar10``, ``imagenette`` and ``sst2`` (``CURVEPRESS_DATA``, ``CURVEPRESS_CACHE``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import records
from benchmarks.refit import grams, refitted
from curvepress.curvature import spearman
from curvepress.objective import batch_loss, batch_size
from curvepress.plan import Plan, lost
from curvepress.planner.channels import at_most, search
from curvepress.scores import LOSS_UNIT, Scores, joint_rise, predicted_rise, score
from curvepress.structure import Structure
from curvepress.tracing.watching import trace
from curvepress.training.batchnorm import reestimate
from curvepress_recipes import cifar10, imagenette, sst2

FILE = Path(__file__).parent / "results" / "prices.jsonl"
WARM = 4.0
PRICES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "taylor": {"method": "taylor"},
    "hessian_trace": {"method": "hessian_trace"},
    "diagonal": {"method": "diagonal"},
    "mask_curvature": {"method": "mask_curvature"},
    "mask_curvature, T=4": {"method": "mask_curvature", "temperature": WARM},
    "second_order": {"method": "second_order"},
    "reconstruction": {"method": "reconstruction"},
    "reconstruction, T=4": {"method": "reconstruction", "temperature": WARM},
}
BATCHES = 8
SHARES = (0.9, 0.7, 0.5)
ORDERS = ("magnitude", "mask_curvature, T=4", "reconstruction, T=4")


@dataclass(frozen=True)
class Network:
    """A recipe and its options, how many examples rises are of, and how many single channels and which plans are measured."""

    recipe: ModuleType
    examples: int
    singles: int
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 128
    shares: tuple[float, ...] = SHARES
    every: int = 1
    """One in so many validation batches is taken, where they come in an order."""


NETWORKS = {
    "ResNet-20": Network(cifar10, 256, 60, {"depth": 20}),
    "ResNet-56": Network(cifar10, 256, 32, {"depth": 56}),
    "EfficientNet-Lite0": Network(imagenette, 96, 16, batch=32, shares=()),
    "MiniLM": Network(sst2, 512, 32, batch=64, shares=(), every=4),
}


class Setting:
    """A network with its structure, calibration and validation examples, and what has been measured of it."""

    def __init__(self, name: str) -> None:
        self.name, self.network = name, NETWORKS[name]
        of, size = self.network.recipe, self.network.batch
        self.loss, self.model = of.loss, of.model(**self.network.options)
        self.structure: Structure = trace(self.model, of.example())
        self.calibration = list(islice(of.batches("calibration", batch_size=size), BATCHES))
        seen = islice(of.batches("validation", batch_size=size), None, None, self.network.every)
        self.validation = list(islice(seen, self.network.examples // size))
        self.base = self.rise(self.model)
        self.grams = grams(self.model, self.calibration, BATCHES)

    def scores(self, name: str) -> Scores:
        """The prices of this name, from the records or made now."""
        r = records.once(FILE, {"network": self.name, "what": "scores", "price": name}, lambda: self._scored(name))
        values = {g: np.array(v) for g, v in r["values"].items()}
        return Scores(values, {g: np.array(v) for g, v in r["stderr"].items()}, name, r["unit"], BATCHES, 0)

    def _scored(self, name: str) -> dict[str, Any]:
        start = time.process_time()
        found = score(self.model, self.loss, self.calibration, self.structure, samples=BATCHES, **PRICES[name])
        spent = {"cpu_seconds": time.process_time() - start}
        return {"values": _listed(found.values), "stderr": _listed(found.stderr), "unit": found.unit} | spent

    def rise(self, model: nn.Module) -> float:
        """By how much the validation loss of ``model`` exceeds that of the original."""
        with torch.no_grad():
            losses = [(batch_loss(model, self.loss, b).item(), batch_size(b)) for b in self.validation]
        return sum(x * n for x, n in losses) / sum(n for _, n in losses) - getattr(self, "base", 0.0)

    def single(self, group: str, channel: int) -> dict[str, float]:
        """Measured rises without one channel."""
        plan = Plan(self.structure, {group: tuple(c for c in range(self.structure[group].size) if c != channel)})
        return {"before": self.rise(unread(self.model, plan)), "after": self.rise(refitted(self.model, plan, self.grams))}

    def plan(self, order: str, share: float) -> dict[str, float]:
        """Measured and jointly predicted rises of the plan that an order gives for a share of the parameters."""
        plan = self.chosen(order, share)
        new = refitted(self.model, plan, self.grams)
        moves = {
            n: p.detach() - q.detach() for (n, p), q in zip(new.named_parameters(), self.model.parameters(), strict=True) if p.dim() > 1
        }
        rises = {"before": self.rise(unread(self.model, plan)), "after": self.rise(reestimate(new, self.calibration, examples=1024))}
        joint = joint_rise(self.model, self.loss, self.calibration[: BATCHES // 2], plan)
        again = joint_rise(self.model, self.loss, self.calibration[: BATCHES // 2], plan, moves=moves)
        return rises | {"joint": joint[0], "joint_stderr": joint[1], "joint_after": again[0], "joint_after_stderr": again[1]}

    def chosen(self, order: str, share: float) -> Plan:
        """The plan that prices of this name give for a share of the parameters."""
        return search(self.structure, self.scores(order), at_most(params=share), per="channel")


def unread(model: nn.Module, plan: Plan) -> nn.Module:
    """The model that reads zero where the plan removes channels, and is the same otherwise."""
    return refitted(model, plan, {}, zero=True)


def _listed(values: Any) -> dict[str, list[float]]:
    return {g: [float(f"{x:.6g}") for x in v] for g, v in values.items()}


def _work(s: Setting) -> Iterator[Any]:
    for name in PRICES:
        yield s.scores(name)
    for share in s.network.shares:
        for order in ORDERS:
            key = {"network": s.name, "what": "plan", "order": order, "share": share}
            yield records.once(FILE, key, lambda o=order, k=share: s.plan(o, k))
    units = [(g.name, c) for g in s.structure.free for c in range(g.size)]
    chosen = np.random.default_rng(0).permutation(len(units))[: s.network.singles]
    for group, channel in (units[i] for i in chosen):
        key = {"network": s.name, "what": "single", "group": group, "channel": channel}
        yield records.once(FILE, key, lambda g=group, c=channel: s.single(g, c))


def measure(name: str, seconds: float) -> None:
    """Measure whatever has no record yet, for about so many processor seconds."""
    start = time.process_time()
    for _ in _work(Setting(name)):
        if time.process_time() - start > seconds:
            print("stopped at the limit of time; the same command goes on")
            break


def pairs(name: str, what: str, when: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predicted and measured rises by price."""
    rows = [r for r in records.read(FILE) if r["network"] == name]
    found = [r for r in rows if r["what"] == what]
    prices = {r["price"]: r for r in rows if r["what"] == "scores"}
    truth = np.array([r[when] for r in found])
    if what == "single":
        return {n: (np.array([p["values"][r["group"]][r["channel"]] for r in found]), truth) for n, p in prices.items()}
    of = NETWORKS[name]
    structure = trace(of.recipe.model(trained=False, **of.options), of.recipe.example())
    made = {n: _scores(p) for n, p in prices.items()}
    plans = [search(structure, made[r["order"]], at_most(params=r["share"]), per="channel") for r in found]
    gone = [{g.name: lost(p, g) for g in structure.free} for p in plans]
    sums = {n: (np.array([predicted_rise(s, g)[0] for g in gone]), truth) for n, s in made.items()}
    joint = "joint" if when == "before" else "joint_after"
    return sums | {"joint_rise": (np.array([r[joint] for r in found]), truth)}


def _scores(r: records.Record) -> Scores:
    arrays = ({g: np.array(v) for g, v in r[k].items()} for k in ("values", "stderr"))
    return Scores(*arrays, r["price"], r["unit"], BATCHES, 0)


def calibration(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation, the slope of log predicted over log measured, and the median of predicted over measured.

    The last two are over the rises and predictions that are positive.
    """
    both = (predicted > 0) & (truth > 0)
    x, y = np.log(truth[both]), np.log(predicted[both])
    return spearman(predicted, truth), float(np.polyfit(x, y, 1)[0]), float(np.exp(np.median(y - x)))


def table() -> None:
    """Print the tables in Markdown."""
    rows = records.read(FILE)
    for name in NETWORKS:
        for what in ("single", "plan"):
            count = sum(r["network"] == name and r["what"] == what for r in rows)
            if count > 2:
                print(f"\n**{name}, {count} {'single channels' if what == 'single' else 'plans'}**\n")
                _print(name, what, {r["price"]: r for r in rows if r["network"] == name and r["what"] == "scores"})


def _print(network: str, what: str, prices: dict[str, records.Record]) -> None:
    print("| price | CPU s | before repair: rank correlation | slope | predicted / measured | after: rank correlation | slope | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    found = [pairs(network, what, when) for when in ("before", "after")]
    for name in found[0]:
        cells = []
        for both in found:
            rank, slope, ratio = calibration(*both[name])
            loss = name not in prices or prices[name]["unit"] == LOSS_UNIT
            cells += [f"{rank:.2f}", f"{slope:.2f}" if loss else "–", f"{ratio:.2g}" if loss else "–"]
        spent = f"{prices[name]['cpu_seconds']:.0f}" if name in prices else "–"
        print(" | ".join([f"| {name}", spent, *cells]) + " |")


def plot(path: Path) -> None:
    """Draw predicted over measured rises of single channels and of plans."""
    import matplotlib.pyplot as plt

    drawable = [n for n in NETWORKS if any((r["network"], r["what"]) == (n, "plan") for r in records.read(FILE))]
    figure, axes = plt.subplots(len(drawable), 2, figsize=(10, 4.5 * len(drawable)), squeeze=False)
    drawn = {"before": ("mask_curvature", "mask_curvature, T=4", "joint_rise"), "after": ("reconstruction", "reconstruction, T=4")}
    for row, network in zip(axes, drawable, strict=True):
        for axis, what in zip(row, ("single", "plan"), strict=True):
            for when, names in drawn.items():
                found = pairs(network, what, when)
                for name in (n for n in names if n in found):
                    predicted, truth = found[name]
                    axis.loglog(truth, predicted, ".", label=f"{name} ({when} repair)", alpha=0.6)
            axis.axline((1e-2, 1e-2), (1, 1), color="grey", linewidth=0.8)
            axis.set(xlabel="measured rise of the loss", ylabel="predicted", title=f"{network}, {what}s")
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "table", "plot"))
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/prices.png"))
    parser.add_argument("--network", choices=NETWORKS, default="ResNet-20")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "measure":
        measure(options.network, options.seconds)
    elif options.what == "table":
        table()
    else:
        plot(options.path)


if __name__ == "__main__":
    main()
