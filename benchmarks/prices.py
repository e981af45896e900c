"""Do prices predict?  Predicted against measured rise of the loss, of single decisions and of whole plans, by kind.

    python -m benchmarks.prices measure --network ResNet-20 --seconds 300     # goes on where it stopped; --kinds bits for one kind
    python -m benchmarks.prices summary                                       # prints the table of all networks of docs/prices.md
    python -m benchmarks.prices table --network ResNet-20                     # prints its tables of every price of channels
    python -m benchmarks.prices plot docs/prices.png

Prices are of calibration examples, rises of validation examples.  Channels: ``before`` repair the readings of what goes are zero, and no
more; ``after`` repair all that reads it is refitted by least squares, each weight by itself.  Bits of weights, bits of activations,
ranks: nothing else changes.  Needs the data and the weights of the recipes ``cifar10``, ``imagenette`` and ``sst2``
(``CURVEPRESS_DATA``, ``CURVEPRESS_CACHE``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.prices_channels import Channels
from benchmarks.prices_kinds import Ranks, Rounded
from benchmarks.prices_networks import NETWORKS, Setting
from benchmarks.prices_table import plot, summary, table

PARTS = {"channels": Channels, "bits": Rounded, "ranks": Ranks}
"""Bits are those of weights and of activations."""


def _work(setting: Setting, kinds: list[str]) -> Iterator[Any]:
    for kind in kinds:
        yield from PARTS[kind](setting).work()


def measure(name: str, seconds: float, kinds: list[str]) -> None:
    """Measure whatever has no record yet, for about so many processor seconds."""
    start = time.process_time()
    for _ in _work(Setting(name), kinds):
        if time.process_time() - start > seconds:
            print("stopped at the limit of time; the same command goes on")
            break


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "summary", "table", "plot"))
    parser.add_argument("path", nargs="?", type=Path, default=Path("docs/prices.png"))
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--kinds", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "measure":
        measure(options.network or "ResNet-20", options.seconds, options.kinds)
    elif options.what == "table":
        table((options.network,) if options.network else tuple(NETWORKS))
    elif options.what == "summary":
        summary()
    else:
        plot(options.path)


if __name__ == "__main__":
    main()
