"""An exported file as a module, so that whoever asks a model can ask the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..objective import call
from .onnx import evaluating, feeds, input_names, open_session


class Running(nn.Module):
    """What a file computes in ONNX Runtime, in the form in which the model that it was made of returns it.

    Raises:
        ValueError: if ONNX Runtime cannot open the file.
    """

    def __init__(self, path: str | Path, model: nn.Module, *example: Any, threads: int = 1) -> None:
        super().__init__()
        self.session = open_session(Path(path), threads)
        with evaluating(model), torch.no_grad():
            leaves, self.form = _pytree.tree_flatten(call(model, example))
        self.tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """The outputs for a batch."""
        given = feeds("the file", input_names(self.session), (*inputs, named))
        found = iter(self.session.run(None, {name: x.detach().contiguous().numpy() for name, x in given.items()}))
        leaves = [torch.from_numpy(next(found)) if is_tensor else c for is_tensor, c in zip(self.tensors, self.constants, strict=True)]
        return _pytree.tree_unflatten(leaves, self.form)
