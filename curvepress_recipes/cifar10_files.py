"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) read from the layouts in which people keep them."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (32, 32, 3)
CLASSES, HUNDRED = 10, 100
PLACES = (".", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin")
PICKLES = ("data_batch_1", "cifar-10-batches-py/data_batch_1", "cifar10/cifar-10-batches-py/data_batch_1")
BINARY_VERSION = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
INSTALL = "pip install 'curvepress[cifar10]'"
LAYOUT = f"""The folder must hold one of
  cifar-10-batches-bin/     data_batch_1.bin ... data_batch_5.bin and test_batch.bin, unpacked from {BINARY_VERSION}
  cifar10/                  train.parquet and test.parquet with columns image (or img) and label, as on Hugging Face
  cifar10.npz               arrays x_train, y_train, x_test, y_test; the images uint8 [n, 32, 32, 3]
  train/<class>/*.png       and test/<class>/*.png, ten classes each
either itself or in its folder cifar10."""


@dataclass(frozen=True)
class Part:
    """The training or the test images: decoded ``[n, 32, 32, 3]`` or one encoded file each; ``labels [n]`` from 0 to 9."""

    images: np.ndarray | Sequence[bytes | Path]
    labels: np.ndarray
    source: Path
    classes: int = CLASSES

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels) or not len(self.labels):
            raise ValueError(
                f"{self.source} holds {len(self.images)} images and {len(self.labels)} labels; it is damaged or not CIFAR-{self.classes}"
            )
        if self.labels.dtype.kind not in "iu" or self.labels.min() < 0 or self.labels.max() >= self.classes:
            raise ValueError(
                f"{self.source}: labels must be whole numbers from 0 to {self.classes - 1}; found {np.unique(self.labels)[:20].tolist()}"
            )
        if isinstance(self.images, np.ndarray) and (self.images.dtype != np.uint8 or self.images.shape[1:] != SHAPE):
            raise ValueError(f"{self.source}: images must be uint8 [n, 32, 32, 3]; found {self.images.dtype} {list(self.images.shape)}")


def find(root: Path, part: str, classes: int = CLASSES) -> Part:
    """The ``train`` or ``test`` part of the CIFAR-10 in ``root``, in the order of its files, not decoded yet; of CIFAR-100 with its
    ``classes``: as Parquet in ``cifar100``, or ``train.bin`` and ``test.bin`` in ``cifar-100-binary``.

    Raises:
        ValueError: if no known layout is there, or it is damaged.
    """
    if classes == HUNDRED:
        return _hundred(root, part)
    for place in PLACES:
        for read in (_parquet, _binary, _npz, _folders):
            found = read(root / place, part)
            if found is not None:
                return found
    pickled = [p for p in PICKLES if (root / p).exists()]
    if pickled:
        raise ValueError(
            f"{root / pickled[0]} is the pickled version of CIFAR-10, which is not read because unpickling a file runs whatever "
            f"code is in it; get the binary version instead, {BINARY_VERSION}, and unpack it in {root}"
        )
    raise ValueError(f"no CIFAR-10 {part} images in {root}. {LAYOUT}")


def _hundred(root: Path, part: str) -> Part:
    if found := _parquet(root / "cifar100", part, HUNDRED):
        return found
    if (path := root / "cifar-100-binary" / f"{part}.bin").exists():
        records = _records(path, 2)  # the coarse label comes first
        return Part(_images_of(records[:, 2:]), records[:, 1], path, HUNDRED)
    raise ValueError(f"no CIFAR-100 {part} images in {root}; it must hold cifar100/{part}.parquet or cifar-100-binary/{part}.bin")


def decode(part: Part, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[n, 32, 32, 3]`` and labels int64 ``[n]`` of ``rows`` of a part.

    Raises:
        ValueError: if an image cannot be decoded or has another size.
    """
    chosen = part.images[rows]
    images = chosen if isinstance(chosen, np.ndarray) else np.stack([_pixels(i, part.source) for i in chosen])
    return images, part.labels[rows].astype(np.int64)


def _pixels(image: Any, source: Path) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(f"the images of {source} need Pillow, which is not installed: {INSTALL}") from None
    where = image if isinstance(image, Path) else source
    try:
        pixels = np.asarray(Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(f"an image of {where} cannot be decoded ({error}); get the file again") from None
    if pixels.shape != SHAPE:
        raise ValueError(f"an image of {where} is {pixels.shape[1]}x{pixels.shape[0]}; those of CIFAR-10 are 32x32")
    return pixels


def _parquet(folder: Path, part: str, classes: int = CLASSES) -> Part | None:
    path, label = folder / f"{part}.parquet", "label" if classes == CLASSES else "fine_label"
    if not path.exists():
        return None
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path} needs pyarrow, which is not installed: {INSTALL}") from None
    try:
        table = pq.read_table(path)
        column = next(name for name in ("image", "img") if name in table.column_names)
        return Part([row["bytes"] for row in table[column].to_pylist()], table[label].to_numpy(), path, classes)
    except (pa.ArrowException, OSError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{path} is not CIFAR-{classes} in Parquet, with columns image (or img) and {label}, or is damaged ({error})"
        ) from None


def _binary(folder: Path, part: str) -> Part | None:
    """Records of a label and 3072 bytes, channel by channel."""
    names = ["test_batch.bin"] if part == "test" else [f"data_batch_{n}.bin" for n in range(1, 6)]
    missing = [name for name in names if not (folder / name).exists()]
    if len(missing) == len(names):
        return None
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; unpack {BINARY_VERSION} again")
    records = np.concatenate([_records(folder / name) for name in names])
    return Part(_images_of(records[:, 1:]), records[:, 0], folder)


def _images_of(channels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(channels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _records(path: Path, labels: int = 1) -> np.ndarray:
    content, length = np.fromfile(path, np.uint8), labels + 3 * 32 * 32
    if not len(content) or len(content) % length:
        raise ValueError(f"{path} has {len(content)} bytes, which is no multiple of {length}; it is damaged, get it again")
    return content.reshape(-1, length)


def _npz(folder: Path, part: str) -> Part | None:
    path = folder / "cifar10.npz"
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return Part(arrays[f"x_{part}"], arrays[f"y_{part}"].reshape(-1), path)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} lacks arrays x_{part} and y_{part}, or is damaged ({error})") from None


def _folders(folder: Path, part: str) -> Part | None:
    """Classes numbered by the order of their names; images ordered by the number in their name, so that classes mix."""
    if not (folder / part).is_dir():
        return None
    classes = sorted(f for f in (folder / part).iterdir() if f.is_dir())
    if len(classes) != CLASSES:
        raise ValueError(f"{folder / part} has {len(classes)} class folders; CIFAR-10 has {CLASSES}")
    images = sorted(((_number(path), path.name, label, path) for label, f in enumerate(classes) for path in f.glob("*.png")))
    return Part([path for *_, path in images], np.array([label for _, _, label, _ in images], np.int64), folder / part)


def _number(path: Path) -> int:
    digits = re.search(r"\d+", path.stem)
    return int(digits[0]) if digits else -1
