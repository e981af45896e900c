"""Where a recorded forward pass uses the parameters: its graph of backward functions, read but not run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

LINEAR = {
    *("Addmm", "Mm", "Linear", "Convolution", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias"),
    *("Unsqueeze", "Squeeze", "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Expand", "Repeat", "Cat", "Stack", "ConstantPadNd"),
    *("Clone", "ToCopy", "Contiguous", "Add", "Sub", "Neg", "Mean", "Sum", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"),
    *("AvgPool2D", "AvgPool1D", "AvgPool3D", "AdaptiveAvgPool2D", "MkldnnAdaptiveAvgPool2D", "UpsampleNearest2D", "UpsampleBilinear2D"),
    *("Embedding", "Index", "IndexSelect", "Gather", "Flip", "Roll", "PixelShuffle", "PixelUnshuffle", "ReflectionPad2D", "ChannelShuffle"),
}
"""Backward functions whose forward is linear in what flows through (normalisation in evaluation mode, only)."""
PIECEWISE = {
    *("Relu", "LeakyRelu", "Threshold", "Hardtanh", "HardtanhBackward", "Abs", "Prelu", "MaxPool2DWithIndices", "MaxPool1DWithIndices"),
    *("MaxPool3DWithIndices", "AdaptiveMaxPool2D", "Max", "Amax", "Maximum", "Minimum", "Clamp", "ClampMin", "ClampMax", "Where"),
}
"""Backward functions whose forward is linear almost everywhere."""
ALONE = {
    *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "AsStrided", "Alias", "Unsqueeze", "Squeeze", "Slice", "Select"),
    *(
        "Split",
        "SplitWithSizes",
        "Unbind",
        "ToCopy",
        "Clone",
        "Mul",
        "Div",
        "Add",
        "LinalgVectorNorm",
        "Norm",
        "WeightNormInterface",
        "Neg",
    ),
}
"""Backward functions that, fed by parameters alone, make another form of them: transposed, sliced, normalised."""
PICKING = {"Embedding", "Index", "IndexSelect", "Gather"}
"""The same for those whose other operands are indices."""


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter: operand ``position`` of the operation behind ``node``.

    ``edge`` is where the gradient of that operand arrives; it belongs to the parameter or to something computed from
    parameters alone.  ``form`` is ``"itself"`` or ``"transposed"``, whatever its type, or ``"other"``: sliced, normalised.
    """

    tensor: str
    node: Node
    position: int
    edge: GradientEdge
    form: str

    @property
    def operation(self) -> str:
        """The operation's name as autograd knows it, such as ``Convolution``."""
        return operation(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the operand."""
        variable = getattr(self.edge.node, "variable", None)
        return tuple(variable.shape if variable is not None else self.edge.node._input_metadata[self.edge.output_nr].shape)


def operation(node: Node) -> str:
    """``Convolution`` for ``ConvolutionBackward0``."""
    return node.name().rsplit("::", 1)[-1].split("Backward")[0]


def nodes(outputs: Iterable[Tensor]) -> list[Node]:
    """Every backward function behind ``outputs``, in an order that depends on the graph alone; inputs come before users."""
    found: dict[Node, None] = {}
    stack = [(t.grad_fn, False) for t in outputs if t.grad_fn is not None]
    entered = set()
    while stack:
        node, done = stack.pop()
        if done:
            found[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in reversed(node.next_functions) if n is not None)
    return list(found)


def uses(order: Sequence[Node], names: Mapping[int, str], made: Collection[str] = ()) -> list[Use]:
    """The uses of the parameters ``names`` (by ``id``) in the graph, given by :func:`nodes`.

    Something computed from several parameters is reported once for each of them.  Lookups in the tables ``made``
    make something that all examples share, as of positions; other lookups are uses, example by example, as of words.
    """
    sources: dict[Node, frozenset[str] | None] = {}
    for node in order:
        variable = getattr(node, "variable", None)
        if variable is not None:
            sources[node] = frozenset({names[id(variable)]}) if id(variable) in names else None
        else:
            behind = [sources.get(n) if n is not None else None for n, _ in _makers(node)]
            known = frozenset().union(*(b for b in behind if b)) if behind and all(behind) else None
            sources[node] = None if known and operation(node) == "Embedding" and not known <= {*made} else known
    return [
        Use(name, node, position, GradientEdge(origin, number), _form(origin))
        for node in order
        if not sources[node]
        for position, (origin, number) in enumerate(node.next_functions)
        if origin is not None and sources.get(origin)
        for name in sorted(sources[origin] or ())
    ]


def _form(node: Node) -> str:
    turned = False
    while operation(node) in ("T", "ToCopy"):
        turned ^= operation(node) == "T"
        node = node.next_functions[0][0]  # type: ignore[assignment]
    return ("transposed" if turned else "itself") if hasattr(node, "variable") else "other"


def _makers(node: Node) -> Sequence[tuple[Node | None, int]]:
    """The operands of an operation that could make another form of parameters, none if it is no such operation."""
    name, operands = operation(node), node.next_functions
    return operands[:1] if name in PICKING else operands if name in ALONE else ()


def curved(order: Sequence[Node], found: Sequence[Use]) -> list[str]:
    """Why the blocks of the Hessian may differ from those of the Gauss-Newton matrix; empty if they are equal.

    They are equal where the outputs are piecewise linear in each weight: then ``d2z/dw2 = 0`` and only the loss is curved.
    That holds for networks of linear layers, normalisation in evaluation mode, ReLU and pooling that use each weight once.
    """
    allowed = LINEAR | PIECEWISE | {"torch::autograd::AccumulateGrad", "AccumulateGrad"}
    reasons = sorted({operation(n) for n in order} - allowed)
    reasons += sorted({f"{operation(n)} by statistics of its inputs" for n in order if saved(n, "training") is True})
    used = [u.tensor for u in found]
    return [*reasons, *(f"{t} is used {used.count(t)} times" for t in sorted(set(used)) if used.count(t) > 1)]


def saved(node: Node, name: str) -> Any:
    """A value that the forward pass kept for the backward function, detached; None if it kept none."""
    value = getattr(node, f"_saved_{name}", None)
    return value.detach() if isinstance(value, Tensor) else value
