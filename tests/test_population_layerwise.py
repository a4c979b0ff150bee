"""Layer-by-layer statistics (K3): nothing in them depends on how the data were cut into batches."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norms.zoo import FAMILY, make
from oracles.layerwise import ByHand
from torch import nn

from normlab.norms import BatchNorm, GhostBatchNorm, L1BatchNorm
from normlab.population import estimate, using

SAMPLES = 12


class Residual(nn.Module):
    """Two branches, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.late = BatchNorm(4)  # registered first, reached last
        self.stem = nn.Conv2d(2, 4, 3)
        self.first = BatchNorm(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.ghost = GhostBatchNorm(4, nbs=4)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.beside = BatchNorm(4)
        self.twice = BatchNorm(4)

    def forward(self, x):
        x = self.first(self.stem(x)).relu()
        x = self.ghost(self.conv(x)) + self.beside(self.shortcut(x))
        x = self.twice(x).relu()
        x = self.twice(self.conv(x)).relu()
        return self.late(x).mean((2, 3))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return Residual().to(dtype)


def data(dtype=torch.float64):
    x = torch.randn(SAMPLES, 2, 6, 6, generator=torch.Generator().manual_seed(1)).double()
    return (x * torch.linspace(0.2, 3, SAMPLES).view(-1, 1, 1, 1)).to(dtype)  # unlike samples


def layerwise(model, x, split, **kwargs):
    return estimate(model, x.split(split), estimator="layerwise", **kwargs)


def assert_equal(actual, expected, rtol=1e-11):
    assert list(actual) == list(expected)
    for name, statistics in expected.items():
        torch.testing.assert_close(actual[name].mean, statistics.mean, rtol=rtol, atol=rtol)
        torch.testing.assert_close(actual[name].var, statistics.var, rtol=rtol, atol=rtol)
        assert actual[name].count == statistics.count
        assert actual[name].mean.dtype == actual[name].var.dtype == torch.float64


def by_hand(model, x):
    """One function after the other over all samples at once, from the definition."""

    definition = ByHand()

    def through(name, z):
        layer = getattr(model, name)
        return definition.through(name, z, layer.weight, layer.bias, layer.eps)

    with torch.no_grad():
        z = through("first", model.stem(x)).relu()
        z = through("ghost", model.conv(z)) + through("beside", model.shortcut(z))
        z = through("twice", z).relu()
        z = through("twice", model.conv(z)).relu()
        through("late", z)
    return definition.statistics()


@pytest.mark.parametrize("split", [*range(1, SAMPLES + 1), [1, 4, 2, 5], [11, 1]])
def test_no_batch_size_matters(split):
    model, x = network(), data()
    result = layerwise(model, x, split)
    for name, (mean, var) in by_hand(model, x).items():
        torch.testing.assert_close(result[name].mean, mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(result[name].var, var, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(split=st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_any_split_and_any_order_give_the_same(split):
    model = network()
    x = torch.randn(sum(split), 2, 5, 5, dtype=torch.float64)
    x *= torch.arange(1.0, len(x) + 1).view(-1, 1, 1, 1)
    whole = layerwise(model, x, len(x))
    assert_equal(layerwise(model, x, split), whole, rtol=1e-10)
    assert_equal(layerwise(model, x.flip(0), split), whole, rtol=1e-10)


def test_it_is_pooled_with_all_the_data_in_one_batch():
    """For every layer; pooled in smaller batches has that for the first one only."""
    model, x = network(), data()
    result = layerwise(model, x, 2)
    one = estimate(model, [x], estimator="pooled", group_size=SAMPLES)
    small = estimate(model, x.split(2), estimator="pooled", group_size=2)
    assert_equal(result, one)
    assert_equal({"first": small["first"]}, {"first": one["first"]})
    for name in ("ghost", "beside", "twice", "late"):
        assert not torch.allclose(small[name].var, one[name].var, rtol=1e-2)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4])
def test_groups_change_rounding_only(group_size):
    model, x = network(), data()
    result = layerwise(model, x, SAMPLES, group_size=group_size)
    assert_equal(result, layerwise(model, x, SAMPLES))
    with pytest.raises(ValueError, match="12 samples is not a multiple of group_size=5"):
        layerwise(model, x, SAMPLES, group_size=5)


def test_single_samples_of_single_elements():
    """A batch that has no variance of its own."""
    layer, x = BatchNorm(3).double(), torch.randn(9, 3, dtype=torch.float64)
    result = layerwise(layer, x, 1)[""]
    torch.testing.assert_close(result.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.var, x.var(0, correction=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_float32(channels_last):
    model, x = network(torch.float32), data(torch.float32)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    exact = layerwise(network(), data(), 3)
    assert_equal(layerwise(model, x, 3), exact, rtol=1e-4)
    assert_equal(layerwise(model, x, 3), layerwise(model, x, 12), rtol=1e-5)


def test_under_autocast():
    """P65: bfloat16 activations, statistics in float64 of what they are."""
    model, x = network(torch.float32), data(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layerwise(model, x, 4)
        assert_equal(result, layerwise(model, x, 12), rtol=1e-2)
    stem = nn.functional.conv2d(
        x.bfloat16(), model.stem.weight.bfloat16(), model.stem.bias.bfloat16()
    )
    mean = stem.double().mean((0, 2, 3))
    torch.testing.assert_close(result["first"].mean, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_large_means(offset):
    """P41: moments are taken in float64, whatever the layer's dtype."""
    x = torch.randn(64, 3, 4, 4) + offset
    result = layerwise(BatchNorm(3), x, 8)[""]
    exact = x.double()
    torch.testing.assert_close(result.mean, exact.mean((0, 2, 3)), rtol=1e-14, atol=0)
    torch.testing.assert_close(result.var, exact.var((0, 2, 3), correction=0), rtol=1e-9, atol=0)


def test_the_statistics_in_the_model_do_not_matter():
    """P46"""
    model, x = network(), data()
    fresh = layerwise(model, x, 4)
    other = {name: layerwise(network(), 7 + 5 * x, 4)[name] for name in fresh}
    with using(model, other):
        again = layerwise(model, x, 4)
    for name, statistics in fresh.items():
        assert torch.equal(again[name].mean, statistics.mean)
        assert torch.equal(again[name].var, statistics.var)


def test_a_forward_ends_where_it_has_been_measured():
    """About half of a forward on average: the layers after the measured one do not run."""
    model, calls = nn.Sequential(*(BatchNorm(2) for _ in range(5))), []
    for layer in model:
        layer.register_forward_hook(lambda *_: calls.append(1))
    layerwise(model, torch.randn(8, 2), 4)
    assert len(calls) == 5 + 2 * (0 + 1 + 2 + 3) + 2 * 5  # the order; each pass; the last in full


def test_frozen_layers_keep_their_constants():
    """P44"""
    model, x = network(), data()
    model.ghost.statistics = "population"
    model.ghost.running_mean.fill_(3.0)
    before = copy.deepcopy(model.state_dict())
    result = layerwise(model, x, 4)
    assert "ghost" not in result
    assert_equal(result, layerwise(model, x, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_that_can_be_read_only_once_are_refused():
    model, x = network(), data()
    for spent in (iter(x.split(4)), (part for part in x.split(4))):
        with pytest.raises(ValueError, match="a list or a loader, not an iterator"):
            estimate(model, spent, estimator="layerwise")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=5)
    assert_equal(estimate(model, loader, estimator="layerwise"), layerwise(model, x, 12))


class Choosing(nn.Module):
    """Which layers it uses depends on the size of the batch."""

    def __init__(self, routes):
        super().__init__()
        self.routes = routes
        self.a, self.b = BatchNorm(2), BatchNorm(2)

    def forward(self, x):
        for name in self.routes[len(x)]:
            x = getattr(self, name)(x)
        return x


def test_a_statistic_that_is_no_variance_is_refused():
    """The mean absolute deviation of all data does not follow from that of batches."""
    model = nn.Sequential(BatchNorm(2), L1BatchNorm(2))
    with pytest.raises(ValueError, match="1 is a L1BatchNorm"):
        layerwise(model, torch.randn(8, 2), 4)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ({3: "ab", 5: "ba"}, "reached 'b', where the first did not"),
        ({3: "ab", 5: "a"}, "did not reach 'b'"),
        ({3: "a", 5: "ab"}, "reached 'b', where the first did not"),
        ({3: "a", 5: "aa"}, "reached 'a', where the first did not"),
    ],
)
def test_batches_must_reach_the_layers_in_one_order(routes, message):
    with pytest.raises(ValueError, match=message):
        layerwise(Choosing(routes), torch.randn(8, 2), [3, 5])


def test_a_model_that_catches_exceptions_does_not_catch_the_end_of_a_forward():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.Sequential(BatchNorm(2), BatchNorm(2))

        def forward(self, x):
            try:
                return self.norms(x)
            except Exception:
                return self.norms(torch.zeros_like(x))

    x = torch.randn(8, 2)
    caught, plain = Careful(), nn.Sequential(BatchNorm(2), BatchNorm(2))
    result = layerwise(caught, x, 2)
    for name, statistics in layerwise(plain, x, 2).items():
        assert torch.equal(result[f"norms.{name}"].var, statistics.var)


def test_the_input_may_be_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(2)

        def forward(self, x):
            return self.norm(x=x)

    x = torch.randn(8, 2, dtype=torch.float64)
    result = layerwise(Named().double(), x, 2)["norm"]
    torch.testing.assert_close(result.mean, x.mean(0), rtol=1e-12, atol=1e-12)


def test_no_progress_without_a_terminal(capfd):
    layerwise(network(), data(), 4)
    assert capfd.readouterr() == ("", "")


MEASURED = [v for v in FAMILY if v.values[0][0] not in ("l1", "frozen")]


@pytest.mark.parametrize("variant", MEASURED)
def test_every_layer_of_the_family_has_batch_norm_s_statistics(variant):
    """However a layer forms and mixes its batches, with population statistics it is batch norm."""
    first, second = make(variant).double(), make(variant).double()
    model = nn.Sequential(first, nn.Conv2d(6, 6, 1).double(), second)
    plain = nn.Sequential(BatchNorm(6), model[1], BatchNorm(6)).double()
    plain.load_state_dict(model.state_dict())
    x = 3 * torch.randn(8, 6, 4, 3, dtype=torch.float64) + 1
    one = estimate(plain, [x], estimator="pooled")
    for split in (1, 3, 4):
        assert_equal(layerwise(model, x, split), one, rtol=1e-9)
