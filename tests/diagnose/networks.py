"""A small network on small signals, trained in a second; faults are put into copies of it."""

import copy
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]

CLASSES = 3


def signals(samples: int, seed: int) -> Batch:
    """(N, 1, 24) waves of three frequencies under noise, and which."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (samples,), generator=draw)
    phase = 6.28 * torch.rand(samples, 1, generator=draw)
    t = torch.arange(24) / 24
    wave = torch.sin(6.28 * (y[:, None] + 1.0) * 1.5 * t + phase)
    return (wave + 0.7 * torch.randn(samples, 24, generator=draw))[:, None], y


def batched(data: Batch, size: int) -> list[Batch]:
    return list(zip(*(tensor.split(size) for tensor in data), strict=True))


class Net(nn.Module):
    """Three convolutions and a linear layer, each before a batch norm; the last has (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 16, 5, bias=False), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 24, 3, 2, bias=False), nn.BatchNorm1d(24)
        self.conv3, self.bn3 = nn.Conv1d(24, 24, 3, bias=False), nn.BatchNorm1d(24)
        self.fc, self.bn4 = nn.Linear(24, 24, bias=False), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.head(F.relu(self.bn4(self.fc(x.mean(2)))))


def norms(model: nn.Module) -> dict[str, nn.BatchNorm1d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}


@torch.no_grad()
def averaged(model: nn.Module, batches: list[Batch], momentum: float | None) -> nn.Module:
    """torch's own running statistics over these batches, with fixed weights, by this momentum."""
    kept = {}
    for name, norm in norms(model).items():
        kept[name], norm.momentum = norm.momentum, momentum
        if momentum is None:
            norm.reset_running_stats()
    model.train()
    for x, _ in batches:
        model(x)
    for name, norm in norms(model).items():
        norm.momentum = kept[name]
    return model.eval()


@dataclass
class Trained:
    """The network after its training, and half way there."""

    net: nn.Module
    early: dict[str, Tensor]
    data: Batch
    batches: list[Batch] = field(default_factory=list)

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.net)


@cache
def train() -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, data = Net(), signals(768, 0)
        steps, optimizer = 120, torch.optim.AdamW(net.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        early: dict[str, Tensor] = {}
        for step in range(steps):
            chosen = torch.randint(0, 768, (32,))
            optimizer.zero_grad()
            F.cross_entropy(net(data[0][chosen]), data[1][chosen]).backward()
            optimizer.step()
            schedule.step()
            if step == 40:
                early = {name: value.clone() for name, value in net.state_dict().items()}
    return Trained(net.eval(), early, data, batched(data, 32))
