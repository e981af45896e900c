"""Second-order estimators: products of the Hessian and of the Gauss-Newton matrix with vectors.

One recorded graph serves any number of products.  Batches are run a few examples at a time: each piece differentiates the
loss of the whole batch with the outputs of the others held, which adds up to the whole for any loss that is a sum over
examples, however it is normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..objective import Batch, Loss, checked_loss
from .examples import Sums
from .gauss_newton import pooled, scaled
from .measures import Trace, gathered
from .outputs import TOLERANCE
from .recording import View, only, recorded
from .terms import signs
from .trees import concatenated, examples, leaves, rebuilt, rows
from .twice import Twice

Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""``v -> C v``, one tensor for each variable."""
Kind = Callable[["Piece", Sequence[Tensor]], Product]
"""Which matrix: makes the product of a piece with respect to some variables."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A recorded part of a batch: the model's outputs on it, the loss (times a scale), and the variables of its graph."""

    outputs: list[Tensor]
    loss: Callable[[list[Tensor]], Tensor]
    parameters: dict[str, Tensor]
    activations: dict[str, Tensor]


def hessian(piece: Piece, variables: Sequence[Tensor]) -> Product:
    """``v -> H v``, by differentiating ``g'v`` (Pearlmutter, "Fast exact multiplication by the Hessian", 1994)."""
    slopes = torch.autograd.grad(piece.loss(piece.outputs), variables, create_graph=True, allow_unused=True)
    return lambda v: _pull(slopes, variables, v)


def gauss_newton(piece: Piece, variables: Sequence[Tensor]) -> Product:
    """``v -> J' H_z J v`` with ``H_z`` the Hessian of the loss in the outputs (Schraudolph 2002, section 4).

    ``J v`` is the derivative of ``J'w`` with respect to ``w``.
    """
    used = [t for t in piece.outputs if t.requires_grad and t.is_floating_point()]
    places = [i for i, t in enumerate(piece.outputs) if t.requires_grad and t.is_floating_point()]
    w = [torch.zeros_like(t, requires_grad=True) for t in used]
    pulled = torch.autograd.grad(used, variables, w, create_graph=True, allow_unused=True)
    z = [t.detach().requires_grad_() for t in used]
    slopes = torch.autograd.grad(piece.loss(_replaced(piece.outputs, places, z)), z, create_graph=True, allow_unused=True)

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        pushed = _pull(pulled, w, v)
        return _pull(used, variables, _pull(slopes, z, pushed))

    return product


def gap(piece: Piece, variables: Sequence[Tensor]) -> Product:
    """``v -> (H - G) v``: what the Gauss-Newton matrix leaves out."""
    h, g = hessian(piece, variables), gauss_newton(piece, variables)
    return lambda v: [a - b for a, b in zip(h(v), g(v), strict=True)]


def _pull(values: Sequence[Tensor | None], variables: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    curved = [(s, d) for s, d in zip(values, v, strict=True) if s is not None and s.requires_grad]
    if not curved:
        return [torch.zeros_like(x) for x in variables]
    found = torch.autograd.grad([s for s, _ in curved], variables, [d for _, d in curved], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(variables, found, strict=True)]


def _replaced(outputs: Sequence[Tensor], places: Sequence[int], fresh: Sequence[Tensor]) -> list[Tensor]:
    changed = dict(zip(places, fresh, strict=True))
    return [changed.get(i, t) for i, t in enumerate(outputs)]


@contextmanager
def differentiable(view: View, kind: Kind) -> Iterator[None]:
    """Within, attention runs in its plain form, as fused kernels have no second derivative; parameters asked about need gradients.

    Passes for products of the Hessian, which take every derivative, are recorded by the kernels of :mod:`.twice`.

    Raises:
        ValueError: if another operation of the model has no second derivative.
    """
    try:
        fast = Twice() if kind is hessian else nullcontext()
        with sdpa_kernel(SDPBackend.MATH), only(view.model, list(view.parameters)), torch.enable_grad(), fast:
            yield
    except (RuntimeError, NotImplementedError) as error:
        if "derivative" not in str(error) and "differentiable twice" not in str(error):
            raise
        raise ValueError(
            f"this model has no second derivative ({str(error).splitlines()[0]}); choose a first-order estimator such as 'pairs' or 'exact'"
        ) from error


def pieces(view: View, loss: Loss, batch: Batch, micro: int) -> Iterator[Callable[[float], Piece]]:
    """The parts of a batch, ``micro`` examples each, as functions that record them with the loss times a scale.

    Raises:
        ValueError: if the loss couples examples and does not fit one piece, or is not finite.
    """
    count = examples(batch[0])
    whole = None if count <= micro else pooled(view, batch[0], micro)
    if whole is not None:
        _separable(loss, whole, batch[1], micro)
    for start in range(0, count, micro):
        yield _part(view, loss, batch, whole, start, min(start + micro, count))


def _part(view: View, loss: Loss, batch: Batch, whole: Any, start: int, stop: int) -> Callable[[float], Piece]:
    def record(scale: float) -> Piece:
        inputs = batch[0] if whole is None else rows(batch[0], torch.arange(start, stop))
        seen = recorded(view, inputs, list(view.parameters))

        def value(outputs: list[Tensor]) -> Tensor:
            own = rebuilt(seen.tree, outputs)
            tree = own if whole is None else concatenated([_cut(whole, 0, start), own, _cut(whole, stop, None)])
            return checked_loss(loss, tree, batch[1]) * scale

        return Piece(seen.outputs, value, dict(view.parameters), {n: t for n, (t, _) in seen.activations.items()})

    return record


def _cut(tree: Any, start: int, stop: int | None) -> Any:
    return rebuilt(tree, [t[start:stop] if t.ndim else t for t in leaves(tree)])


def _separable(loss: Loss, whole: Any, targets: Any, micro: int) -> None:
    tensors = leaves(whole)
    z = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    free = [t for t in z if t.requires_grad and t.ndim]
    slopes = torch.autograd.grad(loss(rebuilt(whole, z), targets), free, create_graph=True, allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    v = [torch.zeros_like(t).index_copy(0, torch.arange(micro, device=t.device), signs(t[:micro], generator)) for t in free]
    for curved in _pull(slopes, free, v):
        if curved[micro:].abs().max() > TOLERANCE * curved.abs().max():
            raise ValueError(f"the loss couples the examples of a batch, so pieces of {micro} do not add up; set micro to the batch size")


def probed(view: View, loss: Loss, batch: Batch, kind: Kind, probes: int, generator: torch.Generator, micro: int) -> Sums:
    """Means over random signs ``v`` of ``v * Cv``: unbiased for the diagonal of ``C`` (Hutchinson 1989; Bekas et al. 2007).

    Along directions ``d_c`` the signs are drawn for each label, ``v = sum_c e_c d_c``; for activations, for each element of each
    example.  Every measure's sum is over the same ``probes`` of its own kind.
    """
    seeds = [int(s) for s in torch.randint(2**62, (probes,), generator=generator)]
    total = Sums()
    for number, record in enumerate(pieces(view, loss, batch, micro)):

        def run(scale: float, record: Callable[[float], Piece] = record, number: int = number) -> Sums:
            with differentiable(view, kind):
                return _piece(view, kind, record(scale), seeds, number)

        total.add(scaled(run, view.half, 1), 1 / probes)
    return total


def _piece(view: View, kind: Kind, piece: Piece, seeds: Sequence[int], number: int) -> Sums:
    sums = Sums()
    traced = any(isinstance(m, Trace) for m in view.measures.values())
    if traced or view.directions:
        product = kind(piece, list(piece.parameters.values()))
        for seed in seeds:
            if traced:
                _elements(view, sums, piece, product, _generator(seed))
            for name in view.directions:
                _direction(view, sums, piece, product, name, _generator(seed))
    if piece.activations:
        product = kind(piece, list(piece.activations.values()))
        for seed in seeds:
            _activations(view, sums, piece, product, _generator(seed + number))
    return sums


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _elements(view: View, sums: Sums, piece: Piece, product: Product, generator: torch.Generator) -> None:
    v = [signs(p, generator) for p in piece.parameters.values()]
    curved = zip(piece.parameters, v, product(v), strict=True)
    sums.add(Sums({n: _kept(view, n, own * found) for n, own, found in curved}))


def _kept(view: View, name: str, diagonal: Tensor) -> Tensor:
    """A parameter's part of the diagonal in float64, or the sums of its rows where these suffice."""
    return diagonal.sum(tuple(range(1, diagonal.ndim)), keepdim=True, dtype=torch.float64) if name in view.rows else diagonal.double()


def _direction(view: View, sums: Sums, piece: Piece, product: Product, name: str, generator: torch.Generator) -> None:
    measure = view.directions[name]
    e = torch.cat([signs(torch.empty(measure.size), generator), torch.zeros(1)])  # label -1 takes the zero at the end
    v = {n: torch.zeros_like(p) for n, p in piece.parameters.items()}
    own = [view.moves[name][p.tensor] * e[torch.as_tensor(p.labels)].to(v[p.tensor]) for p in measure.parts]
    for part, move in zip(measure.parts, own, strict=True):
        v[part.tensor] += move
    found = dict(zip(v, product(list(v.values())), strict=True))
    moved = [(p, move.double() * found[p.tensor].double()) for p, move in zip(measure.parts, own, strict=True)]
    sums.add(Sums({}, {name: torch.stack([gathered(m, p.labels, measure.size) for p, m in moved]).sum(0)}))


def _activations(view: View, sums: Sums, piece: Piece, product: Product, generator: torch.Generator) -> None:
    v = [signs(a, generator) for a in piece.activations.values()]
    for (name, own), found in zip(zip(piece.activations, v, strict=True), product(v), strict=True):
        curved, dim = (own * found).double(), view.activations[name].dim
        sums.add(Sums({}, {name: curved.sum()[None] if dim is None else curved.movedim(dim, 0).flatten(1).sum(1)}))
