"""Repair in closed form: against dense least squares, and laws that hold for every model."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from attention_zoo import make_block
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import conv_bn

import curvepress as cp
from curvepress.plan import Plan
from curvepress.repairing.sequential import Repaired, repair
from curvepress.repairing.stepping import grams

TINY = (1e-13,)


def batches(*shape: int, count: int = 3, size: int = 8, seed: int = 0) -> list[tuple[Tensor, None]]:
    chance = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, *shape, generator=chance, dtype=torch.float64), None) for _ in range(count)]


def half(model: nn.Module, x: Tensor, share: float = 0.5) -> Plan:
    structure = cp.trace(model, x)
    return Plan(structure, {g.name: tuple(range(max(1, int(g.size * share)))) for g in structure.free})


def disturbed(model: nn.Module, seed: int = 5) -> nn.Module:
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=chance, dtype=p.dtype))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=chance, dtype=buffer.dtype))
    return model.eval()


def net(*layers: nn.Module) -> nn.Module:
    return disturbed(nn.Sequential(*layers).double())


class Residual(nn.Module):
    """A stem, residual blocks and a head."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), nn.Linear(8, 4)
        self.inner, self.outer = (nn.ModuleList(conv_bn(8, 8) for _ in range(blocks)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = F.relu(x + outer(F.relu(inner(x))))
        return self.head(x.mean((2, 3)))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in {**a, **b})


def error(model: nn.Module, original: nn.Module, given: list[tuple[Tensor, None]]) -> float:
    with torch.no_grad():
        return sum(float((model(x) - original(x)).square().sum()) for x, _ in given)


def test_an_unpruned_model_stays_as_it_is_to_the_last_bit() -> None:
    model = disturbed(Residual().double())
    repaired = repair(deepcopy(model), model, batches(3, 8, 8))
    assert same(tensors(repaired.model), tensors(model)) and not repaired.layers and not repaired.left


def test_lost_inputs_that_others_can_stand_in_for_are_made_up_for_exactly() -> None:
    model = net(nn.Linear(5, 6), nn.Linear(6, 3))
    with torch.no_grad():  # channels 3 to 5 are sums of others, up to a constant
        mix = torch.tensor([[1.0, 2, 0], [0, -1, 1], [3, 0, 1]], dtype=torch.float64)
        model[0].weight[3:] = mix @ model[0].weight[:3]
    x = batches(5)
    plan = Plan(cp.trace(model, x[0][0]), {"0": (0, 1, 2)})
    small = cp.apply(model, plan, x[0][0])
    assert error(small, model, x) > 1
    repaired = repair(small, model, x, plan, ridges=TINY)
    assert error(repaired.model, model, batches(5, seed=9)) < 1e-15
    (layer,) = repaired.layers
    assert (layer.name, layer.intercept) == ("1.weight", "bias") and layer.after < 1e-12 < layer.before


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": (3, 2), "dilation": (2, 1), "padding": (1, 2)},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 6, "padding": 1},
    "without bias": {"kernel_size": 1, "bias": False},
}


class Noisy(nn.Module):
    """A layer behind a fixed nonlinear map of what it reads, so that another layer can only come near it."""

    def __init__(self, layer: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = first, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x))


@pytest.mark.parametrize("how", CONVOLUTIONS)
def test_a_convolution_gets_the_dense_least_squares_fit(how: str) -> None:
    original = disturbed(Noisy(nn.Conv2d(6, 6, **CONVOLUTIONS[how]), nn.Tanh()).double())
    changed = Noisy(deepcopy(original.layer), nn.Softplus()).eval()
    given = batches(6, 6, 7, count=4)
    layer = repair(changed, original, given, ridges=TINY).model.layer
    x, first = torch.cat([x for x, _ in given[:3]]), 0 if layer.bias is None else 1
    with torch.no_grad():
        for channel in range(6):
            columns = [torch.ones(x.shape[0] * original(x)[0, 0].numel(), dtype=x.dtype)] * first
            columns += [_response(layer, F.softplus(x), channel, n) for n in range(layer.weight[0].numel())]
            best = torch.linalg.lstsq(torch.stack(columns, 1), original(x)[:, channel].reshape(-1, 1)).solution[:, 0]
            torch.testing.assert_close(layer.weight[channel].flatten(), best[first:], rtol=1e-7, atol=1e-8)
            if first:
                torch.testing.assert_close(layer.bias[channel], best[0], rtol=1e-7, atol=1e-8)


def _response(layer: nn.Conv2d, x: Tensor, channel: int, n: int) -> Tensor:
    """What one element of a channel's filter adds to its outputs, if it is one."""
    single = deepcopy(layer)
    for p in single.parameters():
        p.zero_()
    single.weight[channel].view(-1)[n] = 1
    return single(x)[:, channel].flatten()


@pytest.mark.parametrize("intercept", [True, False])
def test_a_linear_layer_gets_the_dense_least_squares_fit(intercept: bool) -> None:
    original = disturbed(Noisy(nn.Linear(4, 3, bias=intercept), nn.Tanh()).double())
    changed = Noisy(deepcopy(original.layer), nn.Softplus()).eval()
    given = batches(4, count=4)
    repaired = repair(changed, original, given, ridges=TINY)
    x = torch.cat([F.softplus(x) for x, _ in given[:3]])
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if intercept else x
    with torch.no_grad():
        best = torch.linalg.lstsq(x, torch.cat([original(x) for x, _ in given[:3]])).solution
    torch.testing.assert_close(repaired.model.layer.weight.mT, best[:4], rtol=1e-8, atol=1e-8)
    if intercept:
        torch.testing.assert_close(repaired.model.layer.bias, best[4], rtol=1e-8, atol=1e-8)


def test_a_running_mean_takes_the_intercept_where_there_is_no_bias() -> None:
    original = net(*conv_bn(3, 4))
    changed = deepcopy(original)
    with torch.no_grad():
        changed[1].running_mean.add_(torch.tensor([1.0, -2, 0.5, 3]))
        changed[1].running_var.mul_(2)
    given = batches(3, 6, 6)
    repaired = repair(changed, original, given, ridges=TINY)
    assert error(repaired.model, original, given) < 1e-12 and repaired.layers[0].intercept == "batchnorm"
    torch.testing.assert_close(repaired.model[1].running_var, changed[1].running_var)


def pruned(seed: int = 0, blocks: int = 2) -> tuple[nn.Module, nn.Module, Plan, list[tuple[Tensor, None]]]:
    torch.manual_seed(seed)
    model, given = disturbed(Residual(blocks).double(), seed), batches(3, 8, 8, count=6, seed=seed)
    plan = half(model, given[0][0])
    return cp.apply(model, plan, given[0][0]), model, plan, given


@pytest.mark.parametrize("seed", range(2))
def test_no_layer_gets_worse_on_held_out_examples_and_outputs_come_nearer(seed: int) -> None:
    small, model, plan, given = pruned(seed)
    repaired = repair(small, model, given, plan)
    assert repaired.layers and all(layer.after <= layer.before for layer in repaired.layers)
    assert error(repaired.model, model, batches(3, 8, 8, seed=seed + 50)) < error(small, model, batches(3, 8, 8, seed=seed + 50))


def test_a_fit_that_held_out_examples_speak_against_is_not_taken() -> None:
    original = net(nn.Linear(30, 4))
    changed = deepcopy(original)
    with torch.no_grad():
        changed[0].weight.add_(0.001)
    x = torch.randn(20, 30, dtype=torch.float64)
    x[10:] *= -1e-3  # what was fitted to says little of what is held out
    x[:10] = 0
    repaired = repair(changed, original, [(x, None)], held_out=0.5)
    assert [layer.ridge for layer in repaired.layers] == [None] and same(tensors(repaired.model), tensors(changed))


def test_layers_are_repaired_for_what_earlier_repairs_left() -> None:
    """Each layer alone, at once, leaves errors that the ones after it were not told of."""
    small, model, plan, given = pruned(1, blocks=1)
    names = [n for n, p in small.named_parameters() if p.ndim > 1]
    at_once = deepcopy(small)
    for name in names:
        alone = repair(small, model, given, plan, names=[name], residual=False)
        at_once.load_state_dict({**at_once.state_dict(), **_of(alone.model, name)})
    in_order = repair(small, model, given, plan, residual=False)
    fresh = batches(3, 8, 8, seed=77)
    assert error(in_order.model, model, fresh) < 0.8 * error(at_once, model, fresh)


def _of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A layer's tensors and those of the normalisation behind it."""
    first = name.removesuffix("weight")
    behind = first.replace(".0.", ".1.") if first.count(".") > 1 or first == "stem.0." else first
    return {n: t for n, t in model.state_dict().items() if n.startswith((first, behind))}


def test_the_last_layer_before_a_sum_makes_up_for_the_other_side() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.main = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.side(x) + self.main(x)

    original = disturbed(Sum().double())
    changed, given = deepcopy(original), batches(4)
    with torch.no_grad():
        changed.side.weight.add_(1)
    repaired = repair(changed, original, given, names=["main.weight"], ridges=TINY)
    assert error(repaired.model, original, given) < 1e-12
    apart = repair(changed, original, given, names=["main.weight"], ridges=TINY, residual=False)
    assert not apart.layers and same(tensors(apart.model), tensors(changed))


class Transposed(nn.Module):
    """A product with the weight's columns for outputs, as in some transformers."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.weight, self.bias = first, nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.first(x), self.weight)


def test_a_product_by_columns_gets_the_dense_least_squares_fit() -> None:
    original, given = disturbed(Transposed(nn.Tanh()).double()), batches(4, count=4)
    repaired = repair(disturbed(Transposed(nn.Softplus()).double(), 9), original, given, ridges=TINY).model
    x = torch.cat([x for x, _ in given[:3]])
    with torch.no_grad():
        design = torch.cat([F.softplus(x), torch.ones_like(x[:, :1])], 1)
        best = torch.linalg.lstsq(design, original(x)).solution
    torch.testing.assert_close(torch.cat([repaired.weight, repaired.bias[None]]), best, rtol=1e-8, atol=1e-8)


def test_given_models_and_their_modes_are_left_alone() -> None:
    small, model, plan, given = pruned()
    small.train()
    before = tensors(small), tensors(model)
    repaired = repair(small, model, given, plan)
    assert same(before[0], tensors(small)) and same(before[1], tensors(model))
    assert small.training and repaired.model.training and not model.training
    assert not same(tensors(repaired.model), before[0])


class Padded(nn.Module):
    """A shortcut padded by a constant: what is cut comes back as a graph module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.last, self.head = conv_bn(3, 4), conv_bn(4, 8), conv_bn(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.last(F.relu(self.wide(x))) + F.pad(x, (0, 0, 0, 0, 2, 2)))
        return self.head(F.avg_pool2d(y, 8).view(-1, 8))


def test_a_graph_module_is_repaired_like_any_other() -> None:
    model, given = disturbed(Padded().double()), batches(3, 8, 8, count=6)
    plan = half(model, given[0][0])
    small = cp.apply(model, plan, given[0][0])
    assert isinstance(small, torch.fx.GraphModule)
    repaired = repair(small, model, given, plan)
    fresh = batches(3, 8, 8, seed=3)
    assert isinstance(repaired.model, torch.fx.GraphModule) and len(repaired.layers) >= 3
    assert error(repaired.model, model, fresh) < error(small, model, fresh)


def test_the_projection_out_of_attention_takes_over_for_lost_heads() -> None:
    model = make_block("separate").double().eval()
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(*_block_input(model), generator=chance, dtype=torch.float64)
    structure = cp.trace(model, x[:2])
    heads = [g for g in structure.free if g.kind in ("head", "value")]
    plan = Plan(structure, {g.name: tuple(range(g.size // 2)) for g in heads})
    small = cp.apply(model, plan, x[:2])
    repaired = repair(small, model, [(x, None)], plan)
    assert repaired.layers and error(repaired.model, model, [(x, None)]) < 0.9 * error(small, model, [(x, None)])


def _block_input(model: nn.Module) -> tuple[int, int, int]:
    width = next(p.shape[-1] for p in model.parameters() if p.ndim == 2)
    return 64, 5, width


def test_more_examples_or_memory_are_not_used_than_allowed(caplog: pytest.LogCaptureFixture) -> None:
    small, model, plan, given = pruned()
    assert repair(small, model, given, plan, examples=20).examples == 20
    whole = repair(small, model, given, plan)
    with caplog.at_level("INFO"):
        less = repair(small, model, given, plan, memory=whole.bytes // 2)
    assert less.examples == whole.examples // 2 and less.bytes <= whole.bytes // 2
    assert "repair uses 24 of 48 examples" in caplog.text


def test_gram_matrices_of_all_products_in_one_pass() -> None:
    model, given = net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), batches(4)
    found = {name: gram for name, _, gram in grams(model, given)}
    x = torch.cat([x for x, _ in given])
    with torch.no_grad():
        hidden = model[:2](x)
    torch.testing.assert_close(found["0.weight"][0], x.mT @ x)
    torch.testing.assert_close(found["2.weight"][0], hidden.mT @ hidden)
    assert [name for name, _, _ in grams(model, given, ["2.weight"])] == ["2.weight"]


def test_what_cannot_be_repaired_is_named_with_the_reason() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.up = nn.Linear(4, 4), nn.ConvTranspose1d(1, 1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.layer(self.layer(x))[:, None])

    model = disturbed(Tied().double())
    changed = disturbed(deepcopy(model), 8)
    left = repair(changed, model, batches(4)).left
    assert left["layer.weight"] == "several operators read it" and "conv_transpose1d" in left["up.weight"]


class Restless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum().item() > 0 else self.layer(-x)


def refused(**changes: object) -> str:
    model = net(nn.Linear(4, 6), nn.Linear(6, 2))
    options: dict[str, object] = {"model": disturbed(deepcopy(model)), "original": model, "batches": batches(4), **changes}
    with pytest.raises(ValueError) as caught:
        repair(**options)  # type: ignore[arg-type]
    return str(caught.value)


def test_every_refusal() -> None:
    assert "2 or more calibration examples" in refused(batches=[])
    assert "2 or more calibration examples" in refused(examples=1)
    assert "held_out must be a share" in refused(held_out=1.0)
    assert "ridges must be" in refused(ridges=())
    assert "ridges must be" in refused(ridges=(0.0,))
    assert "no layer multiplies by absent; there are 0.weight, 1.weight" in refused(names=["absent"])
    assert "memory allows" in refused(memory=1)
    assert "give the plan" in refused(model=net(nn.Linear(4, 5), nn.Linear(5, 2)))
    assert "torch.export cannot follow it" in refused(model=Restless().double(), original=Restless().double())
    spoiled = net(nn.Linear(4, 6), nn.Linear(6, 2))
    with torch.no_grad():
        spoiled[0].weight[0, 0] = torch.nan
    assert "not finite" in refused(model=spoiled)


def test_a_repaired_model_says_what_it_took() -> None:
    small, model, plan, given = pruned()
    seen: list[tuple[int, int]] = []
    found: Repaired = repair(small, model, given, plan, progress=lambda *n: seen.append(n))
    assert found.examples == 48 and found.bytes > 0
    assert all(b[0] == a[0] + 1 for a, b in pairwise(seen)) and seen[-1][0] == seen[-1][1]
