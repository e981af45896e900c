"""What every number of bits costs: prices of weights and of activations from the curvature, in the unit of the loss.

A tensor rounded to few bits moves by ``d = Q(x) - x``, and the loss is predicted to rise by half the curvature along it.  HAWQ-V2 (Dong
et al., NeurIPS 2020, arXiv:1911.03852, sections 3.1 and 3.4) takes the mean of the curvature over all directions:
``tr(C) / n * |d|^2 / 2`` for ``n`` elements, for activations per example.  Weights, whose error is known, can be priced along the
error itself: ``d' C d / 2``, in which the coupling of elements counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import curvature
from ..curvature import Activation, Direction, Measure, Stop
from ..objective import Batches, Example, Loss
from .quantized import Bits, Layout, Product, Site, Weight, layout, observe, quantize, switch, weight_scheme
from .quantized.modules import ActivationQuantizer
from .quantizer import Grid, Histogram, Scheme, fit_grid, squared_error
from .requantization import rounding_errors

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
PRICES = ("direction", "trace")
EXAMPLES = 512
FORMAT = {"format": "curvepress prices of bits", "version": 1}


@dataclass(frozen=True)
class Price:
    """Predicted rise of the loss and its standard error."""

    rise: float
    stderr: float


Prices = Mapping[str, Mapping[int, Price]]
"""By name and number of bits."""


@dataclass(frozen=True)
class BitPrices:
    """Prices of every weight and site at every number of bits.

    ``weights[name][bits]`` and ``sites[name][bits]`` are :class:`Price`; a site ``x.read`` is priced by what the products alone that read
    ``x`` make of the error.  What has no price stays in float.  ``traces`` is the mean curvature of an element, of
    those that were priced by it.  ``detail`` says in words how they came about.
    """

    layout: Layout
    weights: Prices
    sites: Prices
    detail: str = ""
    traces: Mapping[str, float] = field(default_factory=dict)


def bit_prices(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    example: Example,
    *,
    widths: Sequence[int] = WIDTHS,
    price: str = "direction",
    in_float: Collection[str] = (),
    asymmetric: bool = False,
    per_tensor: bool = False,
    rounding: str = "nearest",
    estimator: str = "auto",
    probes: int = 1,
    temperature: float = 1.0,
    stop: Stop | None = None,
    seed: int = 0,
    progress: Callable[[curvature.Progress], None] | None = None,
) -> BitPrices:
    """What each weight and each site of activations costs at each of ``widths`` bits, from calibration batches.

    Args:
        batches: gone through twice: for the ranges of activations (:data:`EXAMPLES` examples) and for the curvature.
        probes: random vectors a batch, for estimators that need some.
        price: of weights: ``direction`` or ``trace`` (HAWQ-V2), see the module.  Activations are priced by their trace.
        in_float: names of weights and sites that stay in float and get no price.
        asymmetric: whether weights get zero points, as in :class:`~.quantized.Bits`; ``per_tensor`` too.
        rounding: of weights, whose errors are priced; see :func:`~.requantization.rounding_errors`.
        estimator, temperature, stop, seed, progress: as :func:`~curvepress.curvature.estimate` takes them.

    Raises:
        ValueError: if the price or a name is unknown, or as :func:`~.quantized.quantize`, :func:`~.quantized.observe` and
            :func:`~curvepress.curvature.estimate` do.
    """
    if price not in PRICES:
        raise ValueError(f"price {price!r} is unknown; choose one of {', '.join(PRICES)}")
    probe = _probe(model, example, in_float)
    seen = observe(probe, batches, examples=EXAMPLES)
    switch(probe, False)
    grids = _grids(probe, widths, asymmetric=asymmetric, per_tensor=per_tensor)
    changes = rounding_errors(probe, batches, {n: list(g.values()) for n, g in grids.items()}, method=rounding)
    errors = {name: dict(zip(grids[name], found, strict=True)) for name, found in changes.items()}
    modules = _watched(probe)
    measures: dict[str, Measure] = {path: Activation(path) for paths in modules.values() for path in paths}
    for name, by_bits in errors.items():
        measures |= _measures(name, by_bits, price)
    found = curvature.estimate(
        probe, loss, batches, measures, estimator=estimator, probes=probes, temperature=temperature, seed=seed, stop=stop, progress=progress
    )
    if found.samples < 2:
        raise ValueError(
            f"prices need an error bar and that two batches of calibration data at least, got {found.samples}; allow more examples, or "
            "make the batches smaller"
        )
    of_weight = partial(_weight_prices, found, price)
    weights = {name: of_weight(name, by_bits) for name, by_bits in errors.items()}
    sites = {name: _site_prices(found, paths, seen[name], widths, name) for name, paths in modules.items()}
    return BitPrices(what := layout(probe), weights, sites, str(found), _traces(found, what, modules, price))


def _traces(found: curvature.Curvature, what: Layout, modules: Mapping[str, Sequence[str]], price: str) -> dict[str, float]:
    """The mean of the diagonal of the curvature over the elements of every site, and of every weight that is priced by it."""
    sizes = {w.name: w.size for w in what.weights} | {s.name: s.size for s in what.sites}
    own = {w.name: [f"weight {w.name}"] for w in what.weights} if price == "trace" else {}
    measures = {**own, **modules}
    return {n: sum(float(found.mean[m][0]) for m in ms) / sizes[n] for n, ms in measures.items() if all(m in found.mean for m in ms)}


def _probe(model: nn.Module, example: Example, in_float: Collection[str]) -> fx.GraphModule:
    """The model with a quantizer at every site, those of reads too, which products of fewer bits than sums have."""
    bits = Bits(product=7, sum=8)
    if in_float:
        bits = left_in_float(bits, layout_of(model, example), in_float)
    return quantize(model, bits, example, learn=False).eval()


def layout_of(model: nn.Module, example: Example) -> Layout:
    """All that can be quantized in a model."""
    return layout(quantize(model, Bits(weight=None, product=None, sum=None), example, learn=False))


def left_in_float(bits: Bits, what: Layout, names: Collection[str]) -> Bits:
    """The bits without those of some weights and sites.

    Raises:
        ValueError: if the model has no such weight or site.
    """
    weights, sites = {w.name for w in what.weights}, {s.name for s in what.sites}
    if unknown := sorted(set(names) - weights - sites):
        raise ValueError(f"{', '.join(map(repr, unknown))} cannot stay in float: the model has {', '.join(sorted(weights | sites))}")
    return Bits(
        {**bits.weights, **dict.fromkeys(sorted(weights & set(names)))},
        {**bits.sites, **dict.fromkeys(sorted(sites & set(names)))},
        bits.weight, bits.product, bits.sum, bits.group, bits.dynamic, bits.asymmetric, bits.per_tensor,
    )  # fmt: skip


def _watched(probe: fx.GraphModule) -> dict[str, list[str]]:
    """By site, the paths of modules that are run once and whose results nothing else holds, so that each has a gradient of its own."""
    found: dict[str, list[str]] = {}
    for node in list(probe.graph.find_nodes(op="call_module")):
        quantizer = probe.get_submodule(str(node.target))
        if isinstance(quantizer, ActivationQuantizer):
            paths = found.setdefault(quantizer.name, [])
            with probe.graph.inserting_before(node):
                node.args = (probe.graph.call_function(torch.ops.aten.alias.default, (node.args[0],)),)
            if paths:
                node.target = f"{node.target}:{len(paths)}"
                probe.add_submodule(node.target, nn.Identity())
            paths.append(str(node.target))
    probe.recompile()
    return found


def _grids(probe: fx.GraphModule, widths: Sequence[int], *, asymmetric: bool, per_tensor: bool) -> dict[str, dict[int, Grid]]:
    """The grid that every weight would have at each number of bits."""
    found: dict[str, dict[int, Grid]] = {}
    own, bits = dict(probe.named_parameters()), probe.meta["bits"]
    for weight in layout(probe).weights:
        if bits.of_weight(weight.name) is not None:
            schemes = {b: weight_scheme(b, None if per_tensor else weight.axis, asymmetric=asymmetric) for b in widths}
            found[weight.name] = {b: fit_grid(own[weight.name].detach(), scheme, name=weight.name) for b, scheme in schemes.items()}
    return found


def _measures(name: str, errors: Mapping[int, Tensor], price: str) -> dict[str, Measure]:
    whole = curvature.layer(name)
    if price == "trace":
        return {f"weight {name}": whole}
    return {f"weight {name} {b}": Direction(whole.parts, 1, {name: e}) for b, e in errors.items()}


def _weight_prices(found: curvature.Curvature, price: str, name: str, errors: Mapping[int, Tensor]) -> dict[int, Price]:
    if price == "trace":
        return {b: _price(found, [f"weight {name}"], float(e.double().square().mean()) / 2) for b, e in errors.items()}
    return {b: _price(found, [f"weight {name} {b}"], 0.5) for b in errors}


def _site_prices(found: curvature.Curvature, paths: Sequence[str], seen: Histogram, widths: Sequence[int], name: str) -> dict[int, Price]:
    """A trace per example is the sum over its elements, so it goes with half the mean squared error of an element."""
    grids = {b: fit_grid(seen, Scheme(b, symmetric=False), name=name) for b in widths}
    return {b: _price(found, paths, squared_error(seen, g) / float(seen.counts.sum()) / 2) for b, g in grids.items()}


def _price(found: curvature.Curvature, measures: Sequence[str], factor: float) -> Price:
    """``factor`` times the sum of some measures, whose errors, from the same examples, are taken to add up."""
    mean, stderr = (sum(float(values[m][0]) for m in measures) for values in (found.mean, found.stderr))
    return Price(factor * mean, factor * stderr)


def prices_to_dict(prices: BitPrices) -> dict[str, Any]:
    """The prices as JSON-ready data."""

    def table(given: Prices) -> dict[str, Any]:
        return {name: {str(b): [p.rise, p.stderr] for b, p in by_bits.items()} for name, by_bits in given.items()}

    return {
        **FORMAT,
        "detail": prices.detail,
        "weights": table(prices.weights),
        "sites": table(prices.sites),
        "layout": asdict(prices.layout),
        "traces": dict(prices.traces),
    }


def prices_from_dict(data: Mapping[str, Any]) -> BitPrices:
    """The prices that :func:`prices_to_dict` wrote.

    Raises:
        ValueError: if the data is something else.
    """

    def table(given: Mapping[str, Any]) -> Prices:
        return {str(name): {int(b): Price(*map(float, p)) for b, p in by_bits.items()} for name, by_bits in given.items()}

    if not isinstance(data, Mapping) or {k: data.get(k) for k in FORMAT} != FORMAT:
        raise ValueError(f"these are no prices of bits: expected {FORMAT}")
    try:
        traces = {str(k): float(v) for k, v in data.get("traces", {}).items()}
        return BitPrices(_layout(data["layout"]), table(data["weights"]), table(data["sites"]), str(data["detail"]), traces)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the prices of bits are damaged ({type(error).__name__}: {error}); have them made again") from None


def _layout(data: Mapping[str, Any]) -> Layout:
    def made(kind: Any, entries: Iterable[Mapping[str, Any]]) -> tuple[Any, ...]:
        return tuple(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}) for entry in entries)

    unread = {str(k): str(v) for k, v in data["unread"].items()}
    return Layout(made(Weight, data["weights"]), made(Site, data["sites"]), made(Product, data["products"]), unread)
