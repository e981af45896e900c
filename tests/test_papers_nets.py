"""The papers' networks: as large as their authors say, cut like any other, trained on a device; CIFAR-100 from its layouts."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_training
from curvepress.costs import cost
from curvepress.plan import Plan
from curvepress.surgery.cutting import apply
from curvepress.tracing.watching import trace
from curvepress_recipes import cifar_papers
from curvepress_recipes.cifar10_files import find
from curvepress_recipes.papers_nets import NETWORKS


@pytest.mark.parametrize(
    ("name", "params"),
    [("resnet32", 466_906), ("resnet56", 855_770), ("wrn28_8", 23_356_634), ("wideresnet32", 7_427_914), ("preresnet29", None)],
)
def test_networks_have_the_parameters_that_their_authors_count(name: str, params: int | None):
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert params in (None, sum(p.numel() for p in network.parameters()))
    weighty = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
    assert name != "preresnet29" or (len(weighty), sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())) == (10, 30)


@pytest.mark.parametrize("maker", [NETWORKS["tiny"], lambda: NETWORKS["preresnet29"](blocks=1, widths=(4, 6, 8))])
def test_every_width_of_them_can_be_cut(maker):
    network, x = maker().eval(), torch.randn(2, 3, 32, 32)
    structure = trace(network, x)
    plan = Plan(structure, {g.name: tuple(range(g.size // 2)) for g in structure.free})
    small = apply(network, plan, x)
    assert small(x).shape == (2, 10) and sum(p.numel() for p in small.parameters()) == cost(plan).params
    whole = [g for g in structure.groups if g.frozen and "linear.weight" not in {m.tensor for m in g.members}]
    assert all(any(m.tensor == "conv1.weight" and m.dim == 1 for m in g.members) for g in whole)


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "cifar-100-binary").mkdir()
    for part, count in (("train", 40), ("test", 10)):
        records = np.concatenate([generator.integers(0, 20, (count, 1)), generator.integers(0, 100, (count, 1)),
                                  generator.integers(0, 256, (count, 3072))], 1).astype(np.uint8)  # fmt: skip
        records.tofile(tmp_path / "cifar-100-binary" / f"{part}.bin")
    return tmp_path


def test_cifar_100_is_read_by_its_fine_labels(hundred: Path):
    raw = np.fromfile(hundred / "cifar-100-binary" / "test.bin", np.uint8).reshape(10, -1)
    part = find(hundred, "test", 100)
    assert part.labels.tolist() == raw[:, 1].tolist() and part.classes == 100
    np.testing.assert_array_equal(part.images[3, :, :, 1].ravel(), raw[3, 2 + 1024 : 2 + 2048])
    assert len(cifar_papers.batches("train", classes=100, data=str(hundred)).labels) == 36
    with pytest.raises(ValueError, match="no CIFAR-100 train images"):
        find(hundred / "cifar-100-binary", "train", 100)
    with pytest.raises(ValueError, match="network must be one of"):
        cifar_papers.model(network="alexnet")


def test_rates_fall_as_the_papers_say():
    hap, ehap = (gpu_training.RECIPES[n] for n in ("hap", "ehap"))
    assert [hap.rate(s) for s in (0.0, 0.49, 0.5, 0.75)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert [ehap.rate(s) for s in (0.0, 0.5, 1.0)] == pytest.approx([0.05, 0.025, 0.0])


def test_crops_are_shifts_of_the_images_given():
    images = gpu_training.Images(torch.randn(6, 3, 32, 32), torch.arange(6))
    made = images.augmented(torch.arange(6), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(torch.cat([images.pixels, images.pixels.flip(3)]), (4,) * 4)
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).reshape(12, 81, 3, 32, 32)
    for n in range(6):
        assert any(torch.equal(made[n], c) for k in (n, n + 6) for c in crops[k])


def test_training_leaves_weights_that_the_recipe_reads(hundred: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CURVEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_training, "FILE", tmp_path / "records.jsonl")
    monkeypatch.setattr(
        sys, "argv", ["", *["--network", "tiny", "--classes", "100", "--epochs", "1", "--device", "cpu", "--plain", "--data"], str(hundred)]
    )
    gpu_training.main()
    network = cifar_papers.model(network="tiny", classes=100)
    assert not torch.equal(network.conv1.weight, cifar_papers.model(trained=False, network="tiny", classes=100).conv1.weight)
    with pytest.raises(SystemExit, match="is there already"):
        gpu_training.main()


def test_the_scripts_say_how_they_are_called():
    for script in ("gpu_training", "reproduce"):
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{script}", "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout
