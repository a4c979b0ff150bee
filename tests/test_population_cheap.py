"""Running averages with the weights fixed (K4): the estimator "cheap"."""

import pytest
import torch
from oracles.population import ema, plain_average
from populations import assert_statistics, network
from torch import nn

from normlab.norms import BatchNorm, GhostBatchNorm
from normlab.population import estimate

RULES = ["mean", "pooled", "first", "sequential"]


def test_the_plain_average_is_torch_s_momentum_none():
    """K4, P44: every forward counts the same, a smaller one too."""
    x = torch.randn(30, 3, 4, 4, dtype=torch.float64)
    theirs = nn.BatchNorm2d(3, momentum=None).double()
    for part in x.split(8):
        theirs(part)
    result = estimate(BatchNorm(3).double(), x.split(8), estimator="cheap")[""]
    assert_statistics(result, theirs.running_mean.numpy(), theirs.running_var.numpy(), 1e-11)
    assert result.count == 480


def test_the_plain_average_is_mean_for_equal_batches():
    model, x = network().double(), torch.randn(24, 2, 9, 9, dtype=torch.float64)
    cheap = estimate(model, x.split(4), estimator="cheap")
    mean = estimate(model, x.split(4), estimator="mean")
    for name, statistics in mean.items():
        assert_statistics(cheap[name], statistics.mean.numpy(), statistics.var.numpy(), 1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_running_average_in_closed_form(decay):
    layer = BatchNorm(3).double()
    layer.running_mean.fill_(5.0)
    x = torch.randn(7, 8, 3, dtype=torch.float64)
    result = estimate(layer, list(x), estimator="cheap", decay=decay)[""]
    assert (layer.running_mean == 5).all()
    assert_statistics(result, ema(5, x.mean(1), decay), ema(1, x.var(1), decay), rtol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_it_is_what_training_would_leave_with_the_weights_fixed(rule):
    layer = GhostBatchNorm(3, nbs=2, population=rule, decay=0.9).double()
    x = torch.randn(5, 8, 3, 2, dtype=torch.float64)
    result = estimate(layer, list(x), estimator="cheap", decay=0.9)[""]
    for batch in x:
        layer(batch)
    assert_statistics(result, layer.running_mean.numpy(), layer.running_var.numpy())


@pytest.mark.parametrize("rule", RULES)
def test_the_plain_average_is_of_what_the_layer_s_rule_makes_of_each_batch(rule):
    """P46: the buffers do not matter, also to a rule that takes several steps in a forward."""
    layer = GhostBatchNorm(3, nbs=2, population=rule, decay=0.6).double()
    x = torch.randn(5, 8, 3, 2, dtype=torch.float64)
    result = estimate(layer, list(x), estimator="cheap")[""]
    layer.running_mean.fill_(100.0)
    layer.running_var.fill_(100.0)
    again = estimate(layer, list(x), estimator="cheap")[""]
    assert torch.equal(again.mean, result.mean)
    assert torch.equal(again.var, result.var)
    assert_statistics(result, *plain_average(rule, x.numpy(), 4, 0.6))
