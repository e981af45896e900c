"""Channels for :mod:`benchmarks.prices`: their prices, and the rises of the loss without them, before and after repair."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from benchmarks import records
from benchmarks.prices_networks import BATCHES, NETWORKS, WARM, Setting, digits, once, rows, timed
from benchmarks.refit import grams, refitted
from curvepress.plan import Plan, lost
from curvepress.planner.channels import at_most, search
from curvepress.scores import Scores, joint_rise, predicted_rise, score
from curvepress.scores.grams import Gram
from curvepress.tracing.watching import trace
from curvepress.training.batchnorm import reestimate

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
ORDERS = ("magnitude", "mask_curvature, T=4", "reconstruction, T=4")


class Channels:
    """Prices and rises of channels of a network."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.structure = setting, setting.structure

    @cached_property
    def grams(self) -> dict[str, Gram]:
        """What the weights are multiplied with."""
        return grams(self.setting.model, self.setting.calibration, BATCHES)

    def scores(self, name: str) -> Scores:
        """The prices of this name, from the records or made now."""
        return scores_of(once(self.setting, {"what": "scores", "price": name}, lambda: self._scored(name)))

    def _scored(self, name: str) -> records.Record:
        s = self.setting
        found, spent = timed(lambda: score(s.model, s.loss, s.calibration, s.structure, samples=BATCHES, **PRICES[name]))
        return {"values": _listed(found.values), "stderr": _listed(found.stderr), "unit": found.unit, "cpu_seconds": spent}

    def single(self, group: str, channel: int) -> dict[str, float]:
        """Measured rises without one channel."""
        return self._rises(Plan(self.structure, {group: tuple(c for c in range(self.structure[group].size) if c != channel)}))

    def _rises(self, plan: Plan) -> dict[str, float]:
        s = self.setting
        return {"before": s.rise(refitted(s.model, plan, {})), "after": s.rise(refitted(s.model, plan, self.grams))}

    def plan(self, order: str, share: float) -> dict[str, float]:
        """Measured and jointly predicted rises of the plan that an order gives for a share of the parameters."""
        s, plan = self.setting, search(self.structure, self.scores(order), at_most(params=share), per="channel")
        new = refitted(s.model, plan, self.grams)
        rises = {"before": s.rise(refitted(s.model, plan, {})), "after": s.rise(reestimate(new, s.calibration, examples=1024))}
        joint = joint_rise(s.model, s.loss, s.calibration[: BATCHES // 2], plan)
        again = joint_rise(s.model, s.loss, s.calibration[: BATCHES // 2], plan, moves=_moves(s.model, new))
        return rises | {"joint": joint[0], "joint_stderr": joint[1], "joint_after": again[0], "joint_after_stderr": again[1]}

    def work(self) -> Iterator[records.Record | Scores]:
        """Everything, plans before single channels."""
        network = self.setting.network
        for name in PRICES:
            yield self.scores(name)
        for share in network.shares:
            for order in ORDERS:
                key = {"what": "plan", "order": order, "share": share}
                yield once(self.setting, key, lambda o=order, k=share: self.plan(o, k))
        units = [(g.name, c) for g in self.structure.free for c in range(g.size)]
        chosen = np.random.default_rng(0).permutation(len(units))[: network.singles]
        for group, channel in (units[i] for i in chosen):
            key = {"what": "single", "group": group, "channel": channel}
            yield once(self.setting, key, lambda g=group, c=channel: self.single(g, c))


def _moves(old: nn.Module, new: nn.Module) -> dict[str, Any]:
    moved = {n: p.detach() - q.detach() for (n, p), q in zip(new.named_parameters(), old.parameters(), strict=True) if p.dim() > 1}
    return {n: d for n, d in moved.items() if bool(d.any())}


def _listed(values: Any) -> dict[str, list[float]]:
    return {g: [digits(x) for x in v] for g, v in values.items()}


def scores_of(r: records.Record) -> Scores:
    """The scores in a record."""
    arrays = ({g: np.array(v) for g, v in r[k].items()} for k in ("values", "stderr"))
    return Scores(*arrays, r["price"], r["unit"], BATCHES, 0)


def pairs(network: str, what: str, when: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predicted and measured rises by price; ``what`` is ``single`` or ``plan``, ``when`` ``before`` or ``after`` repair."""
    found, prices = rows(network, what, "channels"), {r["price"]: r for r in rows(network, "scores", "channels")}
    truth = np.array([r[when] for r in found])
    if what == "single":
        return {n: (np.array([p["values"][r["group"]][r["channel"]] for r in found]), truth) for n, p in prices.items()}
    of = NETWORKS[network]
    structure = trace(of.recipe.model(trained=False, **of.options), of.recipe.example())
    made = {n: scores_of(p) for n, p in prices.items()}
    plans = [search(structure, made[r["order"]], at_most(params=r["share"]), per="channel") for r in found]
    gone = [{g.name: lost(p, g) for g in structure.free} for p in plans]
    sums = {n: (np.array([predicted_rise(s, g)[0] for g in gone]), truth) for n, s in made.items()}
    joint = "joint" if when == "before" else "joint_after"
    return sums | {"joint_rise": (np.array([r[joint] for r in found]), truth)}
