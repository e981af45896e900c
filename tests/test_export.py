"""Law 13: the exported file computes what the model does, in the real runtime; a file that does not is never left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvepress.export import Quartiles, Timing, compare_latency, faster, latency, to_onnx


class Residual(nn.Module):
    """Two inputs, a residual sum, a concatenation and batch norms that are not at their initial values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(10, 5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, image: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.one(image)))
        x = (x + self.two(x)).mean((2, 3))
        return self.head(torch.cat([x, extra], 1)), x


class Attention(nn.Module):
    """Token numbers in, two attention heads over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Embedding(11, 8), nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # [batch, heads, tokens, width] each
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(mixed).mean(1)


class Deceitful(nn.Module):
    """Computes one thing and exports another."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.01 if torch.compiler.is_exporting() else x


class Dice(nn.Module):
    """Random in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, 0.5, training=True)


class OneSize(nn.Module):
    """Holds its batch size as a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1) * 2


class Stacked(nn.Module):
    """Attention without a dimension for heads, which ONNX's has to have."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x, x, x)


class AnyInputs(nn.Module):
    """Takes as many inputs as it is given."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, 1).tanh()


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def residual() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Residual(), (torch.randn(3, 3, 8, 8), torch.randn(3, 4))


def attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return Attention(), (torch.randint(11, (2, 6)),)


def single() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), (torch.randn(1, 4),)


def any_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return AnyInputs(), (torch.randn(2, 3), torch.randn(2, 4))


def graph() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, inputs = residual()
    sizes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    return torch.export.export(model.eval(), inputs, dynamic_shapes=sizes).module(), inputs


@pytest.mark.parametrize("make", [residual, attention, single, any_inputs, graph])
def test_the_file_computes_what_the_model_does_at_any_batch_size(make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = make()
    modes = [m.training for m in model.modules()]
    agreement = to_onnx(model, inputs if len(inputs) > 1 else inputs[0], tmp_path / "model.onnx")
    assert [m.training for m in model.modules()] == modes
    assert capfd.readouterr() == ("", "")
    assert agreement.batch == "dynamic" and agreement.sizes == (len(inputs[0]), len(inputs[0]) + 3)
    assert 0 < agreement.relative < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"] and agreement.bytes == (tmp_path / "model.onnx").stat().st_size
    assert_agrees_at(11, model, inputs, tmp_path / "model.onnx")


def assert_agrees_at(size: int, model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    many = tuple(x[torch.arange(size) % len(x)] for x in inputs)
    with torch.no_grad():
        wanted = (model if isinstance(model, torch.fx.GraphModule) else model.eval())(*many)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), many, strict=True)})
    for w, f in zip(wanted if isinstance(wanted, tuple) else (wanted,), found, strict=True):
        np.testing.assert_allclose(f, w.numpy(), atol=1e-5)


@pytest.mark.parametrize("model", [Deceitful(), Dice()])
def test_a_file_that_disagrees_is_refused_and_leaves_nothing(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disagrees with the model by"):
        to_onnx(model, torch.randn(4, 5), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_refused_file_leaves_an_earlier_one_alone(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"earlier")
    with pytest.raises(ValueError, match="disagrees"):
        to_onnx(Deceitful(), torch.randn(4, 5), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == b"earlier" and len(list(tmp_path.iterdir())) == 1
    to_onnx(nn.Linear(5, 2), torch.randn(4, 5), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() != b"earlier" and len(list(tmp_path.iterdir())) == 1


def test_the_tolerance_is_what_decides(tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    agreement = to_onnx(Deceitful(), x, tmp_path / "model.onnx", tolerance=0.011)
    assert agreement.relative == pytest.approx(0.01, rel=1e-3) and agreement.error > 0.01


def test_a_model_of_one_batch_size_is_static_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"takes inputs of shape \(4, 6\) only"):
        agreement = to_onnx(OneSize(), torch.randn(4, 6), tmp_path / "model.onnx")
    assert agreement.batch == "static" and agreement.sizes == (4,) and agreement.error == 0
    with pytest.raises(ValueError, match="takes batches of 4 only"):
        compare_latency({"model": tmp_path / "model.onnx"}, np.ones((4, 6), np.float32), batches=(1,))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be exported to ONNX: only 4D query"):
        to_onnx(Stacked(), torch.randn(4, 5, 6), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="cannot be exported to ONNX: "):
        to_onnx(DependsOnData(), torch.randn(4, 5), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="must be one or more tensors"):
        to_onnx(nn.Identity(), torch.empty(0, 3), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="there is no folder"):
        to_onnx(nn.Identity(), torch.ones(2, 3), tmp_path / "absent" / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_timings_are_well_formed(tmp_path: Path) -> None:
    x = torch.randn(4, 16)
    for name, width in (("original", 64), ("compressed", 32)):
        to_onnx(nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3)), x, tmp_path / name)
    paths = {name: tmp_path / name for name in ("original", "compressed")}
    timings = compare_latency(paths, x.numpy(), rounds=10, batches=(1, 6), seconds=1)
    assert [(t.name, t.batch) for t in timings] == [("original", 1), ("compressed", 1), ("original", 6), ("compressed", 6)]
    for t in timings:
        assert t.threads == 1 and 5 <= t.rounds <= 10
        for q in (t.wall, t.cpu, t.ratio):
            assert 0 <= q.low <= q.median <= q.high < float("inf")
        assert t.name == "compressed" or (t.ratio == Quartiles(1, 1, 1) and faster(t) is None)


def test_the_ratio_is_to_the_first_file_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([2.0, 1.0, 6.0, 4.0, 8.0, 2.0, 1.0, 2.0, 4.0, 2.0])  # slow, quick | quick, slow | slow, quick | ...
    asked: list[str] = []

    def reading(path: str, threads: int, inputs: list[np.ndarray]) -> tuple[float, float]:
        asked.append(path)
        return (taken := next(readings)), taken / 2

    monkeypatch.setattr(latency, "_reading", reading)
    slow, quick = compare_latency({"original": "slow", "compressed": "quick"}, np.ones((1, 2), np.float32), rounds=5, batches=(3,))
    assert asked == ["slow", "quick", "quick", "slow", "slow", "quick", "quick", "slow", "slow", "quick"]
    assert slow.wall == Quartiles(2000, 4000, 4000) and slow.cpu == Quartiles(1000, 2000, 2000)
    assert quick.wall == Quartiles(1000, 2000, 2000)
    assert quick.ratio == Quartiles(0.5, 0.5, 0.5) and faster(quick) is True


def test_latency_refuses_what_it_cannot_time(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="damaged cannot be opened in ONNX Runtime"):
        compare_latency({"model": tmp_path / "damaged"}, np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="at least one file"):
        compare_latency({}, np.ones((1, 2), np.float32))


@pytest.mark.parametrize(
    ("ratio", "verdict"), [((0.6, 0.7, 0.9), True), ((0.9, 0.95, 1.0), None), ((1.1, 1.2, 1.3), False), ((0.9, 1.1, 1.2), None)]
)
def test_faster_only_beyond_the_spread(ratio: tuple[float, float, float], verdict: bool | None) -> None:
    one = Quartiles(1, 1, 1)
    assert faster(Timing("compressed", 1, 1, 9, one, one, Quartiles(*ratio))) is verdict


def test_nothing_is_printed_by_a_fresh_process(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    program = f"import torch; from curvepress.export import to_onnx; to_onnx(torch.nn.Linear(2, 2), torch.ones(2, 2), {path!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    assert (done.stdout, done.stderr) == ("", "")
