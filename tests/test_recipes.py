"""Laws of the recipes that come with curvepress: their splits, their data formats, and the accuracy of their networks."""

import inspect
import io
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from curvepress.runs.settings import FIT, descent
from curvepress.training.fitting import fit
from curvepress_recipes import cifar10, digits
from curvepress_recipes.images import Minibatches, accuracy, flipped, shifted
from curvepress_recipes.resnet import ResNet

TRAIN, TEST = 60, 20
REAL = Path(os.environ.get("CURVEPRESS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(scope="module")
def tiny() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random images in the shape of CIFAR-10, by part."""
    random = np.random.default_rng(0)
    sizes = {"train": TRAIN, "test": TEST}
    return {part: (random.integers(0, 256, (n, 32, 32, 3), np.uint8), random.permutation(np.arange(n) % 10)) for part, n in sizes.items()}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(root: Path, tiny, column: str = "image") -> None:
    for part, (images, labels) in tiny.items():
        encoded = [{"bytes": png(i), "path": f"{n}.png"} for n, i in enumerate(images)]
        pq.write_table(pa.table({column: encoded, "label": labels}), root / f"{part}.parquet")


def write_binary(root: Path, tiny) -> None:
    for part, (images, labels) in tiny.items():
        records = np.concatenate([labels[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(len(images), -1)], 1)
        names = ["test_batch.bin"] if part == "test" else [f"data_batch_{n}.bin" for n in range(1, 6)]
        for name, some in zip(names, np.array_split(records, len(names)), strict=True):
            (root / name).write_bytes(some.tobytes())


def write_npz(root: Path, tiny) -> None:
    arrays = {f"x_{part}": images for part, (images, _) in tiny.items()}
    np.savez(root / "cifar10.npz", **arrays, **{f"y_{part}": labels[:, None] for part, (_, labels) in tiny.items()})


def write_folders(root: Path, tiny) -> None:
    for part, (images, labels) in tiny.items():
        for n, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{n}_of_many.png").write_bytes(png(image))


FORMATS = [write_parquet, write_binary, write_npz, write_folders, lambda root, tiny: write_parquet(root, tiny, "img")]


@pytest.fixture
def tiny_folder(tmp_path, tiny) -> str:
    write_npz(tmp_path, tiny)
    return str(tmp_path)


def pixels(batches: Minibatches) -> Tensor:
    """The images as they were before normalisation, ``[images, height, width, channels]``."""
    images = torch.cat([x for x, _ in batches]).permute(0, 2, 3, 1) * batches.std + batches.mean
    return images.round().to(torch.uint8)


def labels(batches: Iterable) -> Tensor:
    return torch.cat([y for _, y in batches])


def sorted_rows(images: Tensor, classes: Tensor) -> list[bytes]:
    return sorted(bytes(i.numpy().tobytes()) + bytes([int(c)]) for i, c in zip(images, classes, strict=True))


@pytest.fixture(params=["digits", "cifar10"])
def recipe(request, tiny_folder, monkeypatch):
    monkeypatch.setenv("CURVEPRESS_DATA", tiny_folder)
    return {"digits": digits, "cifar10": cifar10}[request.param]


# Every recipe


def test_the_five_functions_fit_together(recipe):
    network = recipe.model(trained=False)
    assert not network.training and network(recipe.example()).shape == (2, 10)
    inputs, targets = next(iter(recipe.batches("calibration", batch_size=16)))
    assert inputs.shape == (16, *recipe.example().shape[1:]) and targets.shape == (16,) and targets.dtype == torch.int64
    value = recipe.loss(network(inputs), targets)
    assert value.shape == () and torch.isfinite(value)
    metrics = recipe.evaluate(network, "validation")
    assert list(metrics) == ["accuracy", "loss"] and 0 <= metrics["accuracy"] <= 100
    names = [next(iter(inspect.signature(f).parameters)) for f in (recipe.model, recipe.batches, recipe.evaluate)]
    assert names == ["trained", "split", "model"]


def test_splits_are_disjoint_and_together_are_all(recipe, tiny):
    parts = {split: recipe.batches(split, batch_size=7) for split in ("calibration", "validation", "test")}
    together = sorted_rows(torch.cat([pixels(b) for b in parts.values()]), torch.cat([labels(b) for b in parts.values()]))
    if recipe is digits:
        everything = digits._digits()
        assert [len(labels(b)) for b in parts.values()] == [1078, 360, 359]
    else:
        everything = tuple(torch.from_numpy(np.concatenate([tiny["train"][n], tiny["test"][n]])) for n in (0, 1))
        assert [len(labels(b)) for b in parts.values()] == [54, 6, 20]
        assert torch.equal(pixels(parts["validation"]), torch.from_numpy(tiny["train"][0][54:]))
        assert torch.equal(pixels(parts["test"]), torch.from_numpy(tiny["test"][0]))
    assert together == sorted_rows(*everything)


def test_batches_repeat_by_seed_and_change_with_it(recipe):
    for split in ("train", "calibration"):
        one, same, other = (recipe.batches(split, seed=s, batch_size=9) for s in (1, 1, 2))
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(one, same, strict=True))
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, one, strict=True))
        assert not torch.equal(pixels(one)[:9], pixels(other)[:9])
    assert not torch.equal(pixels(recipe.batches("train", batch_size=9)), pixels(recipe.batches("train", seed=3, batch_size=9)))


def test_training_images_are_augmented_and_calibration_images_are_not(recipe):
    same = {"seed": 4, "batch_size": 9}
    train, plain = recipe.batches("train", **same), recipe.batches("calibration", **same)
    assert torch.equal(labels(train), labels(plain)[: len(labels(train))])
    assert not torch.equal(pixels(train), pixels(plain)[: len(labels(train))])


def test_what_recovery_says_is_what_fit_takes(recipe):
    assert set(recipe.RECOVERY) <= set(FIT)
    settings = descent({**FIT, **recipe.RECOVERY, "epochs": 1, "seed": 0})
    few, network = list(islice(recipe.batches("train", batch_size=8), 2)), recipe.model(trained=False)
    assert len(fit(network, recipe.loss, lambda seed: few, teacher=network, **settings).history) == 1


def test_unknown_splits_and_batch_sizes_are_named(recipe):
    with pytest.raises(ValueError, match="split must be one of train, calibration, validation, test; got 'valid'"):
        recipe.batches("valid")
    with pytest.raises(ValueError, match="batch_size must be a whole number, 1 or more; got 0"):
        recipe.batches("test", batch_size=0)


def test_inputs_have_the_default_dtype(recipe):
    torch.set_default_dtype(torch.float64)
    inputs, targets = next(iter(recipe.batches("test", batch_size=4)))
    assert inputs.dtype == torch.float64
    assert recipe.loss(recipe.model(trained=False)(inputs), targets).dtype == torch.float64


# Minibatches, augmentation, accuracy


def minibatches(count: int, size: int, **more) -> Minibatches:
    return Minibatches(
        torch.arange(count, dtype=torch.uint8)[:, None, None, None], torch.arange(count), size, torch.zeros(1), torch.ones(1), **more
    )


@pytest.mark.parametrize(
    ("count", "size", "augment", "sizes"),
    [(10, 4, False, [4, 4, 2]), (10, 4, True, [4, 4]), (8, 4, False, [4, 4]), (8, 4, True, [4, 4]), (3, 4, True, [3]), (0, 4, False, [])],
)
def test_a_batch_that_is_not_full_is_left_out_of_training_only(count, size, augment, sizes):
    batches = minibatches(count, size, augment=(lambda x, chance: x) if augment else None)
    assert [len(y) for _, y in batches] == sizes and len(batches) == len(sizes)


def test_images_and_labels_are_shuffled_together():
    batches = minibatches(50, 8, shuffle=True, seed=1)
    assert all(torch.equal(x.flatten().long(), y) for x, y in batches)
    assert labels(batches).tolist() != list(range(50)) and sorted(labels(batches).tolist()) == list(range(50))


def test_a_shifted_image_is_a_crop_of_the_padded_one():
    images = torch.randint(1, 256, (200, 5, 7, 3), dtype=torch.uint8)
    moved = shifted(2)(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    crops = {(y, x): padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)}
    found = [[place for place, crop in crops.items() if torch.equal(crop[n], moved[n])] for n in range(200)]
    assert all(len(places) == 1 for places in found)
    assert {places[0] for places in found} == set(crops)


def test_about_half_of_the_images_are_flipped():
    images = torch.randint(0, 256, (400, 4, 6, 3), dtype=torch.uint8)
    moved = flipped(images, torch.Generator().manual_seed(0))
    mirrored = torch.tensor([torch.equal(m, i.flip(1)) for m, i in zip(moved, images, strict=True)])
    assert torch.equal(moved[~mirrored], images[~mirrored]) and 160 < mirrored.sum() < 240


def test_accuracy_is_a_percentage_and_loss_a_mean_over_examples():
    logits = torch.log(torch.tensor([[0.5, 0.5 - 1e-3, 1e-3], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]))
    targets = torch.tensor([0, 1, 1])
    network = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout(0.9)).train()
    network[0].eval()
    metrics = accuracy(network, [(logits[:2], targets[:2]), (logits[2:], targets[2:])])
    assert metrics["accuracy"] == pytest.approx(200 / 3)
    assert metrics["loss"] == pytest.approx(-np.log([0.5, 0.7, 0.3]).mean(), rel=1e-6)
    assert network.training and network[1].training and not network[0].training


# Digits


def test_digits_are_learnt_in_seconds_and_the_same_every_time():
    network = digits.model()
    first = {n: t.clone() for n, t in network.state_dict().items()}
    assert digits.evaluate(network, "test")["accuracy"] >= 97 and digits.evaluate(network, "validation")["accuracy"] >= 97
    assert not network.training and 40_000 <= sum(p.numel() for p in network.parameters()) <= 80_000
    torch.nn.init.zeros_(network.linear.weight)
    assert torch.equal(digits.model().linear.weight, first["linear.weight"])  # not the caller's copy
    digits._trained.cache_clear()
    assert all(torch.equal(t, first[n]) for n, t in digits.model().state_dict().items())
    untrained = digits.model(trained=False).state_dict()
    assert {n: t.shape for n, t in untrained.items()} == {n: t.shape for n, t in first.items()}


# CIFAR-10


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("place", [".", "cifar10"])
def test_every_format_gives_the_same_images(tmp_path, tiny, write, place):
    (tmp_path / place).mkdir(exist_ok=True)
    write(tmp_path / place, tiny)
    rows = {"calibration": ("train", slice(54)), "validation": ("train", slice(54, 60)), "test": ("test", slice(20))}
    for split, (part, some) in rows.items():
        batches = cifar10.batches(split, data=str(tmp_path))
        expected = (torch.from_numpy(tiny[part][0][some]), torch.from_numpy(tiny[part][1][some]))
        assert sorted_rows(pixels(batches), labels(batches)) == sorted_rows(*expected)
        if split != "calibration":
            assert torch.equal(pixels(batches), expected[0]) and torch.equal(labels(batches), expected[1])


def test_the_binary_version_is_found_in_the_folder_of_its_archive(tmp_path, tiny):
    for place in ("cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"):
        folder = tmp_path / place.partition("/")[0] / "data" / place
        folder.mkdir(parents=True)
        write_binary(folder, tiny)
        root = tmp_path / place.partition("/")[0] / "data"
        assert torch.equal(labels(cifar10.batches("test", data=str(root))), torch.from_numpy(tiny["test"][1]))


def test_the_same_file_is_read_once_a_process(tiny_folder):
    one, other = (cifar10.batches("test", data=tiny_folder, batch_size=n) for n in (3, 4))
    assert one.pixels is other.pixels and one.pixels.dtype == torch.uint8


def test_inputs_are_normalised_and_in_the_order_convolutions_like(tiny_folder, tiny):
    inputs, _ = next(iter(cifar10.batches("test", data=tiny_folder)))
    expected = (tiny["test"][0] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert np.allclose(inputs.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_the_option_goes_before_the_environment(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("CURVEPRESS_DATA", str(tmp_path / "elsewhere"))
    assert len(cifar10.batches("test", data=tiny_folder)) == 1
    with pytest.raises(ValueError, match=r"elsewhere does not exist\. The folder must hold one of"):
        cifar10.batches("test")
    monkeypatch.delenv("CURVEPRESS_DATA")
    with pytest.raises(ValueError, match=r"option data, or in the environment variable CURVEPRESS_DATA\. The folder must hold"):
        cifar10.batches("test")


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_the_pickled_version_is_refused_with_the_reason(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "data_batch_1").touch()
    with pytest.raises(
        ValueError, match=r"unpickling a file runs whatever code is in it; get the binary version.*cifar-10-binary\.tar\.gz"
    ):
        cifar10.batches("test", data=str(tmp_path))


def test_a_folder_without_the_data_says_what_to_put_there(tmp_path):
    with pytest.raises(
        ValueError, match=r"no CIFAR-10 train images in .*(.*\n)+.*data_batch_1\.bin(.*\n)+.*parquet(.*\n)+.*npz(.*\n)+.*png"
    ):
        cifar10.batches("train", data=str(tmp_path))


def spoil(path: Path, content: bytes | None = None) -> None:
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)


def relabel(tiny, label: int):
    return {part: (images, np.where(np.arange(len(classes)) == 3, label, classes)) for part, (images, classes) in tiny.items()}


def shrink(tiny):
    return {part: (np.ascontiguousarray(images[:, :16]), classes) for part, (images, classes) in tiny.items()}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda r, t: (write_binary(r, t), spoil(r / "test_batch.bin")), r"test_batch\.bin has \d+ bytes, which is no multiple of 3073"),
        (lambda r, t: (write_binary(r, t), spoil(r / "test_batch.bin", b"")), "has 0 bytes"),
        (lambda r, t: (write_parquet(r, t), spoil(r / "test.parquet")), r"test\.parquet is not CIFAR-10 in Parquet"),
        (lambda r, t: write_parquet(r, t, "picture"), "columns image"),
        (lambda r, t: (write_npz(r, t), spoil(r / "cifar10.npz")), r"cifar10\.npz lacks arrays x_test and y_test, or is damaged"),
        (lambda r, t: write_npz(r, {"train": t["train"]}), "lacks arrays x_test and y_test"),
        (lambda r, t: write_npz(r, relabel(t, 10)), "labels must be whole numbers from 0 to 9"),
        (lambda r, t: write_npz(r, shrink(t)), r"images must be uint8 \[n, 32, 32, 3\]; found uint8 \[20, 16, 32, 3\]"),
        (lambda r, t: write_npz(r, {p: (i[1:], c) for p, (i, c) in t.items()}), "19 images and 20 labels"),
        (lambda r, t: write_npz(r, {p: (i[:0], c[:0]) for p, (i, c) in t.items()}), "0 images and 0 labels"),
        (lambda r, t: write_folders(r, shrink(t)), "is 32x16; those of CIFAR-10 are 32x32"),
        (lambda r, t: (write_folders(r, t), spoil(next(r.glob("test/*/0_*.png")), b"GIF")), r"0_of_many\.png cannot be decoded"),
        (lambda r, t: (r / "test" / "cat").mkdir(parents=True), "has 1 class folders; CIFAR-10 has 10"),
    ],
)
def test_damaged_data_is_refused_by_name(tmp_path, tiny, make, told):
    make(tmp_path, tiny)
    with pytest.raises(ValueError, match=told):
        cifar10.batches("test", data=str(tmp_path))


def test_a_missing_binary_file_is_named(tmp_path, tiny):
    write_binary(tmp_path, tiny)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_3\.bin"):
        cifar10.batches("train", data=str(tmp_path))


@pytest.mark.parametrize(("depth", "params"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_the_networks_have_the_sizes_of_the_paper(depth, params):
    network = cifar10.model(trained=False, depth=depth)
    assert sum(p.numel() for p in network.parameters()) == params
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == depth


def test_the_shortcut_is_every_other_pixel_between_channels_of_zeros():
    block = ResNet(8).layer2[0].eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("depth", [7, 19, 2, 20.0])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2"):
        cifar10.model(trained=False, depth=depth)


def test_weights_are_loaded_strictly(tmp_path):
    with pytest.raises(ValueError, match=r"no trained weights at .*weights/cifar10_resnet8\.safetensors"):
        cifar10.model(depth=8, data=str(tmp_path))
    path = tmp_path / "weights" / "cifar10_resnet8.safetensors"
    path.parent.mkdir()
    source = cifar10.model(trained=False, depth=8)
    tensors = {n: t.contiguous() for n, t in source.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(tensors, path)
    loaded = cifar10.model(depth=8, data=str(tmp_path))
    assert not loaded.training and torch.equal(loaded(cifar10.example()), source(cifar10.example()))
    save_file({n: t for n, t in tensors.items() if n != "layer1.0.conv1.weight"}, path)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.weight"):
        cifar10.model(depth=8, data=str(tmp_path))
    spoil(path)
    with pytest.raises(ValueError, match="does not hold this network or is damaged"):
        cifar10.model(depth=8, data=str(tmp_path))


@pytest.mark.skipif(not (REAL / "weights").is_dir(), reason="needs CIFAR-10 and its trained networks: set CURVEPRESS_DATA")
def test_the_trained_network_classifies_the_first_thousand_test_images_as_published():
    test = cifar10.batches("test", batch_size=250, data=str(REAL))
    metrics = accuracy(cifar10.model(data=str(REAL)), islice(test, 4))
    assert len(labels(test)) == 10_000
    assert metrics["accuracy"] == pytest.approx(92.3, abs=0.2)  # 91.73 over all of them
