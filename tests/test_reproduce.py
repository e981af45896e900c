"""The published systems: formulas against dense matrices, choices against enumeration, defects exactly where they are documented."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import curvature_hap
from curvepress.costs import cost
from curvepress.curvature import spearman
from curvepress.implants import Implant
from curvepress.plan import Plan, lost
from curvepress.quantization.allocation import allocation, uniform
from curvepress.quantization.bitwidths import BitPrices, Price, bit_prices, prices_from_dict, prices_to_dict
from curvepress.quantization.packing import packed_size
from curvepress.quantization.quantized import Layout, Weight
from curvepress.repairing.refitting import zeroed
from curvepress.reproduce import SYSTEMS, Preset, ehap, hap, hawq_v2, nvit
from curvepress.reproduce.sampling import apart, one_batch
from curvepress.reproduce.thresholds import Rule, plan_at, shares, told, within
from curvepress.scores import RELATIVE_UNIT, Scores
from curvepress.structure import Group, Structure
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress_recipes.vit import ViT

Data = list[tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """A stream that two layers make, one of them behind a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.outer, self.last = nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last((h + self.outer(F.relu(self.inner(h)))).mean((2, 3)))


@pytest.fixture(scope="module")
def residual() -> tuple[Residual, Structure, Data]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual().double().eval()
        data = [(torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(3)]
    return model, trace(model, data[0][0]), data


def dense_traces(model: nn.Module, weight: str, data: Data) -> Tensor:
    """``tr(H_cc)`` of every output channel from the whole Hessian of one weight."""
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    own = {n: p.detach() for n, p in model.named_parameters()}
    w = own[weight]

    def loss(moved: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, {**own, weight: moved}, (x,)), y)

    h = torch.autograd.functional.hessian(loss, w).reshape(w.numel(), w.numel())
    return h.diagonal().reshape(len(w), -1).sum(1)


def dense_scores(model: nn.Module, weight: str, data: Data) -> np.ndarray:
    """``tr(H_cc) / (2 p_c) * |w_c|^2``."""
    w = model.get_parameter(weight).detach()
    return (dense_traces(model, weight, data) * w.flatten(1).square().sum(1) / (2 * w[0].numel())).numpy()


def group_of(structure: Structure, weight: str) -> Group:
    return next(g for g in structure.free if any((m.tensor, m.dim) == (weight, 0) for m in g.members))


def test_haps_score_is_its_formula_on_the_dense_hessian(residual: tuple[Residual, Structure, Data]):
    model, structure, data = residual
    found = hap.relative_traces(model, F.cross_entropy, apart(data, 24), structure, estimator="exact")
    inner = found.values[group_of(structure, "inner.weight").name]
    np.testing.assert_allclose(inner, dense_scores(model, "inner.weight", data), rtol=1e-9)
    stream = np.maximum(dense_scores(model, "first.weight", data), dense_scores(model, "outer.weight", data))
    np.testing.assert_allclose(found.values[group_of(structure, "first.weight").name], stream, rtol=1e-9)


def test_random_vectors_on_one_batch_come_near_it(residual: tuple[Residual, Structure, Data]):
    model, structure, data = residual
    drawn = one_batch(data, 24, 400)
    assert len(drawn.batches) * drawn.probes == 400 and all(len(b[0]) == 24 for b in drawn.batches)
    found = hap.relative_traces(model, F.cross_entropy, drawn, structure)
    exact = hap.relative_traces(model, F.cross_entropy, apart(data, 24), structure, estimator="exact")
    for g, values in found.values.items():
        assert (np.abs(values - exact.values[g]) < 6 * found.stderr[g] + 1e-12).all()


@pytest.mark.parametrize(("probes", "times"), [(1, 2), (2, 2), (3, 3), (5, 5), (11, 11), (300, 6)])
def test_all_vectors_are_drawn_in_two_samples_or_more(probes: int, times: int):
    drawn = one_batch([(torch.zeros(5, 2), torch.zeros(5))] * 2, 7, probes)
    assert len(drawn.batches) == times and len(drawn.batches) * drawn.probes == max(probes, 2)
    assert [len(b[0]) for b in drawn.batches] == [7] * times


def test_sentences_of_several_lengths_stay_apart():
    batches = [({"ids": torch.zeros(4, n)}, torch.zeros(4)) for n in (3, 5, 5)]
    drawn = one_batch(batches, 10, 6)
    assert [tuple(b[0]["ids"].shape) for b in drawn.batches] == [(4, 3), (4, 5), (2, 5)] and drawn.probes == 6


def released(values: list[float], everything: list[float], ratio: float, implants: float) -> tuple[list[int], list[int]]:
    """What HAP's code keeps of a layer and gives 1x1 filters, as the notes on it have it, written out."""

    def split(values: list[float], high: float, low: float) -> tuple[list[int], list[int]]:
        kept = [i for i, v in enumerate(values) if v > high]
        point = [i for i, v in enumerate(values) if low < v <= high]
        return ([0], [i for i in point if i]) if len(kept) <= 1 else (kept, point)

    ordered = sorted(everything)
    at, inner = int(ratio * len(ordered)), int((1 - implants) * ratio * len(ordered))
    kept, point = split(values, ordered[at], ordered[inner])
    if (len(kept) + len(point)) / len(values) > 0.95:
        values = sorted(values)
        at, inner = int(0.95 * len(values)), int((1 - implants) * ratio * len(values))
        kept, point = split(values, values[at], values[inner])
    return kept, point


@pytest.mark.parametrize("seed", range(4))
def test_the_released_choice_is_what_the_notes_on_it_say(seed: int):
    generator = np.random.default_rng(seed)
    layers = [generator.normal(size=n) * generator.uniform(0.1, 3) for n in (16, 16, 32, 64)]
    everything = np.sort(np.concatenate(layers))
    for ratio, values in product((0.2, 0.5, 0.8), layers):
        found = told(values, ratio, everything, Rule(implants=0.1, first=True, inverted=True))
        kept, point = released(values.tolist(), everything.tolist(), ratio, 0.1)
        assert (found.kept.tolist(), found.pointwise.tolist()) == (kept, point)


def test_a_layer_that_matters_most_is_destroyed_as_released_and_whole_when_corrected():
    values = np.linspace(10, 11, 16)
    everything = np.sort(np.concatenate([values, np.linspace(0, 1, 48)]))
    found = told(values, 0.5, everything, Rule(implants=0.1, first=True, inverted=True))
    assert (len(found.kept), len(found.pointwise)) == (1, 8)
    assert len(told(values, 0.5, everything, Rule(implants=0.1)).kept) == 16


def test_of_a_layer_below_the_threshold_the_first_or_the_best_stays():
    values, everything = np.array([0.1, 0.4, 0.2]), np.linspace(0, 100, 50)
    assert told(values, 0.5, everything, Rule(first=True)).kept.tolist() == [0]
    assert told(values, 0.5, everything, Rule()).kept.tolist() == [1]
    wide = np.linspace(0.1, 1, 60)
    assert told(wide, 0.5, everything, Rule()).kept.tolist() == [58, 59]


def test_corrected_implants_are_the_best_of_what_goes():
    values = np.arange(100.0)
    found = told(values, 0.5, values, Rule(implants=0.2))
    assert found.kept.tolist() == list(range(51, 100)) and found.pointwise.tolist() == list(range(41, 51))


def test_a_plan_of_the_rule_fits_holds_its_implants_and_starts_them_at_zero(residual: tuple[Residual, Structure, Data]):
    model, structure, data = residual
    scores = hap.relative_traces(model, F.cross_entropy, apart(data, 24), structure, estimator="exact")
    plan = within({"params": 0.75}, structure, scores, Rule(implants=0.5))
    assert cost(plan).params <= 0.75 * cost(Plan(structure)).params and plan.implants
    counted = shares(plan)
    assert counted["gone"] == sum(len(lost(plan, g)) for g in structure.free) / sum(g.size for g in structure.free)
    small = apply(model, plan, data[0][0])
    points = [n for n in dict(small.named_parameters()) if ".point." in n]
    assert points and all(small.get_parameter(n).abs().sum() > 0 for n in points)
    start = zeroed(small, plan)
    assert all(start.get_parameter(n).abs().sum() == 0 for n in points)
    assert all(torch.equal(p, start.get_parameter(n)) for n, p in small.named_parameters() if n not in points)


def test_implants_stay_out_of_streams_whose_channels_cannot_be_moved(residual: tuple[Residual, Structure, Data]):
    _, structure, _ = residual
    flat = {g.name: np.arange(g.size, dtype=float) for g in structure.free}
    plan = plan_at(0.6, structure, Scores(flat, flat, "", RELATIVE_UNIT, 0, 0), Rule(implants=0.5), structure.free)
    assert all(isinstance(i, Implant) and i.kind == "pointwise" for i in plan.implants.values())


def test_what_cannot_be_met_is_said(residual: tuple[Residual, Structure, Data]):
    model, structure, data = residual
    scores = hap.relative_traces(model, F.cross_entropy, apart(data, 24), structure, estimator="exact")
    with pytest.raises(ValueError, match="no plan fits the budget"):
        within({"params": 0.01}, structure, scores, Rule())


def test_ehaps_released_scale_leaves_one_vector(residual: tuple[Residual, Structure, Data]):
    model, structure, data = residual
    batch = one_batch(data, 24, 3).batches[0]
    done: dict[int, dict[str, np.ndarray]] = {}
    found = ehap.released_traces(model, F.cross_entropy, batch, structure, probes=300, done=done)
    group = group_of(structure, "inner.weight")
    one = f"{group.name} 0"
    np.testing.assert_allclose(found.values[group.name], (256 * done[0][one] + done[1][one] + done[2][one] / 256) / 300, rtol=1e-12)
    first = np.concatenate([hap.joined(g, done[0], done[0])[0] for g in structure.free])
    assert spearman(np.concatenate([found.values[g.name] for g in structure.free]), first) > 0.99


def test_the_weights_are_those_of_the_released_loop(residual: tuple[Residual, Structure, Data]):
    model, _, data = residual
    probes = curvature_hap.ehap(model.float(), (data[0][0].float(), data[0][1]), 3, 0)
    assert tuple(p.scale for p in probes) == ehap.WEIGHTS
    model.double().requires_grad_()


@pytest.mark.parametrize("name", SYSTEMS)
def test_corrected_differs_exactly_where_it_says(name: str):
    preset = SYSTEMS[name]
    plain, right = preset.chosen(), preset.chosen(corrected=True)
    assert {k for k in plain if plain[k] != right[k]} == set(preset.corrections)
    assert set(preset.sources) == set(preset.settings) and all(preset.sources.values())
    assert all(c.reason for c in preset.corrections.values()) and preset.unread and preset.deviations
    with pytest.raises(ValueError, match="no setting 'nonsense'"):
        preset.chosen(nonsense=1)


def test_a_preset_without_a_source_is_refused():
    with pytest.raises(ValueError, match="every setting needs a source"):
        Preset("x", "X", "", "", {"probes": 3}, {})


def given_prices(seed: int, count: int = 4) -> BitPrices:
    generator = np.random.default_rng(seed)
    weights = tuple(Weight(f"w{i}", (int(n),), 0, 1) for i, n in enumerate(generator.integers(3, 40, count)))
    traces = {w.name: float(t) for w, t in zip(weights, generator.uniform(0.1, 2, count), strict=True)}
    rises = {
        w.name: {b: Price(traces[w.name] * w.size * 4.0**-b * generator.uniform(0.8, 1.2), 0.0) for b in (2, 3, 4, 8)} for w in weights
    }
    return BitPrices(Layout(weights, (), ()), rises, {}, "", traces)


@pytest.mark.parametrize("seed", range(5))
def test_the_monotone_frontier_is_that_of_all_monotone_choices(seed: int):
    prices, bits = given_prices(seed), (2, 3, 4, 8)
    layers = hawq_v2.layers_of(prices, "weights")
    found = hawq_v2.monotone(layers, bits)
    ordered = sorted(layers, key=lambda x: -x.trace)
    every = [c for c in product(bits, repeat=len(ordered)) if list(c) == sorted(c, reverse=True)]
    costs = [sum(packed_size(x.size, b) for x, b in zip(ordered, c, strict=True)) for c in every]
    rises = [sum(x.rises[b] for x, b in zip(ordered, c, strict=True)) for c in every]
    for limit in range(min(costs), max(costs) + 1):
        choice = found.within(limit)
        own = [choice[x.name] for x in ordered]
        assert own == sorted(own, reverse=True)
        assert sum(packed_size(x.size, b) for x, b in zip(ordered, own, strict=True)) <= limit
        least = min(r for r, c in zip(rises, costs, strict=True) if c <= limit)
        assert sum(x.rises[b] for x, b in zip(ordered, own, strict=True)) == pytest.approx(least)
    with pytest.raises(ValueError, match="ask for a smaller ratio"):
        found.within(min(costs) - 1)


def test_reversed_sensitivities_are_those_of_the_opposite_layer():
    prices = given_prices(1)
    plain, back = ({x.name: x for x in hawq_v2.layers_of(prices, "weights", backwards=b)} for b in (False, True))
    order = sorted(prices.traces, key=lambda n: -prices.traces[n])
    for name, opposite in zip(order, reversed(order), strict=True):
        assert back[name].trace == prices.traces[opposite]
        assert back[name].rises[4] == pytest.approx(plain[name].rises[4] * prices.traces[opposite] / prices.traces[name])


def test_bits_fall_with_the_mean_trace_within_the_ratio(residual: tuple[Residual, Structure, Data]):
    model, _, data = residual
    model = model.float()
    batches = [(x.float(), y) for x, y in data]
    prices = bit_prices(model, F.cross_entropy, batches, batches[0][0], price="trace", estimator="exact")
    for name in ("inner.weight", "outer.weight"):
        dense = dense_traces(model, name, batches).sum() / model.get_parameter(name).numel()
        assert prices.traces[name] == pytest.approx(float(dense), rel=1e-3)
    again = prices_from_dict(prices_to_dict(prices))
    assert again.traces == prices.traces and set(prices.weights) | set(prices.sites) == set(prices.traces)
    settings = {**hawq_v2.PRESET.settings, "ratio": 8.0, "mean": 6.0, "reversed": False}
    found = hawq_v2.chosen(prices, settings)
    assert found.bytes <= sum(4 * w.size for w in prices.layout.weights) / 8 and found.rise <= uniform(prices, 4, 6).rise * (1 + 1e-9)
    ordered = sorted(prices.weights, key=lambda n: -prices.traces[n])
    assert [found.bits.weights[n] for n in ordered] == sorted((found.bits.weights[n] for n in ordered), reverse=True)
    worst = hawq_v2.chosen(prices, {**settings, "reversed": True})
    assert allocation(prices, worst.bits).rise >= found.rise
    model.double()


@pytest.fixture(scope="module")
def vit() -> tuple[ViT, Structure, Data]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViT(size=8, patch=4, width=16, depth=2, heads=4, hidden=32, classes=3).eval()
        data = [(torch.randn(4, 3, 8, 8), torch.randint(3, (4,))) for _ in range(3)]
    return model, trace(model, data[0][0]), data


def test_of_a_transformer_whole_heads_go_priced_over_their_projections(vit: tuple[ViT, Structure, Data]):
    model, structure, data = vit
    exact = hap.relative_traces(model, F.cross_entropy, apart(data, 12), structure, estimator="exact")
    heads = [g for g in structure.free if g.kind == "head"]
    assert (
        hap.joined(
            heads[0], {f"{heads[0].name} {i}": np.ones(4) for i in range(3)}, {f"{heads[0].name} {i}": np.ones(4) for i in range(3)}
        )[0].tolist()
        == [3] * 4
    )
    plan = within({"params": 0.85}, structure, exact, Rule(), whole=["embedding", "hidden", "query-key", "value"])
    assert set(plan.keep) <= {g.name for g in heads} and plan.keep


def test_nvits_released_divisors_are_all_that_differs_where_the_sums_are_the_same(vit: tuple[ViT, Structure, Data]):
    model, structure, data = vit
    settings = {**nvit.PRESET.chosen(corrected=True), "samples": 3}
    plain = nvit.squared_taylor(model, F.cross_entropy, data, structure, settings)
    divided = nvit.squared_taylor(model, F.cross_entropy, data, structure, {**settings, "divisors": nvit.PRESET.settings["divisors"]})
    squares = {"embedding": 144, "head": 144, "query-key": 4, "value": 4, "hidden": 1}
    assert {g.kind for g in structure.free} == set(squares)
    for g in structure.free:
        np.testing.assert_allclose(divided.values[g.name] * squares[g.kind], plain.values[g.name], rtol=1e-6)


def test_nvits_score_is_the_squared_slope_of_a_gate(vit: tuple[ViT, Structure, Data]):
    model, structure, data = vit
    group = group_of(structure, "blocks.0.fc1.weight")
    found = nvit.squared_taylor(
        model, F.cross_entropy, data, structure, {**nvit.PRESET.chosen(corrected=True), "members": "queries", "samples": 3}
    )
    gate = torch.ones(32, requires_grad=True)
    own = {n: p.detach() for n, p in model.named_parameters()}
    slopes = []
    for x, y in data:
        moved = {**own, "blocks.0.fc1.weight": own["blocks.0.fc1.weight"] * gate[:, None]}
        slopes.append(torch.autograd.grad(F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y), gate)[0])
    np.testing.assert_allclose(found.values[group.name], torch.stack(slopes).square().mean(0).numpy(), rtol=1e-4)


def test_blocks_go_least_first_and_a_dear_second_decides_otherwise(vit: tuple[ViT, Structure, Data]):
    _, structure, _ = vit
    generator = np.random.default_rng(0)
    values = {g.name: generator.random(g.size) for g in structure.free}
    scores, blocks = Scores(values, values, "", RELATIVE_UNIT, 0, 0), {"hidden": 8, "embedding": 4, "head": 2, "query-key": 2, "value": 2}

    def seconds(plan: Plan) -> float:
        return float(cost(plan).macs)

    whole = seconds(Plan(structure))
    one = nvit.greedy(structure, scores, seconds, blocks, eta=0, fits=lambda p: bool(p.keep))
    sums = {g.name: np.sort(values[g.name])[: min(blocks[g.kind], g.size)].sum() for g in structure.free if g.size > blocks[g.kind]}
    assert list(one.keep) == [min(sums, key=lambda n: sums[n])]
    dear = nvit.greedy(structure, scores, seconds, blocks, eta=1e6, fits=lambda p: bool(p.keep))
    saved = {n: whole - seconds(Plan(structure, {n: tuple(range(blocks[structure[n].kind], structure[n].size))})) for n in sums}
    assert list(dear.keep) == [max(saved, key=lambda n: saved[n])]
    small = nvit.greedy(structure, scores, seconds, blocks, eta=0, fits=lambda p: seconds(p) <= 0.5 * whole)
    assert all(len(kept) % blocks[structure[n].kind] == 0 for n, kept in small.keep.items())
    with pytest.raises(ValueError, match="no block of channels is left"):
        nvit.greedy(structure, scores, seconds, blocks, eta=0, fits=lambda p: False)
