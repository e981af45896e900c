"""Prices of bits: equal to the dense float64 matrix on a network small enough to have it in full."""

import json
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from curvepress.quantization.bitwidths import BitPrices, bit_prices, layout_of, left_in_float, prices_from_dict, prices_to_dict
from curvepress.quantization.quantized import Bits
from curvepress.quantization.quantizer import Scheme, dequantize, fake_quantize, fit_grid
from curvepress.quantization.rounding import fit_and_round, gram_linear
from tests import zoo

WIDTHS = (2, 4, 8)
Data = list[tuple[Tensor, Tensor]]


class Small(nn.Module):
    """A tensor, the result of the tanh, that both a layer and a sum read, so that it has a site for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(h := self.start(x), h)

    def start(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def rest(self, summed: Tensor, read: Tensor) -> Tensor:
        return self.last(summed + self.second(read))


@pytest.fixture(scope="module")
def small() -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().eval().requires_grad_()


@pytest.fixture(scope="module")
def data() -> Data:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]


def priced(model: nn.Module, data: Data, **more: object) -> BitPrices:
    return bit_prices(model, F.cross_entropy, data, data[0][0], widths=WIDTHS, **more)


def gauss_newton(logits: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """J' (diag(p) - p p') J for one example: what the cross-entropy of these logits curves like, in full."""
    with torch.no_grad():
        jacobian, p = jacrev(logits)(at).reshape(3, -1), logits(at).flatten().softmax(0)
        return jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian


@pytest.mark.parametrize("price", ["direction", "trace"])
def test_weights_are_priced_as_the_dense_matrix_says(small: Small, data: Data, price: str):
    found, model = priced(small, data, price=price, estimator="exact"), deepcopy(small).double()
    rows = torch.cat([x for x, _ in data]).double()
    for name, w in small.named_parameters():
        if not name.endswith("weight"):
            continue
        at = w.detach().double()
        matrix = sum(gauss_newton(lambda v, x=x, name=name: functional_call(model, {name: v}, (x[None],)), at) for x in rows) / len(rows)
        for bits in WIDTHS:
            d = (fake_quantize(w.detach(), fit_grid(w.detach(), Scheme(bits, axis=0))) - w.detach()).double().flatten()
            wanted = d @ matrix @ d / 2 if price == "direction" else matrix.trace() / len(d) * d.square().sum() / 2
            assert found.weights[name][bits].rise == pytest.approx(float(wanted), rel=1e-3), (name, bits)


def test_the_error_of_the_rounding_that_is_asked_for_is_priced(small: Small, data: Data):
    found, nearest = (priced(small, data, rounding=r, estimator="exact") for r in ("compensated", "nearest"))
    model, rows = deepcopy(small).double(), torch.cat([x for x, _ in data])
    with torch.no_grad():
        h = small.start(rows)
        read = {"first.weight": rows, "second.weight": h, "last.weight": h + small.second(h)}
    for name, x in read.items():
        w = small.get_parameter(name).detach()
        matrix = sum(
            gauss_newton(lambda v, r=r, name=name: functional_call(model, {name: v}, (r[None].double(),)), w.double()) for r in rows
        )
        levels, grid = fit_and_round(w, fit_grid(w, Scheme(2, axis=0)), gram_linear(x), method="compensated", rounds=1)
        d = (dequantize(levels, grid) - w).double().flatten()
        assert found.weights[name][2].rise == pytest.approx(float(d @ matrix @ d / 2) / len(rows), rel=1e-3), name
    assert sum(p[2].rise for p in found.weights.values()) < sum(p[2].rise for p in nearest.weights.values())
    assert found.sites == nearest.sites


def test_activations_are_priced_per_example_as_the_dense_matrix_says(small: Small, data: Data):
    found, model = priced(small, data, estimator="exact"), deepcopy(small).double()
    with torch.no_grad():
        h = small.start(torch.cat([x for x, _ in data]))
    rests = {"tanh": lambda a, kept: model.rest(a, a), "tanh.read": lambda a, kept: model.rest(kept, a)}
    for name, rest in rests.items():
        trace = sum(float(gauss_newton(lambda a, k=row, rest=rest: rest(a, k), row).trace()) for row in h.double()) / len(h)
        for bits in WIDTHS:
            square = (fake_quantize(h, fit_grid(h, Scheme(bits, symmetric=False))) - h).double().square().sum(1).mean()
            assert found.sites[name][bits].rise == pytest.approx(trace / 4 * float(square) / 2, rel=0.1), (name, bits)
    assert found.sites["tanh.read"][4].rise < found.sites["tanh"][4].rise


def test_a_site_of_several_tensors_has_the_prices_of_all_of_them():
    model, x = (lambda found: (found.model.float(), found.example[0].float()))(zoo.make("densenet"))
    data = [(x + n, torch.zeros(len(x), dtype=torch.long)) for n in (0, 1)]
    found = bit_prices(model, lambda out, y: out.double().square().mean(), data, x, widths=(4,))
    assert {s.name for s in found.layout.sites} == set(found.sites)
    assert all(p[4].rise >= 0 for p in found.sites.values())


def test_fewer_bits_cost_more_and_a_seed_gives_the_same_again(small: Small, data: Data):
    found = priced(small, data, seed=3)
    for table in (found.weights, found.sites):
        assert all(p[2].rise > p[4].rise > p[8].rise > 0 and p[2].stderr > 0 for p in table.values())
    assert priced(small, data, seed=3) == found
    assert prices_from_dict(json.loads(json.dumps(prices_to_dict(found)))) == found


def test_the_model_is_left_as_it_was(small: Small, data: Data):
    before = {n: t.clone() for n, t in small.state_dict().items()}
    priced(small, data)
    assert all(torch.equal(t, before[n]) for n, t in small.state_dict().items()) and not small.training


def test_what_stays_in_float_has_no_price(small: Small, data: Data):
    found = priced(small, data, in_float=["first.weight", "tanh.read"])
    assert set(found.weights) == {"second.weight", "last.weight"} and "tanh" in found.sites and "tanh.read" not in found.sites
    what = layout_of(small, data[0][0])
    assert left_in_float(Bits(weight=4), what, ["tanh"]) == Bits(weight=4, sites={"tanh": None})


def test_bad_input_is_refused_by_name(small: Small, data: Data):
    with pytest.raises(ValueError, match="price 'hope' is unknown; choose one of direction, trace"):
        priced(small, data, price="hope")
    with pytest.raises(ValueError, match="'third.weight' cannot stay in float: the model has add, first, first.weight, "):
        priced(small, data, in_float=["third.weight"])
    with pytest.raises(ValueError, match="two batches"):
        priced(small, data[:1])
    dead = deepcopy(small)
    nn.init.zeros_(dead.second.weight)
    with pytest.raises(ValueError, match="second.weight is zero throughout.*leave it in float"):
        priced(dead, data)
    assert "second.weight" not in priced(dead, data, in_float=["second.weight", "second"]).weights
    with pytest.raises(ValueError, match="x .*NaN"):
        bit_prices(small, F.cross_entropy, [(x / 0 * 0, y) for x, y in data], data[0][0])
    with pytest.raises(ValueError, match="all 32 examples for calibration are of class 0: the data is sorted"):
        priced(small, [(x, y * 0) for x, y in data])
