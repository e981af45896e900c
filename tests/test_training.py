"""Laws of training: nothing given is changed, the same call gives the same bits, and a checkpoint changes no result."""

import json
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from curvepress.training.batchnorm import reestimate
from curvepress.training.fitting import fit

EXAMPLES, FEATURES, CLASSES = 48, 6, 3
INPUTS = torch.randn(EXAMPLES, FEATURES, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(CLASSES, (EXAMPLES,), generator=torch.Generator().manual_seed(2))


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Everything that makes training hard to repeat: dropout, and statistics that only batches change."""
    torch.manual_seed(3)
    layers = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def shuffled(seed: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(seed))
    return [(INPUTS[rows], LABELS[rows]) for rows in order.split(16)]


def unsized(seed: int):
    yield from shuffled(seed)


def negative_loss(model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return {"score": -F.cross_entropy(model(INPUTS), LABELS).item(), "first": model[0].weight[0, 0].item()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


# What fit returns


def test_the_given_model_teacher_and_random_state_are_untouched():
    model, teacher = network().train(), network().train()
    before, state = deepcopy(model), torch.get_rng_state()
    fitted = fit(model, F.cross_entropy, shuffled, epochs=2, lr=0.1, teacher=teacher, evaluate=negative_loss)
    assert equal(model, before) and equal(teacher, before) and not equal(fitted.model, before)
    assert all(p.grad is None for p in (*model.parameters(), *teacher.parameters()))
    assert model.training and model[3].training and teacher.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_result_is_in_eval_mode_and_keeps_dtypes_and_names():
    model = network(torch.float64)
    fitted = fit(model, F.cross_entropy, lambda seed: [(x.double(), y) for x, y in shuffled(seed)], epochs=1, lr=0.1).model
    assert not any(part.training for part in fitted.modules())
    assert {n: t.dtype for n, t in tensors(fitted).items()} == {n: t.dtype for n, t in tensors(model).items()}


def test_no_epochs_give_an_equal_copy():
    model = network()
    fitted = fit(model, F.cross_entropy, shuffled, epochs=0, lr=0.1)
    assert fitted.history == () and equal(fitted.model, model) and fitted.model is not model


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    def run(seed: int, noise: int) -> nn.Module:
        torch.manual_seed(noise)
        return fit(network(), F.cross_entropy, shuffled, epochs=2, lr=0.1, seed=seed).model

    assert equal(run(5, noise=1), run(5, noise=2))
    assert not equal(run(5, noise=1), run(6, noise=1))


def test_batches_are_called_once_an_epoch_each_time_with_another_seed():
    seeds: list[int] = []

    def noted(seed: int) -> list[tuple[Tensor, Tensor]]:
        seeds.append(seed)
        return shuffled(seed)

    fit(network(), F.cross_entropy, noted, epochs=3, lr=0.1, seed=1)
    fit(network(), F.cross_entropy, noted, epochs=3, lr=0.1, seed=2)
    assert len(seeds) == len(set(seeds)) == 6


def test_frozen_parameters_stay_and_the_others_move():
    model = network()
    model[0].weight.requires_grad_(False)
    fitted = fit(model, F.cross_entropy, shuffled, epochs=1, lr=0.1).model
    assert torch.equal(fitted[0].weight, model[0].weight) and not fitted[0].weight.requires_grad
    assert not torch.equal(fitted[0].bias, model[0].bias) and not torch.equal(fitted[4].weight, model[4].weight)


@pytest.mark.parametrize(("scores", "best"), [((1, 3, 3, 2), 2), ((4, 3, 2, 1), 1), ((1, 2, 3, 4), 4), ((0, -1, 0, 0), 1)])
def test_the_best_epoch_is_returned_and_of_equals_the_earliest(scores, best):
    seen: list[nn.Module] = []

    def scripted(model: nn.Module) -> dict[str, float]:
        seen.append(deepcopy(model))
        return {"score": scores[len(seen) - 1], "other": -scores[len(seen) - 1]}

    fitted = fit(network(), F.cross_entropy, shuffled, epochs=4, lr=0.1, evaluate=scripted)
    assert equal(fitted.model, seen[best - 1]) and not any(equal(seen[n], seen[best - 1]) for n in range(4) if n != best - 1)
    assert [e.metrics["score"] for e in fitted.history] == list(scores)


def test_without_evaluation_the_last_epoch_is_returned():
    last: list[nn.Module] = []
    fit(network(), F.cross_entropy, shuffled, epochs=3, lr=0.1, evaluate=lambda m: last.append(deepcopy(m)) or {"score": 0})
    assert equal(fit(network(), F.cross_entropy, shuffled, epochs=3, lr=0.1).model, last[-1])


def test_the_model_is_evaluated_in_eval_mode_and_trained_in_training_mode():
    modes: list[bool] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        modes.append(watched.training)
        return F.cross_entropy(output, targets)

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def __deepcopy__(self, memo):
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    watched = Watched()
    fit(watched, loss, shuffled, epochs=2, lr=0.1, evaluate=lambda m: modes.append(m.training) or {"score": 0.0})
    assert modes == [True, True, True, False] * 2


# Steps


def scalar_steps(batches, **settings) -> list[float]:
    """The learning rate of every step, read off a parameter whose gradient is one."""
    model, seen = nn.Linear(1, 1, bias=False).double(), []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(output.item())
        return output.sum()

    fitted = fit(model, loss, batches, momentum=0.0, weight_decay=0.0, **settings)
    seen.append(fitted.model.weight.item())
    return [before - after for before, after in pairwise(seen)]


def ones(seed: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(1, 1).double(), torch.zeros(1))] * 4


def theirs(scheduler, steps: int, every: int = 1) -> list[float]:
    rates = []
    for step in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


@pytest.mark.parametrize("batches", [ones, lambda seed: iter(ones(seed))], ids=["sized", "unsized"])
def test_the_cosine_schedule_is_that_of_torch_stepped_every_batch(batches):
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    expected = theirs(torch.optim.lr_scheduler.CosineAnnealingLR(plain, 12), 12)
    assert scalar_steps(batches, epochs=3, lr=0.3) == pytest.approx(expected, rel=1e-9)


def test_the_step_schedule_is_that_of_torch_stepped_every_epoch():
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    expected = theirs(torch.optim.lr_scheduler.MultiStepLR(plain, [1, 3]), 16, every=4)
    got = scalar_steps(ones, epochs=4, lr=0.3, schedule="step", milestones=(1, 3))
    assert got == pytest.approx(expected, rel=1e-9)
    assert got[::4] == pytest.approx([0.3, 0.03, 0.03, 0.003], rel=1e-9)


def test_the_constant_schedule_and_the_rates_in_the_history():
    assert scalar_steps(ones, epochs=2, lr=0.3, schedule="constant") == pytest.approx([0.3] * 8, rel=1e-9)
    history = fit(network(), F.cross_entropy, shuffled, epochs=4, lr=0.2).history
    assert [e.lr for e in history] == pytest.approx([0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5])
    assert [e.epoch for e in history] == [1, 2, 3, 4] and all(e.seconds > 0 for e in history)


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"optimizer": "sgd", "momentum": 0.8}, lambda p: torch.optim.SGD(p, 0.1, 0.8, weight_decay=0.01, nesterov=True)),
        ({"optimizer": "adamw", "momentum": 0.8}, lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.999), weight_decay=0.01)),
    ],
)
def test_fit_is_the_plain_loop_of_torch(settings, optimizer):
    model = nn.Linear(FEATURES, CLASSES)
    plain, losses = deepcopy(model), []
    descent = optimizer(plain.parameters())
    for inputs, targets in [(INPUTS[:20], LABELS[:20]), (INPUTS[20:], LABELS[20:])]:
        descent.zero_grad()
        loss = F.cross_entropy(plain(inputs), targets)
        loss.backward()
        descent.step()
        losses.append(loss.item() * len(inputs))
    halves = [(INPUTS[:20], LABELS[:20]), (INPUTS[20:], LABELS[20:])]
    fitted = fit(model, F.cross_entropy, lambda seed: halves, epochs=1, lr=0.1, schedule="constant", weight_decay=0.01, **settings)
    assert equal(fitted.model, plain)
    assert fitted.history[0].loss == pytest.approx(sum(losses) / EXAMPLES)


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_in_full():
    seen: list[torch.dtype] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(output.dtype)
        return F.cross_entropy(output, targets)

    fitted = fit(network(), loss, shuffled, epochs=1, lr=0.1, precision="bfloat16")
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in fitted.model.parameters()} == {torch.float32}
    full = fit(network(), loss, shuffled, epochs=1, lr=0.1)
    assert fitted.history[0].loss == pytest.approx(full.history[0].loss, rel=0.02) and not equal(fitted.model, full.model)


def test_models_of_several_inputs_and_tied_weights_are_trained():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(FEATURES, FEATURES)
            self.two = self.one

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.two(self.one(x)) + y

    pairs = [((INPUTS, INPUTS), LABELS)]
    fitted = fit(Tied(), F.cross_entropy, lambda seed: pairs, epochs=2, lr=0.1)
    assert fitted.model.one is fitted.model.two and fitted.history[1].loss < fitted.history[0].loss


# Distillation


def test_a_teacher_equal_to_the_student_teaches_nothing():
    model = nn.Linear(FEATURES, CLASSES).double()
    whole = [(INPUTS.double(), LABELS)]
    settings = {"epochs": 2, "lr": 0.5, "weight_decay": 0.0, "teacher": model, "distill_weight": 1.0}
    fitted = fit(model, F.cross_entropy, lambda seed: whole, **settings)
    assert torch.allclose(fitted.model.weight, model.weight, rtol=0, atol=1e-14)
    assert [e.loss for e in fitted.history] == pytest.approx([0, 0], abs=1e-14)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 4.0), (0.3, 2.0), (0.0, 4.0)])
def test_distillation_descends_the_gradient_of_hinton_et_al(weight, temperature):
    student, teacher = nn.Linear(FEATURES, CLASSES, bias=False).double(), nn.Linear(FEATURES, CLASSES, bias=False).double()
    inputs = INPUTS.double()
    settings = {"epochs": 1, "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "teacher": teacher}
    batches = [(inputs, LABELS)]
    fitted = fit(student, F.cross_entropy, lambda s: batches, temperature=temperature, distill_weight=weight, **settings)
    with torch.no_grad():
        logits, wanted = student(inputs), teacher(inputs)
        hard = logits.softmax(1) - F.one_hot(LABELS, CLASSES)
        soft = temperature * ((logits / temperature).softmax(1) - (wanted / temperature).softmax(1))
        gradient = ((1 - weight) * hard + weight * soft).T @ inputs / EXAMPLES
    assert torch.allclose(fitted.model.weight, student.weight - 0.5 * gradient, rtol=0, atol=1e-12)


def test_the_teacher_speaks_in_eval_mode():
    student = nn.Linear(FEATURES, CLASSES)
    one = fit(student, F.cross_entropy, shuffled, epochs=1, lr=0.1, teacher=network().train())
    other = fit(student, F.cross_entropy, shuffled, epochs=1, lr=0.1, teacher=network().eval())
    assert equal(one.model, other.model)


def test_distillation_refuses_what_are_not_logits_of_one_shape():
    narrow = nn.Linear(FEATURES, CLASSES - 1)
    with pytest.raises(ValueError, match=r"logits \[examples, classes\]"):
        fit(network(), F.cross_entropy, shuffled, epochs=1, lr=0.1, teacher=narrow)


# Checkpoints


class Broken(Exception):
    pass


def breaking(batches, epoch: int, step: int):
    """``batches`` that raise in the given epoch and step, both counted from one."""
    calls = []

    def interrupted(seed: int):
        calls.append(seed)
        for n, batch in enumerate(batches(seed)):
            if len(calls) == epoch and n + 1 == step:
                raise Broken
            yield batch

    return interrupted


HARD = {"epochs": 4, "lr": 0.05, "evaluate": negative_loss, "seed": 7}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("more", [{"schedule": "constant"}, {"schedule": "step", "milestones": (1, 3)}, {"teacher": network()}, {}])
def test_an_interrupted_run_that_continues_is_bit_for_bit_the_uninterrupted_one(tmp_path, optimizer, more):
    settings = {**HARD, "optimizer": optimizer, **more}
    batches = shuffled if "schedule" in more else unsized
    straight = fit(network(), F.cross_entropy, batches, **settings)
    cut = 3 if "schedule" in more else 4  # the cosine schedule counts generators in one more call
    for epoch, step in ((cut, 2), (cut - 1, 3)):  # done: two epochs, then at least one more
        with pytest.raises(Broken):
            fit(network(), F.cross_entropy, breaking(batches, epoch, step), checkpoints=tmp_path, **settings)
        torch.manual_seed(epoch)  # whatever else happens to the generator in between
        if epoch == cut:
            assert len(json.loads((tmp_path / "training.json").read_text())["history"]) == 2
    resumed = fit(network(), F.cross_entropy, batches, checkpoints=tmp_path, **settings)
    assert equal(resumed.model, straight.model)
    assert resumed.history == straight.history and len(resumed.history) == 4


def test_the_best_model_survives_an_interruption(tmp_path):
    def run(batches, scores: list[int], **more):
        return fit(
            network(), F.cross_entropy, batches, epochs=4, lr=0.1, schedule="constant", evaluate=lambda m: {"score": scores.pop(0)}, **more
        )

    straight = run(shuffled, [5, 1, 2, 3])
    with pytest.raises(Broken):
        run(breaking(shuffled, 3, 1), [5, 1], checkpoints=tmp_path)
    resumed = run(shuffled, [2, 3], checkpoints=tmp_path)
    assert resumed.history == straight.history and equal(resumed.model, straight.model)


def test_a_finished_run_is_read_back_without_training(tmp_path):
    done = fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)
    again = fit(network(), F.cross_entropy, lambda seed: pytest.fail("trained again"), checkpoints=tmp_path, **HARD)
    assert equal(done.model, again.model) and done.history == again.history


def test_a_checkpoint_is_one_file_of_tensors_and_one_of_json(tmp_path):
    seen: list[list[str]] = []
    folder = tmp_path / "new" / "run"
    fit(network(), F.cross_entropy, shuffled, epochs=2, lr=0.1, checkpoints=folder,
        progress=lambda epoch: seen.append(sorted(p.name for p in folder.iterdir())))  # fmt: skip
    assert seen == [["epoch-1.safetensors", "training.json"], ["epoch-2.safetensors", "training.json"]]


def test_progress_receives_every_record():
    seen = []
    fitted = fit(network(), F.cross_entropy, shuffled, progress=seen.append, **HARD)
    assert tuple(seen) == fitted.history


def test_tied_weights_are_stored_and_read_back(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    batches = [(torch.randn(8, 4), torch.randint(4, (8,)))]
    settings = {"epochs": 2, "lr": 0.1, "checkpoints": tmp_path}
    done = fit(model, F.cross_entropy, lambda seed: batches, **settings)
    again = fit(model, F.cross_entropy, lambda seed: pytest.fail("trained again"), **settings)
    assert again.model[0].weight is again.model[1].weight and equal(done.model, again.model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.06}, "lr: 0.05 there, 0.06 here"),
        ({"epochs": 5}, "epochs: 4 there, 5 here"),
        ({"seed": 8}, "seed: 7 there, 8 here"),
        ({"optimizer": "adamw"}, "optimizer: sgd there, adamw here"),
        ({"precision": "bfloat16"}, "precision: full there, bfloat16 here"),
        ({"teacher": network()}, "teacher: "),
        ({"evaluate": None}, "evaluate: True there, False here"),
    ],
)
def test_a_checkpoint_of_another_call_is_refused(tmp_path, change, named):
    fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)
    with pytest.raises(ValueError, match=f"of another call.*{named}.*another folder"):
        fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **{**HARD, **change})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)
    other = network()
    with torch.no_grad():
        other[4].bias[0] += 1e-6
    wider = nn.Sequential(nn.Linear(FEATURES, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, CLASSES))
    for model in (other, wider):
        with pytest.raises(ValueError, match="of another call .*model: "):
            fit(model, F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["training.json", "epoch-4.safetensors"])
@pytest.mark.parametrize("harm", [cut_short, flip_a_bit, lambda path: path.write_text("[]"), lambda path: path.write_bytes(b"\xff")])
def test_a_damaged_checkpoint_is_refused(tmp_path, name, harm):
    fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)
    harm(tmp_path / name)
    with pytest.raises(ValueError, match=r"is damaged \(.*delete it to start again"):
        fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)


def test_a_checkpoint_without_its_tensors_or_of_another_version_is_refused(tmp_path):
    fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)
    state = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(ValueError, match="damaged .*version 99"):
        fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)
    (tmp_path / "training.json").write_text(json.dumps(state))
    (tmp_path / "epoch-4.safetensors").unlink()
    with pytest.raises(ValueError, match=r"damaged .*epoch-4\.safetensors"):
        fit(network(), F.cross_entropy, shuffled, checkpoints=tmp_path, **HARD)


# What fit refuses


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1}, {"epochs": 1.5}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"optimizer": "lbfgs"},
        {"schedule": "linear"}, {"precision": "half"},
        {"milestones": (1,)}, {"milestones": (2, 1), "schedule": "step"}, {"milestones": (), "schedule": "step"}, {"momentum": 1.0},
        {"weight_decay": -1.0}, {"temperature": 0.0}, {"distill_weight": 1.1}, {"seed": -1},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_named(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} must be .*; got ") as caught:
        fit(network(), F.cross_entropy, shuffled, **{"epochs": 1, "lr": 0.1, **wrong})
    assert str(value) in str(caught.value)


def test_batches_that_are_no_function_or_give_nothing_are_refused():
    with pytest.raises(ValueError, match="function of a seed .* got a list"):
        fit(network(), F.cross_entropy, shuffled(0), epochs=1, lr=0.1)
    with pytest.raises(ValueError, match="epoch 1 had no batches"):
        fit(network(), F.cross_entropy, lambda seed: [], epochs=1, lr=0.1)
    spent = iter(shuffled(0))
    with pytest.raises(ValueError, match="epoch 2 had no batches"):
        fit(network(), F.cross_entropy, lambda seed: spent, epochs=2, lr=0.1, schedule="constant")


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        fit(network().requires_grad_(False), F.cross_entropy, shuffled, epochs=1, lr=0.1)


@pytest.mark.parametrize("metrics", [{}, {"score": float("nan")}, {"score": float("inf")}])
def test_metrics_that_cannot_choose_an_epoch_are_refused(metrics):
    with pytest.raises(ValueError, match="first is a finite number"):
        fit(network(), F.cross_entropy, shuffled, epochs=1, lr=0.1, evaluate=lambda model: metrics)


@pytest.mark.parametrize(("step", "told"), [(1, "epoch 1, step 1, .*it is the first"), (5, "epoch 2, step 2, .*try a smaller lr")])
def test_a_loss_that_is_not_finite_stops_training_and_says_where(step, told):
    steps = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        steps.append(1)
        return F.cross_entropy(output, targets) * (float("nan") if len(steps) == step else 1.0)

    with pytest.raises(ValueError, match=f"{told}") as caught:
        fit(network(), loss, shuffled, epochs=3, lr=0.123, schedule="constant")
    assert "at lr 0.123" in str(caught.value) and "nan" in str(caught.value)


def test_weights_that_the_last_step_blew_up_are_not_returned():
    whole = [(INPUTS, LABELS)]
    with pytest.raises(ValueError, match="last step of epoch 1 .*not finite.* smaller lr"):
        fit(nn.Linear(FEATURES, CLASSES), lambda o, t: o.square().mean() * 1e30, lambda seed: whole, epochs=1, lr=1e30)


# Statistics read again


class Operator(nn.Module):
    """Batch normalisation as an exported graph calls it."""

    operator = torch.ops.aten.batch_norm.default

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.full((width,), 3.0))
        self.register_buffer("var", torch.full((width,), 5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, None, None, self.mean, self.var, self.training, self.momentum, 1e-5, False)


class Packet(Operator):
    operator = torch.ops.aten.batch_norm


class Function(Operator):
    operator = staticmethod(torch.batch_norm)


def graph_module(width: int, momentum: float) -> fx.GraphModule:
    """A graph whose nodes read the mode of the module."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), None, None, *map(graph.get_attr, ("mean", "var", "training"))]
    graph.output(graph.call_function(torch.ops.aten.batch_norm.default, (*nodes, momentum, 1e-5, False)))
    return fx.GraphModule(Operator(width, momentum), graph)


def module(width: int, momentum: float | None) -> nn.Module:
    layer = nn.BatchNorm2d(width, momentum=momentum)
    nn.init.constant_(layer.running_mean, 3.0)
    nn.init.constant_(layer.running_var, 5.0)
    return layer


def statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    buffers = {name.rpartition("_")[2]: b for name, b in model.named_buffers()}
    return buffers["mean"], buffers["var"]


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0])
@pytest.mark.parametrize("make", [module, graph_module, Operator, Packet, Function])
def test_statistics_are_those_of_the_batches(make, momentum):
    batches = [(torch.randn(5, 3, 4, 2).double() * n + n, None) for n in (1, 2, 3)]
    model = make(3, momentum).double().eval()
    mean, var = statistics(reestimate(model, batches))
    means = torch.stack([x.mean((0, 2, 3)) for x, _ in batches])
    variances = torch.stack([x.var((0, 2, 3)) for x, _ in batches])
    assert torch.allclose(mean, means.mean(0), rtol=1e-12) and torch.allclose(var, variances.mean(0), rtol=1e-12)
    joined = torch.cat([x for x, _ in batches])
    assert torch.allclose(mean, joined.mean((0, 2, 3)), rtol=1e-12)  # of batches of one size
    assert all(torch.equal(b, torch.full_like(b, v)) for b, v in zip(statistics(model), (3.0, 5.0), strict=True))


def test_batches_weigh_by_their_sizes():
    batches = [(torch.randn(n, 3, 2, 2).double() + n, None) for n in (2, 7, 4)]
    mean, var = statistics(reestimate(module(3, 0.1).double(), batches))
    weights = torch.tensor([2, 7, 4]).double()[:, None] / 13
    assert torch.allclose(mean, (weights * torch.stack([x.mean((0, 2, 3)) for x, _ in batches])).sum(0), rtol=1e-12)
    assert torch.allclose(var, (weights * torch.stack([x.var((0, 2, 3)) for x, _ in batches])).sum(0), rtol=1e-12)


def test_layers_in_a_row_agree_with_the_reference_of_torch():
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, momentum=None)
    model = nn.Sequential(*layers).double()
    batches = [(torch.randn(6, 2, 8, 8).double(), None) for _ in range(3)]
    reference = deepcopy(model)
    torch.optim.swa_utils.update_bn([x for x, _ in batches], reference)
    got = reestimate(model, batches)
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.allclose(got.get_buffer(name), reference.get_buffer(name), rtol=1e-10), name


def test_a_layer_used_twice_averages_over_both_uses():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x + 1)

    x = torch.randn(9, 2)
    mean, _ = statistics(reestimate(Twice(), [(x, None)]))
    assert torch.allclose(mean, (x.mean(0) + (3 * x + 1).mean(0)) / 2)


def test_only_the_statistics_change():
    model = network()
    model.train()
    model[3].eval()
    before = deepcopy(model)
    got = reestimate(model, shuffled(0))
    assert equal(model, before) and [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [m.training for m in got.modules()] == [m.training for m in before.modules()]
    changed = {n for n, t in tensors(got).items() if not torch.equal(t, tensors(before)[n])}
    assert changed == {"1.running_mean", "1.running_var"}
    assert not any(t.is_inference() for t in tensors(got).values())


def test_dropout_is_off_meanwhile():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(FEATURES)).train()
    mean, _ = statistics(reestimate(model, [(INPUTS, LABELS)]))
    assert torch.allclose(mean, INPUTS.mean(0), atol=1e-6)


def test_models_without_such_statistics_come_back_equal():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.ones(FEATURES))
            self.register_buffer("running_var", torch.ones(FEATURES))

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.running_mean) * self.running_var.rsqrt()

    for model in (nn.Linear(FEATURES, 2), Frozen(), nn.BatchNorm1d(FEATURES, track_running_stats=False)):
        assert equal(reestimate(model, [(INPUTS, LABELS)]), model)
    instance = nn.InstanceNorm1d(3, track_running_stats=True).eval()
    assert equal(reestimate(instance, [(torch.randn(4, 3, 5), None)]), instance)


def test_statistics_that_are_not_finite_are_mended():
    model = module(3, 0.1)
    nn.init.constant_(model.running_mean, float("nan"))
    assert torch.isfinite(reestimate(model, [(torch.randn(4, 3, 2, 2), None)]).running_mean).all()


def test_whole_batches_are_taken_until_there_are_enough_examples():
    taken = []

    def batches():
        for n in range(5):
            taken.append(n)
            yield INPUTS[:10], None

    reestimate(nn.BatchNorm1d(FEATURES), batches(), examples=25)
    assert taken == [0, 1, 2]


def test_estimates_that_cannot_be_made_are_refused():
    class Native(Operator):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.native_batch_norm.default(x, None, None, self.mean, self.var, self.training, 0.1, 1e-5)[0]

    with pytest.raises(ValueError, match="no batches"):
        reestimate(network(), [])
    with pytest.raises(ValueError, match="examples must be 1 or more; got 0"):
        reestimate(network(), shuffled(0), examples=0)
    with pytest.raises(ValueError, match="one value per channel"):
        reestimate(network(), [(INPUTS[:1], LABELS[:1])])
    with pytest.raises(ValueError, match=r"native_batch_norm.*give a model that calls aten\.batch_norm"):
        reestimate(Native(2, 0.1), [(torch.randn(4, 2, 2, 2), None)])
