"""One forward pass of a model, kept so that gradients can be read at any point of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..objective import output
from .graph import Use, nodes, uses
from .measures import Activation, Direction, Measure, watched
from .sharding import in_use
from .trees import leaves, rebuilt

Vectors = Mapping[int, Tensor]
"""Output vectors by the position of their tensor in the model's output: ``[rows, *shape]``."""

Gradients = dict[tuple[Node, int], Tensor | None]
"""Gradients by backward function and number of its result."""


@dataclass(frozen=True, eq=False)
class View:
    """A model and what is asked about it; ``half`` is the type of half-precision passes, None for the model's own.

    ``moves`` holds for each :class:`Direction` how its parameters would move.  Of the parameters ``rows`` nothing is asked below
    their rows, the indices of their first dimension, so that sums over these suffice.
    """

    model: nn.Module
    measures: Mapping[str, Measure]
    moves: Mapping[str, Mapping[str, Tensor]]
    half: torch.dtype | None = None
    rows: frozenset[str] = frozenset()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are asked about."""
        own = dict(self.model.named_parameters())
        return {n: own[n] for n in watched(self.measures)}

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(iter(self.model.parameters())).device

    @property
    def directions(self) -> dict[str, Direction]:
        """The measures along displacements."""
        return {n: m for n, m in self.measures.items() if isinstance(m, Direction)}

    @property
    def activations(self) -> dict[str, Activation]:
        """The measures with respect to activations."""
        return {n: m for n, m in self.measures.items() if isinstance(m, Activation)}

    def run(self, inputs: Any) -> Any:
        """What the model computes, in half precision where that was asked for."""
        with torch.autocast(self.device.type, dtype=self.half or torch.bfloat16, enabled=self.half is not None):
            return output(self.model, (inputs, None))


@dataclass(frozen=True, eq=False)
class Pass:
    """A recorded forward pass: what the model returned and its tensors, the uses of parameters, the activations asked about."""

    tree: Any
    outputs: list[Tensor]
    order: list[Node]
    uses: list[Use]
    activations: dict[str, tuple[Tensor, GradientEdge]]

    def gradients(self, vectors: Vectors) -> Gradients:
        """``J'u`` at every use and activation.  The graph stays, as what it saved is needed to read them."""
        edges = {(u.node, 0): GradientEdge(u.node, 0) for u in self.uses}
        edges |= {(e.node, e.output_nr): e for _, e in self.activations.values()}
        roots = {leaf: u.to(self.outputs[leaf]) for leaf, u in vectors.items() if self.outputs[leaf].requires_grad}
        if not edges or not roots:
            return dict.fromkeys(edges)
        found = torch.autograd.grad(
            [self.outputs[i] for i in roots], list(edges.values()), list(roots.values()), retain_graph=True, allow_unused=True
        )
        return dict(zip(edges, found, strict=True))


def recorded(view: View, inputs: Any, wanted: Collection[str], made: Collection[str] = ()) -> Pass:
    """Runs the model on ``inputs`` and keeps what is needed to go back to the parameters ``wanted`` and the activations.

    Lookups in the tables ``made`` make something that all examples share (see :func:`~.graph.uses`).
    """
    seen: dict[str, tuple[Tensor, GradientEdge]] = {}
    hooks = [_watching(view.model, n, m, seen) for n, m in view.activations.items()]
    try:
        with torch.enable_grad(), in_use(view.model) as live:
            tree = view.run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = leaves(tree)
    order = nodes([t for t in outputs if t.requires_grad])
    names = {id(p): n for n, p in live.items() if n in wanted}
    return Pass(tree, outputs, order, uses(order, names, made), seen)


def _watching(model: nn.Module, name: str, measure: Activation, seen: dict[str, tuple[Tensor, GradientEdge]]) -> Any:
    def keep(_module: nn.Module, _inputs: Any, result: Any) -> Any:
        tensor, *others = leaves(result)
        if name in seen:
            raise ValueError(f"module {measure.module!r} runs more than once in a pass, so it has no single activation; name one inside it")
        tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        seen[name] = (tensor, get_gradient_edge(tensor))
        return rebuilt(result, [tensor.clone(), *others])  # what follows may work in place

    return model.get_submodule(measure.module).register_forward_hook(keep)


@contextmanager
def only(model: nn.Module, wanted: Sequence[str]) -> Iterator[None]:
    """Within, the parameters ``wanted`` need gradients and no others do."""
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        for n, p in model.named_parameters():
            p.requires_grad_(n in wanted)
        yield
    finally:
        for n, p in model.named_parameters():
            p.requires_grad_(before[n])
