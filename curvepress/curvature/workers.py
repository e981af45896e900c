"""Samples shared out among processes, and put together again so that every process has all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed

Sample = dict[str, np.ndarray]
"""One independent sample: an array for each measure."""


class Elsewhere(ValueError):
    """What has gone wrong in another process."""


@dataclass(frozen=True)
class Workers:
    """This process's place among those that share the work: process ``rank`` of ``count`` makes samples ``rank``, ``rank + count``, ..."""

    rank: int = 0
    count: int = 1

    def mine(self, number: int) -> bool:
        """Whether sample ``number`` is made here."""
        return number % self.count == self.rank

    def shared(self, made: Mapping[int, Sample], wanted: Sequence[int]) -> dict[int, Sample]:
        """All samples ``wanted``, of which each process gives those it has made.

        Raises:
            Elsewhere: if another process has met an error.
        """
        if self.count == 1:
            return {n: made[n] for n in wanted}
        self.heed()
        if not wanted:
            return {}
        sizes = self._sizes(made)
        table = torch.zeros(len(wanted), sum(sizes.values()), dtype=torch.float64, device=_device())
        for row, number in enumerate(wanted):
            if self.mine(number):
                table[row] = torch.as_tensor(np.concatenate([made[number][m] for m in sizes]), device=table.device)
        distributed.all_reduce(table)
        ends = np.cumsum(list(sizes.values()))[:-1]
        return {n: dict(zip(sizes, np.split(r, ends), strict=True)) for n, r in zip(wanted, table.cpu().numpy(), strict=True)}

    def _sizes(self, made: Mapping[int, Sample]) -> dict[str, int]:
        """The measures of a sample and their sizes, as the first process has them: others may have made no sample yet."""
        return json.loads(self._told(json.dumps({m: len(v) for m, v in made[0].items()}) if self.rank == 0 else "", 0))

    def _told(self, text: str, source: int) -> str:
        """The ``text`` that the process ``source`` gives."""
        own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=_device())
        length = torch.tensor([len(own)], device=_device())
        distributed.broadcast(length, source)
        letters = own if self.rank == source else torch.zeros(int(length), dtype=torch.uint8, device=_device())
        distributed.broadcast(letters, source)
        return bytes(letters.tolist()).decode()

    def heed(self, error: Exception | None = None) -> None:
        """Says whether something has gone wrong here, and raises what has gone wrong elsewhere.

        Raises:
            Elsewhere: if another process has met an error and this one has not.
        """
        failing = most(self.rank + 1 if error else 0)
        if failing:
            why = self._told(str(error) or repr(error), failing - 1)
            if error is None:
                raise Elsewhere(f"process {failing - 1} of {self.count} failed: {why}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, an error of one process is an error of all: the others raise it when they next exchange something."""
        try:
            yield
        except Elsewhere:
            raise
        except Exception as error:
            if self.count > 1:
                with suppress(RuntimeError):  # the others have ended already
                    self.heed(error)
            raise

    def slowest(self, seconds: float) -> float:
        """The longest of the times that the processes report, so that all take the same decision."""
        if self.count == 1:
            return seconds
        self.heed()
        longest = torch.tensor([seconds], dtype=torch.float64, device=_device())
        distributed.all_reduce(longest, op=distributed.ReduceOp.MAX)
        return float(longest)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            distributed.barrier()


def most(number: int) -> int:
    """The largest ``number`` that a process gives."""
    found = torch.tensor([number], device=_device())
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return int(found)


def workers() -> Workers:
    """The processes of ``torch.distributed`` where it has been initialised (under ``torchrun``), else this one alone."""
    if distributed.is_available() and distributed.is_initialized():
        return Workers(distributed.get_rank(), distributed.get_world_size())
    return Workers()


@contextmanager
def joined() -> Iterator[Workers]:
    """Within, the processes that torchrun started work together, over gloo; a process that it did not start is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Workers()
        return
    distributed.init_process_group("gloo")
    try:
        yield workers()
    finally:
        distributed.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")
