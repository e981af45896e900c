"""The price of a channel after repair: what is lost when everything that reads it is refitted by least squares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..curvature import Activation, Direction, Measure, Sample
from ..curvature.setup import first_of
from ..objective import Batch, batch_size
from ..structure import Group, Member, Structure
from .data import LOSS_UNIT, Scores, Task, part_of
from .elimination import Reader, damped, elimination_order, elimination_prices, unrepaired
from .grams import Gram, add_grams, pooled
from .quadratic import estimated, removal

FOLDS = 4
"""Parts of the data that are left out in turn for the standard error."""
RIDGE = 1e-4
STEPS = 512
"""Channels go one at a time in groups of up to this many, else several at once."""


def reconstruction(model: nn.Module, structure: Structure, task: Task) -> Scores:
    """The rise of the loss that is left when a channel goes and all that reads it is refitted by least squares.

    It is the price before repair, :func:`mask_curvature`, times the share of the channel that the others cannot take over: the squared
    error that is left at the outputs of its readers, to that without refitting, each output weighted by the curvature of the loss there.
    Within a group channels go in the order of least price given those gone before (:mod:`.elimination`), so the sum of the lowest prices
    of a group predicts their joint removal; prices rise in that order.  Other groups are taken to stay.  Groups that something
    else reads too than convolutions and linear layers keep their price before repair.  Standard errors are of a jackknife over parts
    of the batches.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    first, batches = first_of(task.batches)
    seen: dict[str, Gram] = {}
    add_grams(model, first, list(weights), seen)
    fitted = {g.name: own for g in structure.free if (own := _refitted(model, g, weights, seen))}
    names = sorted({m.tensor for own in fitted.values() for m in own})
    evidence = _Evidence([{} for _ in range(FOLDS)], task.done, [], weights)
    passing = replace(task, batches=_watched(model, replace(task, batches=batches), names, evidence))
    measures = _measures(structure, fitted, weights)
    found = estimated(model, measures, lambda sample: sample, passing, "reconstruction", temperature=task.temperature)
    prices = {g.name: _jackknife(g, fitted.get(g.name, []), evidence) for g in structure.free}
    values, errors = ({g: p[k] for g, p in prices.items()} for k in (0, 1))
    left = [g.name for g in structure.free if g.name not in fitted]
    notes = [f"before repair: {', '.join(left)}"] if left else []
    return Scores(values, errors, "reconstruction", LOSS_UNIT, found.samples, task.seed, "; ".join((str(found), *found.notes, *notes)))


def _measures(structure: Structure, fitted: Mapping[str, Sequence[Member]], weights: Mapping[str, Tensor]) -> dict[str, Measure]:
    """The curvature of each removal, of the part that each reader has in it, and of each output of the readers."""
    asked: dict[str, Measure] = {g.name: removal(g, weights) for g in structure.free}
    for group, own in fitted.items():
        for m in own:
            asked[_part(group, m)] = Direction((part_of(m, weights[m.tensor]),), len(m.rows))
            asked[_outputs(m)] = Activation(m.tensor.rpartition(".")[0], -1 if weights[m.tensor].dim() == 2 else 1)
    return asked


def _part(group: str, member: Member) -> str:
    return f"{group} read by {member.tensor}"


def _outputs(member: Member) -> str:
    return f"outputs of {member.tensor}"


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Second moments by fold and curvature by batch; batch ``n`` is in fold ``n % FOLDS``."""

    folds: Sequence[dict[str, Gram]]
    samples: Mapping[int, Sample]
    sizes: list[int]
    weights: Mapping[str, Tensor]

    def parts(self) -> int:
        return min(FOLDS, len(self.sizes))

    def gram(self, name: str, without: int | None) -> Gram:
        return pooled([f[name] for n, f in enumerate(self.folds[: self.parts()]) if n != without])

    def curvature(self, name: str, without: int | None) -> Tensor:
        """The mean of a measure over the examples."""
        used = [n for n in range(len(self.sizes)) if without is None or n % FOLDS != without]
        return torch.as_tensor(np.average([self.samples[n][name] for n in used], axis=0, weights=[self.sizes[n] for n in used]))


@dataclass(frozen=True, eq=False)
class _Case:
    """What is known of a group: its readers, and what a unit of squared error stands for, channel by channel."""

    readers: list[Reader]
    scale: Tensor

    def prices(self, order: Tensor) -> np.ndarray:
        added = (self.scale * elimination_prices(self.readers, order))[order].numpy()
        result = np.empty(len(order))
        result[order.numpy()] = np.maximum.accumulate(added)
        return result


def _jackknife(group: Group, members: Sequence[Member], evidence: _Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Prices and their standard errors, the order of the channels held fixed."""
    folds = [None, *range(evidence.parts())]
    if members:
        whole, *others = (_case(group.name, members, evidence, f) for f in folds)
        order = elimination_order(whole.readers, whole.scale, max(1, group.size // STEPS))
        prices, *spread = (case.prices(order) for case in (whole, *others))
    else:
        prices, *spread = (evidence.curvature(group.name, f).numpy() / 2 for f in folds)
    share = (len(spread) - 1) / len(spread)
    return prices, np.sqrt(share * np.square(np.stack(spread) - np.mean(spread, axis=0)).sum(0))


def _case(group: str, members: Sequence[Member], evidence: _Evidence, without: int | None) -> _Case:
    """Readers whose importances make the squared errors of unrepaired removals as large as the price of each reader's part in them."""
    readers, lost = [], torch.zeros(len(members[0].rows), dtype=torch.float64)
    for m in members:
        gram, weight = evidence.gram(m.tensor, without), evidence.weights[m.tensor].double().cpu()
        per = weight[0, 0].numel()
        blocks = (torch.as_tensor(m.rows)[:, :, None] * per + torch.arange(per)).flatten(1)
        outputs = evidence.curvature(_outputs(m), without)
        own = Reader(weight.flatten(1), gram.matrix.cpu() / gram.examples, outputs, blocks)
        before, price = unrepaired(own), evidence.curvature(_part(group, m), without) / 2
        scale = float(price.sum() / before.sum()) if before.sum() > 0 else 0.0
        readers.append(replace(own, moment=damped(gram.second_moment().cpu(), RIDGE), importance=outputs * scale))
        lost += before * scale
    price = evidence.curvature(group, without) / 2
    return _Case(readers, torch.where(lost > 0, price / lost.clamp_min(torch.finfo(lost.dtype).tiny), 0.0))


def _refitted(model: nn.Module, group: Group, weights: Mapping[str, Tensor], seen: Mapping[str, Gram]) -> list[Member]:
    """The weights that read the group, if all can be refitted and their outputs are those of modules."""
    own = [m for m in group.members if m.role == "in" and m.tensor in weights]
    return own if own and all(m.dim == 1 and m.tensor in seen and _is_layer(model, m.tensor) for m in own) else []


def _is_layer(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and name.endswith(".weight")


def _watched(model: nn.Module, task: Task, names: Sequence[str], evidence: _Evidence) -> Iterator[Batch]:
    """The batches, each after its Gram matrices were added to those of its fold."""
    for number, batch in enumerate(task.batches):
        add_grams(model, batch, names, evidence.folds[number % FOLDS], seed=task.seed + number)
        evidence.sizes.append(batch_size(batch))
        yield batch
