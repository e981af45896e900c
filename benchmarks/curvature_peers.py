"""Published tools at the same work: probes of the Hessian, and the exact diagonal of the generalised Gauss-Newton matrix.

Each is a generator of samples: one array a probe, or one array in all where the result is exact.  Tools are imported when they
are used, as they need not all be installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.curvature_task import Batch, weights


def pyhessian(model: nn.Module, batch: Batch, probes: int, seed: int) -> Iterator[np.ndarray]:
    """PyHessian's Hutchinson trace over the weights HAP probes too; it knows the whole network only, ``[1]``."""
    from pyhessian import hessian

    torch.manual_seed(seed)
    _only_weights(model)
    found = hessian(model, F.cross_entropy, data=batch, cuda=batch[0].is_cuda)
    for _ in range(probes):
        yield np.array(found.trace(maxIter=1, tol=0.0))


def curvlinops_probes(model: nn.Module, batch: Batch, probes: int, seed: int) -> Iterator[np.ndarray]:
    """curvlinops' Hessian-vector products with Rademacher vectors, summed over channels, ``[channels]``."""
    from curvlinops import HessianLinearOperator

    params = _only_weights(model)
    hessian = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False, num_data=len(batch[1]))
    chance = torch.Generator().manual_seed(seed)
    for _ in range(probes):
        v = [(torch.randint(2, p.shape, generator=chance) * 2.0 - 1).to(p) for p in params]
        yield _by_channel(a * b for a, b in zip(v, hessian @ v, strict=True))


def curvlinops_exact(model: nn.Module, batch: Batch) -> Iterator[np.ndarray]:
    """The exact diagonal with what release 3.0.1 has, ``[channels]``.

    It has no operator for the diagonal.  Its transposed Jacobian of one example, times a root of the example's output Hessian,
    has the columns whose squares sum to it.
    """
    from curvlinops import TransposedJacobianLinearOperator

    params = _only_weights(model)
    total = [torch.zeros_like(p) for p in params]
    for image, label in zip(*batch, strict=True):
        data = [(image[None], label[None])]
        transposed = TransposedJacobianLinearOperator(model, params, data, check_deterministic=False, num_data=1)
        for t, columns in zip(total, transposed @ [_eigenvectors(model(image[None]))], strict=True):
            t += columns.square().sum(-1) / len(batch[1])
    yield _by_channel(total)


def curvlinops_main(model: nn.Module, batch: Batch) -> Iterator[np.ndarray]:
    """curvlinops' own exact diagonal, ``[channels]``, which its main branch has and release 3.0.1 has not.

    It takes examples one by one without a batch dimension, which batch norm refuses; the dimension is put back here.
    """
    from curvlinops import GGNDiagonalLinearOperator
    from torch.func import functional_call

    params = {n: p for n, p in model.named_parameters() if n in weights(model)}

    def run(chosen: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(model, chosen, (inputs,)) if inputs.ndim == 4 else functional_call(model, chosen, (inputs[None],))[0]

    found = GGNDiagonalLinearOperator(run, nn.CrossEntropyLoss(), params, [batch], check_deterministic=False, num_data=len(batch[1]))
    yield _by_channel(found.diagonal if hasattr(found, "diagonal") else found._diagonal)


def backpack_exact(model: nn.Module, batch: Batch) -> Iterator[np.ndarray]:
    """BackPACK's ``DiagGGNExact``, ``[channels]``.

    Every step must be a module it knows, so the network is put together again from its own layers; functional calls would stop
    it.
    """
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    params = _only_weights(model)
    network, loss = extend(_of_modules(model)), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss(network(batch[0]), batch[1]).backward()
    yield _by_channel(p.diag_ggn_exact for p in params)


def _of_modules(model: nn.Module) -> nn.Module:
    blocks = [_block(b) for stage in (model.layer1, model.layer2, model.layer3) for b in stage]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear)
    return nn.Sequential(model.conv1, model.bn1, nn.ReLU(), *blocks, *head).eval()


def _block(block: nn.Module) -> nn.Module:
    from backpack.custom_module.branching import Parallel, SumModule
    from backpack.custom_module.pad import Pad
    from backpack.custom_module.slicing import Slicing

    main = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
    every, second = slice(None), slice(None, None, 2)
    padding = (0, 0, 0, 0, block.padding, block.padding)
    shortcut = nn.Sequential(Slicing((every, every, second, second)), Pad(padding)) if block.padding else nn.Identity()
    return nn.Sequential(Parallel(main, shortcut, merge_module=SumModule()), nn.ReLU())


def _eigenvectors(logits: Tensor) -> Tensor:
    """``sqrt(eigenvalue) * eigenvector`` of the output Hessian of one example, ``[1, classes, classes - 1]``."""
    p = logits.detach().softmax(1)[0].double()
    values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
    return (vectors * values.clamp_min(0).sqrt())[None, :, 1:].to(logits)


def _only_weights(model: nn.Module) -> list[nn.Parameter]:
    model.eval().requires_grad_(False)
    return [w.requires_grad_() for w in weights(model).values()]


def _by_channel(diagonal: Iterator[Tensor] | list[Tensor]) -> np.ndarray:
    return torch.cat([d.detach().flatten(1).sum(1).double() for d in diagonal]).cpu().numpy()
