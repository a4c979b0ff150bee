"""What the tests of population statistics share: a network, its whole state, exact statistics."""

import copy

import numpy as np
import torch
from oracles.moments import of_channels
from torch import nn

from normlab.norms import BatchNorm, GhostBatchNorm

ESTIMATORS = ("pooled", "mean", "layerwise", "cheap")


def exact(x):
    """Mean and biased variance per channel, in numpy's float64."""
    return of_channels(x.double().numpy())


def assert_statistics(statistics, mean, var, rtol=1e-12, atol=1e-12):
    assert statistics.mean.dtype == statistics.var.dtype == torch.float64
    np.testing.assert_allclose(statistics.mean.numpy(), mean, rtol=rtol, atol=atol)
    np.testing.assert_allclose(statistics.var.numpy(), var, rtol=rtol, atol=atol)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        BatchNorm(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3),
        GhostBatchNorm(3, nbs=2),
        nn.Flatten(),
    )


def everything(model):
    """All of a model that an evaluation might disturb."""
    settings = [
        (m.training, *(getattr(m, k, None) for k in ("statistics", "update", "group_size")))
        for m in model.modules()
    ]
    observers = [list(getattr(m, "observers", [])) for m in model.modules()]
    grads = [p.grad for p in model.parameters()]
    return settings, observers, grads, copy.deepcopy(model.state_dict())


def assert_unchanged(model, before):
    settings, observers, grads, state = everything(model)
    assert (settings, observers, grads) == before[:3]
    assert all(torch.equal(value, before[3][name]) for name, value in state.items())
