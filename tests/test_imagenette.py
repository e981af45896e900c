"""The recipe of ten ImageNet classes: its splits, its network, and what bad files are told."""

import io
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from curvepress_recipes import imagenette
from curvepress_recipes.efficientnet import Conv, EfficientNetLite
from curvepress_recipes.images import accuracy

REAL = Path(os.environ.get("CURVEPRESS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CALIBRATION, TEST = 10, 3


def encoded(side: int, shade: int) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


def write(root: Path, name: str, count: int, first: int = 0, side: int = 224, label: int = 7) -> None:
    (root / "imagenette").mkdir(exist_ok=True)
    table = pa.table({"image": [encoded(side, first + n) for n in range(count)], "label": [label] * count})
    pq.write_table(table, root / "imagenette" / f"{name}.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write(tmp_path, "calibration", CALIBRATION)
    write(tmp_path, "validation", TEST, first=100)
    return str(tmp_path)


def shades(folder: str, split: str) -> set[int]:
    return {round(v) for x, _ in imagenette.batches(split, data=folder) for v in (x[:, 0, 100, 100] * 128 + 127).tolist()}


def test_splits_are_disjoint_and_only_the_test_images_are_new_to_the_network(folder: str):
    assert shades(folder, "calibration") == shades(folder, "train") == set(range(8))
    assert shades(folder, "validation") == {8, 9}
    assert shades(folder, "test") == {100, 101, 102}
    inputs, labels = next(iter(imagenette.batches("train", data=folder)))
    assert inputs.shape == (8, 3, 224, 224) and labels.tolist() == [7] * 8


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [7, 8])
def test_convolutions_pad_as_tensorflow_does(kernel: int, stride: int, size: int):
    """An output is the sum of the inputs it covers: its first is centred on, or half a pixel right of, the first input."""
    layer = Conv(1, 1, kernel, stride)
    torch.nn.init.ones_(layer.weight)
    missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    padded = np.pad(np.ones(size), (missing // 2, missing - missing // 2))
    wanted = [padded[n * stride : n * stride + kernel].sum() for n in range(-(-size // stride))]
    assert layer(torch.ones(1, 1, size, size))[0, 0].detach().numpy().tolist() == np.outer(wanted, wanted).tolist()


def test_the_network_has_the_published_size():
    network = EfficientNetLite().eval()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_bad_files_are_refused_by_name(tmp_path: Path, folder: str):
    with pytest.raises(ValueError, match="there are no trained weights at"):
        imagenette.model(data=folder)
    (tmp_path / "weights").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "weights" / "imagenet_efficientnet_lite0.safetensors")
    with pytest.raises(ValueError, match="does not hold EfficientNet-Lite0"):
        imagenette.model(data=folder)
    with pytest.raises(ValueError, match="split must be one of train, calibration, validation, test"):
        imagenette.batches("dev", data=folder)
    with pytest.raises(ValueError, match=r"folder .* does not exist"):
        imagenette.batches("test", data=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("bad", "told"), [({"side": 32}, "32x32; 224x224 is expected"), ({"label": 1000}, "from 0 to 999; found")])
def test_damaged_images_are_refused_by_name(tmp_path: Path, bad: dict[str, int], told: str):
    write(tmp_path, "calibration", 2, **bad)
    with pytest.raises(ValueError, match=told):
        imagenette.batches("train", data=str(tmp_path))
    (tmp_path / "imagenette" / "validation.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="missing, damaged, or without columns"):
        imagenette.batches("test", data=str(tmp_path))


@pytest.mark.skipif(not (REAL / "imagenette").is_dir(), reason="needs Imagenette and EfficientNet-Lite0: set CURVEPRESS_DATA")
def test_the_trained_network_knows_the_first_hundred_test_images():
    test = imagenette.batches("test", batch_size=50, data=str(REAL))
    assert len(test) == 10
    assert accuracy(imagenette.model(data=str(REAL)), islice(test, 2))["accuracy"] > 60  # 69.6 over all of them
