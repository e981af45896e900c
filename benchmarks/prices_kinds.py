"""Bits, activations and ranks for :mod:`benchmarks.prices`: prices of each decision, and the rises of the loss by it.

All but the decision stays in float and as it is.  ``relative error`` is the baseline without curvature: the squared error of a weight over
its squared norm.  Implants have the values that ``fit_implants`` gives them, and prices of other examples; ``after`` has batch statistics
read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.implants import ranked
from benchmarks.prices_networks import BATCHES, WARM, Setting, digits, once, rows, timed
from curvepress.bitplan import READ
from curvepress.curvature import Stop
from curvepress.implants import RankPrice
from curvepress.objective import Batch
from curvepress.plan import Plan
from curvepress.quantization.allocation import SUM, allocate
from curvepress.quantization.bitwidths import EXAMPLES, BitPrices, Price, bit_prices
from curvepress.quantization.quantized import Bits, layout, observe, quantize, switch, weight_scheme
from curvepress.quantization.quantized.modules import quantizers
from curvepress.quantization.quantizer import Grid, Histogram, Scheme, fake_quantize, fit_grid
from curvepress.repairing.refitting import implant_prices, moments
from curvepress.scores import joint_rise
from curvepress.surgery.truncation import Truncation
from curvepress.training.batchnorm import reestimate

PRICES: dict[str, dict[str, Any]] = {
    "trace": {"price": "trace"},
    "trace, T=4": {"price": "trace", "temperature": WARM},
    "direction": {"price": "direction"},
    "direction, T=4": {"price": "direction", "temperature": WARM},
}
BASELINE = "relative error"
ORDERS = (BASELINE, "trace", "direction, T=4")
WIDTHS, TRIED = (2, 3, 4, 5, 6, 8), (2, 3, 4, 6)
"""Bits that have prices, and those that single decisions are drawn from."""
AVERAGES, UNIFORM = (5.0, 4.0, 3.0), (8, 6, 5, 4)
"""Mean bits of a weight in plans of bits, and bits of what products read in plans of activations."""
Levels = Mapping[str, Mapping[int, float]]
"""Predicted rise by name and by number of bits or rank."""
Choice = Mapping[str, int]
"""Bits or rank by name."""


def known(setting: Setting, kind: str, price: str, made: Callable[[], tuple[Levels, float]]) -> Levels:
    """Prices from the records, or made now."""

    def priced() -> records.Record:
        values, spent = made()
        return {"values": {n: {str(k): digits(p) for k, p in own.items()} for n, own in values.items()}, "cpu_seconds": spent}

    return levels(once(setting, {"what": "prices", "kind": kind, "price": price}, priced))


def levels(r: records.Record) -> Levels:
    """The prices in a record."""
    return {n: {int(k): p for k, p in own.items()} for n, own in r["values"].items()}


def relative(errors: Mapping[int, Tensor], weight: Tensor) -> dict[int, float]:
    """Squared errors over the squared norm."""
    return {k: float(e.square().sum() / weight.square().sum()) for k, e in errors.items()}


def singles(setting: Setting, kind: str, prices: Levels, rise: Callable[[Choice], float]) -> Iterator[records.Record]:
    """Measured rises by single decisions, drawn from those that have prices."""
    units = [(n, k) for n, own in prices.items() for k in own if kind == "ranks" or k in TRIED]
    for i in np.random.default_rng(0).permutation(len(units))[: setting.network.singles]:
        name, level = units[i]
        key = {"what": "single", "kind": kind, "name": name, "level": level}
        yield once(setting, key, lambda n=name, k=level: {"before": rise({n: k})})


def joint(setting: Setting, model: nn.Module, moves: Mapping[str, Tensor], batches: list[Batch]) -> dict[str, float]:
    """What the whole displacement of weights is predicted to cost."""
    found = joint_rise(model, setting.loss, batches[: BATCHES // 2], Plan(setting.structure), moves=moves)
    return {"joint": found[0], "joint_stderr": found[1]}


class Rounded:
    """Bits of weights and of activations."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.module = quantize(setting.model, Bits(product=7, sum=SUM), setting.example, learn=False).eval()
        self.weights = {w.name: w for w in layout(self.module).weights}
        self.values = {n: p.detach() for n, p in self.module.named_parameters() if n in self.weights}
        self.quantizers = {q.name: q for q in quantizers(self.module)}
        switch(self.module, False)
        self.base = setting.mean_loss(self.module)
        self.priced = cache(self._priced)

    @cached_property
    def seen(self) -> dict[str, Histogram]:
        """What activations are."""
        return observe(self.module, self.setting.calibration, examples=EXAMPLES)

    def _priced(self, name: str) -> tuple[BitPrices, float]:
        s, how = self.setting, {"widths": WIDTHS, "stop": Stop(samples=BATCHES), **PRICES[name]}
        return timed(lambda: bit_prices(s.model, s.loss, s.calibration, s.example, **how))

    def prices(self, name: str) -> Levels:
        """Of weights."""
        if name == BASELINE:
            return known(self.setting, "bits", name, lambda: timed(self._relative))
        return known(self.setting, "bits", name, lambda: (_rises(self.priced(name)[0].weights), self.priced(name)[1]))

    def _relative(self) -> Levels:
        return {n: relative({b: self.error(n, b) for b in WIDTHS}, w) for n, w in self.values.items()}

    def site_prices(self, name: str) -> Levels:
        """Of activations, which have a trace only; it comes with any price of weights."""
        return known(self.setting, "activations", name, lambda: (_rises(self.priced(name)[0].sites), self.priced(name)[1]))

    def grid(self, name: str, bits: int) -> Grid:
        """Of a weight or an activation."""
        if name in self.weights:
            return fit_grid(self.values[name], weight_scheme(bits, self.weights[name].axis), name=name)
        return fit_grid(self.seen[name], Scheme(bits, symmetric=False), name=name)

    def error(self, name: str, bits: int) -> Tensor:
        """What rounding changes in a weight."""
        return fake_quantize(self.values[name], self.grid(name, bits)) - self.values[name]

    def rise(self, choice: Choice) -> float:
        """The measured rise with so many bits and the rest in float."""
        try:
            for name, bits in choice.items():
                self.quantizers[name].grid, self.quantizers[name].on = self.grid(name, bits), True
            return self.setting.mean_loss(self.module) - self.base
        finally:
            switch(self.module, False)

    def plan(self, order: str, average: float) -> records.Record:
        """The weights' bits of least price for so many on average."""
        prices = {n: {b: Price(p, 0.0) for b, p in own.items()} for n, own in self.prices(order).items()}
        chosen = allocate(BitPrices(layout(self.module), prices, {}), average=average).bits
        choice = {n: b for n, b in chosen.weights.items() if b is not None}
        moves = {n: self.error(n, b) for n, b in choice.items()}
        return {"choice": choice, "before": self.rise(choice), **joint(self.setting, self.module, moves, self.setting.calibration)}

    def activations(self, bits: int) -> records.Record:
        """All that products read has so many bits, and what only sums read those of sums."""
        roles = {s.name: bits if s.role == "product" else SUM for s in layout(self.module).sites if s.name in self.seen}
        choice = {n: b for n, b in roles.items() if not (n.endswith(READ) and b >= SUM)}
        return {"choice": choice, "before": self.rise(choice)}

    def work(self) -> Iterator[Any]:
        """Everything, plans before single decisions."""
        s = self.setting
        for name in (BASELINE, *PRICES):
            yield self.prices(name)
            if PRICES.get(name, {}).get("price") == "trace":
                yield self.site_prices(name)
        for average in AVERAGES:
            for order in ORDERS:
                key = {"what": "plan", "kind": "bits", "order": order, "share": average}
                yield once(s, key, lambda o=order, a=average: self.plan(o, a))
        for bits in UNIFORM:
            key = {"what": "plan", "kind": "activations", "order": "uniform", "share": bits}
            yield once(s, key, lambda b=bits: self.activations(b))
        yield from singles(s, "bits", self.prices(BASELINE), self.rise)
        yield from singles(s, "activations", self.site_prices("trace"), self.rise)


def _rises(prices: Mapping[str, Mapping[int, Price]]) -> Levels:
    return {n: {b: p.rise for b, p in own.items()} for n, own in prices.items()}


class Ranks:
    """Ranks of low-rank implants."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.weights = {n: p.detach() for n, p in setting.model.named_parameters()}

    def prices(self, name: str) -> Levels:
        """Of every rank that saves parameters."""
        if name == BASELINE:
            return known(self.setting, "ranks", name, lambda: timed(self._relative))
        return known(self.setting, "ranks", name, lambda: timed(lambda: self._priced(**PRICES[name])))

    def _relative(self) -> Levels:
        return {n: relative({r: self.residual(n, r) for r in own}, self.weights[n]) for n, own in self.prices("trace").items()}

    def _priced(self, **how: Any) -> Levels:
        s = self.setting
        found = implant_prices(s.model, s.loss, s.calibration, s.structure, held_out=s.others, stop=Stop(samples=BATCHES), **how)
        return {n: {r: p.rise for r, p in own.items()} for n, own in found.items()}

    @cached_property
    def truncations(self) -> dict[str, Truncation]:
        """All ranks of all weights."""
        s, names = self.setting, list(self.prices("trace"))
        found = moments(s.model, s.calibration, names, loss=s.loss)
        return {n: Truncation(self.weights[n].flatten(1), m.gram, m.curvature) for n, m in found.items()}

    def residual(self, name: str, rank: int) -> Tensor:
        """What the truncation changes in a weight."""
        return self.truncations[name].residual(rank).to(self.weights[name]).view_as(self.weights[name])

    def moved(self, moves: Mapping[str, Tensor]) -> nn.Module:
        """The model with its weights displaced."""
        model = deepcopy(self.setting.model)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, change in moves.items():
                own[name] += change
        return model

    def rise(self, choice: Choice) -> float:
        """The measured rise with these ranks."""
        return self.setting.rise(self.moved({n: self.residual(n, r) for n, r in choice.items()}))

    def plan(self, order: str, share: float) -> records.Record:
        """The ranks of least price for so many of the parameters."""
        s = self.setting
        prices = {n: {r: RankPrice(p, 0.0, 0, 0) for r, p in own.items()} for n, own in self.prices(order).items()}
        choice = {n: i.rank for n, i in ranked(share, Plan(s.structure), prices).implants.items()}
        moves = {n: self.residual(n, r) for n, r in choice.items()}
        model = self.moved(moves)
        rises = {"before": s.rise(model), "after": s.rise(reestimate(model, s.calibration, examples=1024))}
        return {"choice": choice, **rises, **joint(s, s.model, moves, s.others)}

    def work(self) -> Iterator[Any]:
        """Everything, plans before single decisions."""
        for name in (*PRICES, BASELINE):
            yield self.prices(name)
        for share in self.setting.network.ranked:
            for order in ORDERS:
                key = {"what": "plan", "kind": "ranks", "order": order, "share": share}
                yield once(self.setting, key, lambda o=order, k=share: self.plan(o, k))
        yield from singles(self.setting, "ranks", self.prices("trace"), self.rise)


def pairs(network: str, kind: str, what: str, when: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predicted and measured rises by price; ``what`` is ``single`` or ``plan``, ``when`` ``before`` or ``after`` statistics are read."""
    found = [r for r in rows(network, what, kind) if when in r]
    truth = np.array([r[when] for r in found])
    chosen = [r["choice"] if what == "plan" else {r["name"]: r["level"]} for r in found]
    prices = {r["price"]: levels(r) for r in rows(network, "prices", kind)}
    sums = {p: (np.array([sum(own[n][k] for n, k in c.items()) for c in chosen]), truth) for p, own in prices.items()}
    whole = all("joint" in r for r in found) and what == "plan" and bool(found)
    return sums | ({"joint_rise": (np.array([r["joint"] for r in found]), truth)} if whole else {})
