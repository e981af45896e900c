"""Backward elimination: in which order channels go if what reads them is refitted each time, and what each then costs.

A reader computes ``W x`` from inputs ``x`` with second moment ``G``.  When inputs go and the weights of the others are refitted by least
squares, the mean squared error of output ``o`` is ``w_c A^-1 w_c'`` with ``A`` the block of ``G^-1`` that belongs to the lost inputs
(Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1993, eq. 5, with the layer's own Hessian;
for structures and one at a time: Kurtic et al., "ZipLM", NeurIPS 2023, eq. 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that reads a group, float64.

    ``weight`` ``[outputs, inputs]``, ``moment`` ``[inputs, inputs]`` positive definite, ``importance`` ``[outputs]``: what a unit of
    squared error of an output costs, ``blocks`` ``[channels, inputs per channel]``: which inputs each channel owns.
    """

    weight: Tensor
    moment: Tensor
    importance: Tensor
    blocks: Tensor


def damped(moment: Tensor, ridge: float) -> Tensor:
    """``moment`` with ``ridge`` times its mean diagonal added to the diagonal, so that it can be inverted."""
    level = moment.diagonal().mean()
    return moment + (ridge * level if level > 0 else 1.0) * torch.eye(len(moment), dtype=moment.dtype)


def unrepaired(reader: Reader) -> Tensor:
    """``[channels]``: the cost of each channel alone if nothing is refitted, ``w_c G_cc w_c'``."""
    blocks = reader.blocks
    own = reader.weight[:, blocks].movedim(1, 0)
    return torch.einsum("cob,cbd,cod,o->c", own, reader.moment[blocks[:, :, None], blocks[:, None, :]], own, reader.importance)


def elimination_order(readers: Sequence[Reader], weights: Tensor | None = None, at_once: int = 1) -> Tensor:
    """The channels in the order in which they go: each time the ``at_once`` that cost least given those already gone.

    ``weights`` ``[channels]`` are multiplied with the costs before they are compared.
    """
    channels = len(readers[0].blocks)
    states = [_State(r) for r in readers]
    gone = torch.zeros(channels, dtype=torch.bool)
    order: list[int] = []
    while len(order) < channels:
        price = torch.stack([s.prices(gone) for s in states]).sum(0)
        price = price if weights is None else price * weights
        for c in price.masked_fill(gone, torch.inf).argsort(stable=True)[: min(at_once, channels - len(order))].tolist():
            for s in states:
                s.remove(c)
            gone[c] = True
            order.append(c)
    return torch.tensor(order)


class _State:
    """A reader while channels go: the inverse of the second moment of the inputs that are left, and the refitted weights."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.weight = reader.weight.clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(reader.moment))

    def prices(self, gone: Tensor) -> Tensor:
        """What each channel that is left would cost now, ``[channels]``."""
        blocks = self.reader.blocks
        inner = self.inverse[blocks[:, :, None], blocks[:, None, :]]
        inner[gone] = torch.eye(blocks.shape[1], dtype=inner.dtype)
        own = self.weight[:, blocks].movedim(1, 0)  # [channels, outputs, inputs per channel]
        moved = torch.linalg.solve(inner, own.mT).mT
        return torch.einsum("cob,cob,o->c", own, moved, self.reader.importance)

    def remove(self, channel: int) -> None:
        """Takes a channel away and refits what is left (a Schur complement of the inverse)."""
        own = self.reader.blocks[channel]
        ratio = torch.linalg.solve(self.inverse[own][:, own], self.inverse[own])  # [inputs per channel, inputs]
        self.weight -= self.weight[:, own] @ ratio
        self.inverse -= self.inverse[:, own] @ ratio
        self.weight[:, own] = 0
        self.inverse[own] = 0
        self.inverse[:, own] = 0


def elimination_prices(readers: Sequence[Reader], order: Tensor) -> Tensor:
    """``[channels]``: by how much each channel raises the cost of the refitted readers when it goes in its turn of ``order``.

    With the inputs sorted so that the first to go stand last, ``moment = C C'`` and ``C`` lower triangular, the cost that an input adds is
    the square of its column of ``W C``: all turns in one factorization.
    """
    total = torch.zeros(len(order), dtype=torch.float64)
    for r in readers:
        lost = r.blocks[order.flip(0)].flatten()
        others = torch.ones(len(r.moment), dtype=torch.bool)
        others[lost] = False
        place = torch.cat([others.nonzero().flatten(), lost])
        factor = torch.linalg.cholesky(r.moment[place][:, place])
        added = ((r.weight[:, place] @ factor).square() * r.importance[:, None]).sum(0)[int(others.sum()) :]
        total[order.flip(0)] += added.reshape(len(order), -1).sum(1)
    return total
