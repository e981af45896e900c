"""Implants: what a plan says of them is what comes out, and at full rank nothing changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from test_laws import comparable, random_plan
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO, Case, make

from curvepress.costs import cost
from curvepress.export import to_onnx
from curvepress.implants import Implant, full_rank, orders
from curvepress.plan import Plan, after, edits, from_json, to_json
from curvepress.quantization.quantized import Bits, calibrate, quantize
from curvepress.repairing.refitting import fit_implants, implant_prices, moments
from curvepress.runs.artifacts import restore, save
from curvepress.structure import Structure
from curvepress.surgery.cutting import apply
from curvepress.surgery.implanting import implant as implant_of
from curvepress.surgery.layers import refusal
from curvepress.surgery.masking import masked_output
from curvepress.surgery.truncation import Truncation
from curvepress.tracing.watching import trace


def replaceable(case: Case, structure: Structure) -> list[str]:
    """Weights that can have an implant."""
    able = []
    for name, spec in structure.tensors.items():
        try:
            Plan(structure, {}, implants={name: Implant("low_rank", 1)})
        except ValueError:
            continue
        tied = sum(p is case.model.get_parameter(name) for _, p in case.model.named_parameters(remove_duplicate=False)) > 1
        if not tied and not refusal(case.model.get_submodule(name.removesuffix(".weight"))) and spec.positions:
            able.append(name)
    return able


def with_implants(case: Case, structure: Structure, seed: int, keep: dict[str, tuple[int, ...]]) -> Plan:
    """Random implants of both kinds for about two thirds of the weights, where they are allowed."""
    rng, implants = random.Random(seed), {}
    stays = edits(Plan(structure, keep))
    for name in replaceable(case, structure):
        left = [len(stays.get((name, d), range(k))) for d, k in enumerate(structure.tensors[name].shape)]
        options = [Implant("low_rank", rng.randint(2, full_rank(left)))] if full_rank(left) > 2 else []
        rows = stays.get((name, 0), range(left[0]))
        if left[0] > 2:
            options.append(Implant("pointwise", channels=tuple(sorted(int(c) for c in rng.sample(list(rows), left[0] // 2)))))
        rng.shuffle(options)
        for option in options if rng.random() < 0.67 else ():
            try:
                Plan(structure, keep, implants={**implants, name: option})
            except ValueError as error:
                assert "low_rank" in str(error) or "must name the same" in str(error)
                continue
            implants[name] = option
            break
    return Plan(structure, keep, implants=implants)


CASES = [(name, seed) for name in ZOO for seed in (0, 1)]


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> tuple[Case, Plan, nn.Module]:
    """A network, a plan with implants, of the second seed with pruning too, and what comes of it."""
    name, seed = request.param
    made = make(name, seed)
    structure = trace(made.model, *made.example)
    plan = with_implants(made, structure, seed, dict(random_plan(structure, seed, least=4).keep) if seed else {})
    return made, plan, apply(made.model, plan, *made.example)


def test_cost_is_known_without_the_model(case: tuple[Case, Plan, nn.Module]) -> None:
    made, plan, small = case
    now = cost(plan)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        small(*made.example)
    unique = {id(t): t for t in small.state_dict(keep_vars=True).values()}.values()
    assert now.params == sum(p.numel() for p in small.parameters())
    assert now.bytes == sum(t.numel() * t.element_size() for t in unique)
    assert 2 * now.macs * len(made.example[0]) == counter.get_total_flops()


def worded(structure: Structure) -> object:
    """A layer without a bias is another operator, which the reason of a frozen input names."""
    tensors, groups = comparable(structure)
    return tensors, [(n, s, m, f.replace("addmm", "mm")) for n, s, m, f in groups]


def test_tracing_the_result_gives_the_structure_after(case: tuple[Case, Plan, nn.Module]) -> None:
    made, plan, small = case
    assert worded(trace(small, *made.example)) == worded(after(plan))


def test_json_round_trip(case: tuple[Case, Plan, nn.Module]) -> None:
    assert from_json(to_json(case[1])) == case[1]


def test_the_result_is_cut_again_its_inner_channels_too(case: tuple[Case, Plan, nn.Module]) -> None:
    made, plan, small = case
    now = after(plan)
    second = random_plan(now, 5, least=1)
    inner = {n.removesuffix(".weight") + ".down": i.rank for n, i in plan.implants.items() if i.kind == "low_rank"}
    assert {n: now[n].size for n in inner if n in {g.name for g in now.groups}} == inner
    smaller = apply(small, second, *made.example)
    assert cost(second).params == sum(p.numel() for p in smaller.parameters())


def test_the_original_is_untouched_and_the_result_trains(case: tuple[Case, Plan, nn.Module], request: pytest.FixtureRequest) -> None:
    made, _, small = case
    fresh = make(*request.node.callspec.params["case"])
    assert all(torch.equal(a, b) for a, b in zip(fresh.model.state_dict().values(), made.model.state_dict().values(), strict=True))
    small(*made.example).square().mean().backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if "spare" not in n)
    small.zero_grad()


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("cut", [False, True])
def test_full_rank_implants_change_nothing(name: str, cut: bool) -> None:
    made = make(name)
    structure = trace(made.model, *made.example)
    keep = dict(random_plan(structure, 3).keep) if cut else {}
    stays = edits(Plan(structure, keep))
    shapes = {n: [len(stays.get((n, d), range(k))) for d, k in enumerate(t.shape)] for n, t in structure.tensors.items()}
    plan = Plan(structure, keep, implants={n: Implant("low_rank", full_rank(shapes[n])) for n in replaceable(made, structure)})
    assert plan.implants
    wanted = masked_output(made.model, Plan(structure, keep), made.example)
    torch.testing.assert_close(apply(made.model, plan, *made.example)(*made.example), wanted, rtol=1e-9, atol=1e-9)


def one_layer(weight: Tensor, implant: Implant) -> Tensor:
    """The dense weight that an implant of a layer amounts to, channels in the layer's own order."""
    model = nn.Sequential(nn.Conv2d(weight.shape[1], len(weight), weight.shape[2:], padding=1, bias=False), nn.Conv2d(len(weight), 1, 1))
    model.double()[0].weight.data.copy_(weight)
    x = torch.randn(2, weight.shape[1], 5, 5, dtype=torch.float64)
    structure = trace(model, x)
    return implant_of(model, Plan(structure, {}, implants={"0.weight": implant})).reference[0].weight


def test_a_truncation_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    best = (u[:, :2] * s[:2] @ v[:2]).view_as(weight)
    torch.testing.assert_close(one_layer(weight, Implant("low_rank", 2)), best)


def test_a_pointwise_implant_begins_with_the_centres_of_the_channels_it_names() -> None:
    weight = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    wanted = weight.clone()
    wanted[[1, 4]] = 0
    wanted[[1, 4], :, 1, 1] = weight[[1, 4], :, 1, 1]
    assert torch.equal(one_layer(weight, Implant("pointwise", channels=(4, 1))), wanted)


def test_data_and_curvature_make_the_weighted_error_least() -> None:
    """The error of every rank is what the residual leaves, and no other weight of the rank, near or far, has less."""
    torch.manual_seed(1)
    weight = torch.randn(5, 8, dtype=torch.float64)
    gram, bend = (a @ a.T for a in (torch.randn(8, 9, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)))
    bend = bend - 1e-3 * bend.diagonal().mean() * torch.eye(5)  # what the damping will add
    whole = Truncation(weight, gram, bend)
    damped = bend + 1e-3 * bend.diagonal().mean() * torch.eye(5)

    def error(d: Tensor) -> float:
        return float(torch.trace(damped @ d @ gram @ d.T))

    for rank in range(1, 5):
        up, down = whole.factors(rank)
        least = error(up @ down - weight)
        assert least == pytest.approx(whole.error(rank), rel=1e-6)
        others = [
            error((up + e * torch.randn_like(up)) @ (down + e * torch.randn_like(down)) - weight) for e in (0.01, 0.1) for _ in range(20)
        ]
        plain = Truncation(weight).residual(rank)
        assert least < min(others) and least < error(plain)
    assert whole.residual(5).abs().max() < 1e-12


def task() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 4)).double()
    return model, [(torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(4, (8,))) for _ in range(3)]


def loss(y: Tensor, t: Tensor) -> Tensor:
    return nn.functional.cross_entropy(y, t)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_truncation_is_its_own_repair_so_that_its_price_is_one_after_repair(rank: int) -> None:
    """Least squares for ``up``, given what ``down`` makes of the data, finds the ``up`` that is there, for any curvature of the outputs."""
    generator = torch.Generator().manual_seed(rank)
    weight, x, slopes = (torch.randn(n, m, generator=generator, dtype=torch.float64) for n, m in ((7, 9), (60, 9), (40, 7)))
    gram = x.T @ x
    up, down = Truncation(weight, gram, slopes.T @ slopes).factors(rank)
    refitted = torch.linalg.solve(down @ gram @ down.T, down @ gram @ weight.T).T
    torch.testing.assert_close(refitted, up, rtol=1e-4, atol=1e-5)  # up to damping


def test_moments_are_those_of_a_dense_computation() -> None:
    model, batches = task()
    found = moments(model, batches, ["0.weight", "3.weight"], loss=loss)
    x = torch.cat([b[0] for b in batches])
    columns = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
    torch.testing.assert_close(found["0.weight"].gram, columns.T @ columns / 24, rtol=1e-5, atol=1e-5)
    p = model(x).softmax(1)
    wanted = torch.diag(p.mean(0)) - p.T @ p / 24
    rounds = [moments(model, batches, ["3.weight"], loss=loss, seed=s)["3.weight"].curvature for s in range(200)]
    torch.testing.assert_close(torch.stack(rounds).mean(0), wanted.detach(), rtol=0.1, atol=0.01)


def test_fitting_lessens_the_error_on_the_data_and_touches_implants_only() -> None:
    model, batches = task()
    x = torch.cat([b[0] for b in batches])
    structure = trace(model, x)
    for implant in (Implant("low_rank", 2), Implant("pointwise", channels=(1, 2, 5))):
        plan = Plan(structure, {"0": (0, 1, 2, 4, 5)}, implants={"0.weight": implant})
        small = apply(model, plan, x)
        fitted = fit_implants(small, model, batches, plan)
        order = [0, 4, 1, 2, 5] if implant.kind == "pointwise" else [0, 1, 2, 4, 5]
        wanted = model[0](x)[:, order]
        assert (fitted[0](x) - wanted).norm() < (small[0](x) - wanted).norm()
        assert torch.equal(fitted[3].weight, small[3].weight)


def test_prices_are_half_the_curvature_along_what_is_left() -> None:
    model, batches = task()
    structure = trace(model, batches[0][0])
    found = implant_prices(model, loss, batches, structure, wanted={"3.weight": (1, 2, 4)}, estimator="exact", weighted=False)["3.weight"]
    x = torch.cat([b[0] for b in batches])
    inner, p = model[:3](x), model(x).softmax(1).detach()
    change = inner @ Truncation(model[3].weight, moments(model, batches, ["3.weight"])["3.weight"].gram).residual(2).T
    wanted = 0.5 * ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean()
    assert found[2].rise == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert found[1].rise > found[2].rise > found[4].rise == pytest.approx(0, abs=1e-12)
    assert (found[2].params, found[2].macs) == (96 * 4 - 2 * 100, 96 * 4 - 2 * 100)
    traced = implant_prices(model, loss, batches, structure, wanted={"3.weight": (2,)}, price="trace", estimator="exact")
    assert traced["3.weight"][2].rise > 0


def test_ranks_above_the_number_of_examples_are_free_on_these_and_not_on_others() -> None:
    model, batches = task()
    few, others = [(x[:1], y[:1]) for x, y in batches[:2]], [(x[1:], y[1:]) for x, y in batches[:2]]
    structure = trace(model, batches[0][0])
    own, held_out = (
        implant_prices(model, loss, few, structure, held_out=h, wanted={"3.weight": (2,)}, estimator="exact", weighted=False, temperature=t)
        for h, t in ((None, 4.0), (others, 1.0))
    )
    assert own["3.weight"][2].rise == pytest.approx(0, abs=1e-9)
    x = torch.cat([b[0] for b in others])
    inner, p = model[:3](x), model(x).softmax(1).detach()
    change = inner @ Truncation(model[3].weight, moments(model, few, ["3.weight"])["3.weight"].gram).residual(2).T
    wanted = 0.5 * ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean()
    assert held_out["3.weight"][2].rise == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_a_model_with_implants_is_restored_exported_and_quantized(tmp_path: Path) -> None:
    made = make("resnet")
    model, x = made.model.float(), made.example[0].float()
    structure = trace(model, x)
    plan = Plan(
        structure,
        {"stem.0": (0, 1, 2, 5, 6)},
        implants={"blocks.0.conv1.0.weight": Implant("low_rank", 3), "blocks.1.conv1.0.weight": Implant("pointwise", channels=(1, 2, 9))},
    )
    small = apply(model, plan, x)
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1.1)
    save(small, tmp_path / "small.safetensors")
    again = restore(make("resnet", 9).model.float(), from_json(to_json(plan)), tmp_path / "small.safetensors")
    assert torch.equal(again(x), small(x))
    to_onnx(small, x, tmp_path / "small.onnx")  # runs the file and compares
    module = quantize(small, Bits(), x)
    calibrate(module, [(x, torch.arange(4))])
    with torch.no_grad():
        assert float((module.eval()(x) - small(x)).norm()) < 0.2 * float(small(x).norm())


@pytest.mark.parametrize(
    ("implants", "message"),
    [
        ({"nowhere.weight": Implant("low_rank", 1)}, "no weight of a convolution or linear layer; those are features.0.weight"),
        ({"features.1.weight": Implant("low_rank", 1)}, "no weight of a convolution"),
        ({"features.0.bias": Implant("low_rank", 1)}, "no weight of a convolution"),
        ({"features.0.weight": Implant("sparse", 1)}, "low_rank or pointwise"),
        ({"features.0.weight": Implant("low_rank", 0)}, "rank of 1 to 6"),
        ({"features.0.weight": Implant("low_rank", 7)}, "rank of 1 to 6"),
        ({"features.0.weight": Implant("low_rank", 2, (1,))}, "no channels"),
        ({"features.0.weight": Implant("pointwise", channels=(1, 1))}, "distinct"),
        ({"features.0.weight": Implant("pointwise", channels=(6,))}, r"in \[0, 6\)"),
        ({"features.0.weight": Implant("pointwise", channels=())}, "some but not all"),
        ({"features.0.weight": Implant("pointwise", channels=tuple(range(6)))}, "some but not all"),
        ({"classifier.0.weight": Implant("pointwise", channels=(1,))}, "odd kernels above 1"),
    ],
)
def test_incoherent_implants_are_refused(implants: dict[str, Implant], message: str) -> None:
    made = make("vgg")
    with pytest.raises(ValueError, match=message):
        Plan(trace(made.model, *made.example), {}, implants=implants)


def test_what_pruning_leaves_bounds_ranks_and_channels() -> None:
    made = make("vgg")
    structure = trace(made.model, *made.example)
    with pytest.raises(ValueError, match="rank of 1 to 3"):
        Plan(structure, {"features.0": (0, 1, 2)}, implants={"features.0.weight": Implant("low_rank", 4)})
    with pytest.raises(ValueError, match="some but not all"):
        Plan(structure, {"features.0": (0, 1, 2)}, implants={"features.0.weight": Implant("pointwise", channels=(3, 4))})


def test_layers_that_make_one_group_agree_on_what_moves() -> None:
    made = make("resnet")
    structure = trace(made.model, *made.example)
    chosen = {"stem.0.weight": (1, 2, 3), "blocks.0.conv2.0.weight": (2, 3)}
    plan = Plan(structure, {}, implants={n: Implant("pointwise", channels=c) for n, c in chosen.items()})
    assert orders(structure, plan.implants)["stem.0"].tolist() == [0, 4, 5, 6, 7, 1, 2, 3]
    apply(made.model, plan, *made.example)
    with pytest.raises(ValueError, match="must name the same channels"):
        Plan(structure, {}, implants={n: Implant("pointwise", channels=(k,)) for k, n in enumerate(chosen)})


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [("tied", "b.weight", "tied to c.weight"), ("resnext", "b.0.weight", "4 groups")],
)
def test_layers_that_cannot_be_replaced_are_refused(name: str, weight: str, message: str) -> None:
    made = make(name)
    structure = trace(made.model, *made.example)
    with pytest.raises(ValueError, match=message):
        apply(made.model, Plan(structure, {}, implants={weight: Implant("low_rank", 2)}), *made.example)
