"""Samples shuffled between ranks inside a forward of DistributedDataParallel (K10)."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from normlab import dist
from normlab.norms import BatchNorm

SEED = 11


class Headed(nn.Module):
    """A body, and a head whose batch norm sees samples of all ranks."""

    def __init__(self, shuffled):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.norm = nn.Linear(3, 4), nn.Linear(4, 2), BatchNorm(4)
        self.shuffled = shuffled
        self.double()

    def forward(self, x):
        return self.head(self.shuffled(self.body(x).tanh(), self.norm))


def over_ranks(x, norm):
    moved, back = dist.shuffle(x, seed=SEED)
    if len(moved):
        return dist.unshuffle(norm(moved), back)
    # DistributedDataParallel waits for a gradient of every parameter, also without samples.
    return dist.unshuffle(moved * norm.weight + norm.bias, back)


def in_one(rows):
    """What the ranks' norms do, in one process: one after the other, on the permuted samples."""

    def shuffled(x, norm):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
        parts = [norm(part) for part in x[order].split(rows) if len(part)]
        return torch.cat(parts)[order.argsort()]

    return shuffled


def data(rows):
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(sum(rows), n, generator=generator).double() for n in (3, 2))
    return x, target


def step(rank, rows):
    x, target = (part.split(rows)[rank] for part in data(rows))
    model = DistributedDataParallel(Headed(over_ranks), init_sync=False, forward_sync_buffers=False)
    y = model(x)
    # Of ranks with unequally many samples the gradients are averaged, too.
    ((y - target).square().sum() * len(rows) / sum(rows)).backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    return y.detach(), gradients


@pytest.mark.parametrize("rows", [[4, 4, 4, 4], [5, 2, 3, 4], [5, 0, 3, 2]])
def test_a_shuffled_head_learns_as_in_one_process(ranks, rows):
    """Outputs and every gradient, with unequally many samples and with none."""
    found = ranks.run(step, rows)
    model, (x, target) = Headed(in_one(rows)), data(rows)
    y = model(x)
    ((y - target).square().sum() / sum(rows)).backward()
    outputs = torch.cat([output for output, _ in found])
    torch.testing.assert_close(outputs, y.detach(), rtol=0, atol=1e-12)
    for _, gradients in found:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12)
