"""The recipe that tests of the command line copy and spoil: fixed random weights and data, nothing to wait for."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECOVERY = {"epochs": 2, "lr": 0.05}
SEEDS = {"train": 0, "calibration": 0, "validation": 1, "test": 2}


def model(trained: bool = True, width: int = 12) -> nn.Module:
    network = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
    generator = torch.Generator().manual_seed(5 if trained else 6)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return network


def example() -> Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets)


def batches(split: str, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x, y = data(split)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[rows], y[rows]) for rows in order.split(16)]


def evaluate(model: nn.Module, split: str) -> dict[str, float]:
    x, y = data(split)
    with torch.no_grad():
        output = model(x)
    return {"accuracy": 100 * (output.argmax(1) == y).float().mean().item(), "loss": F.cross_entropy(output, y).item()}


def data(split: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(SEEDS[split]))
    return x, (x[:, :3].sum(1) > 0).long() + (x[:, 3] > 0).long()
