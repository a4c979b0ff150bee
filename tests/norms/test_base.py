"""The four choices as attributes, and the contexts that set them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.norms import BatchNorm, GhostBatchNorm, GroupNorm, normalization, population_layers

from .inputs import LAYOUTS, lay_out

FAMILY = [
    pytest.param(lambda: BatchNorm(3), id="bn"),
    pytest.param(lambda: GhostBatchNorm(3, nbs=4), id="ghost"),
]


def state(layer):
    return copy.deepcopy(layer.state_dict())


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("make", FAMILY)
class TestChoices:
    def test_statistics_regardless_of_the_mode(self, make):
        x = torch.randn(8, 3, 4, 4)
        layer = make()
        trained = layer(x)
        layer.eval()
        population = layer(x)
        assert not torch.allclose(trained, population)
        layer.statistics = "batch"
        assert torch.equal(layer(x), trained)
        layer.train()
        layer.statistics = "population"
        assert torch.equal(layer(x), population)

    def test_update_regardless_of_the_mode(self, make):
        x = torch.randn(8, 3, 4, 4)
        layer, reference = make(), make()
        before = state(layer)
        layer.update = False
        y = layer(x)
        assert same(state(layer), before)
        assert torch.equal(y, reference(x))
        layer.eval()
        layer.statistics, layer.update = "batch", True
        layer(x)
        assert same(state(layer), state(reference))

    def test_batch_statistics_in_eval_leave_the_buffers(self, make):
        layer = make().eval()
        before = state(layer)
        layer.statistics = "batch"
        layer(torch.randn(8, 3))
        assert same(state(layer), before)

    def test_frozen_survives_train(self, make):
        layer = make()
        layer(torch.randn(8, 3, 4, 4))
        layer.statistics = "population"
        before = state(layer)
        for _ in range(3):
            layer.train()
            x = torch.randn(8, 3, 4, 4, requires_grad=True)
            y = layer(x)
            y.backward(torch.ones_like(y))
            rstd = (layer.running_var + layer.eps).rsqrt()
            torch.testing.assert_close(x.grad, rstd[:, None, None].expand_as(x))
        assert same(state(layer), before)

    def test_update_needs_batch_statistics(self, make):
        layer = make().eval()
        layer.update = True
        before = state(layer)
        with pytest.raises(ValueError, match="update=True needs statistics='batch'"):
            layer(torch.randn(8, 3))
        assert same(state(layer), before)

    def test_unknown_statistics_are_refused(self, make):
        layer = make()
        layer.statistics = "ema"
        with pytest.raises(ValueError, match="'batch' or 'population', not 'ema'"):
            layer(torch.randn(8, 3))

    @pytest.mark.parametrize("group_size", [0, -2, 3, 16])
    def test_group_size_must_divide_the_batch(self, make, group_size):
        layer = make()
        layer.group_size = group_size
        before = state(layer)
        with pytest.raises(ValueError, match=f"batch of 8 .*group_size={group_size}"):
            layer(torch.randn(8, 3))
        assert same(state(layer), before)

    @pytest.mark.parametrize("group_size", [None, 2, 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_observers_get_what_normalized(self, make, dtype, group_size):
        layer = make().double() if dtype == torch.float64 else make()
        layer.group_size = group_size
        seen = []
        layer.observers.append(seen.append)
        x = torch.randn(8, 3, 4, 4).to(dtype)
        layer(x)
        (batch,) = seen
        groups = batch.mean.size(0)
        z = x.double().view(groups, -1, 3, 16)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        assert batch.mean.dtype == batch.var.dtype == exact
        assert batch.count == 8 // groups * 16
        assert not batch.mean.requires_grad
        assert not batch.var.requires_grad
        torch.testing.assert_close(batch.mean.double(), z.mean((1, 3)), rtol=1e-5, atol=1e-6)
        var = z.var((1, 3), correction=0)
        torch.testing.assert_close(batch.var.double(), var, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch.unbiased().double(), z.var((1, 3)), rtol=1e-5, atol=1e-6)
        layer.eval()(x)
        assert len(seen) == 1

    def test_copies_work_and_are_not_watched(self, make):
        layer = make()
        layer(torch.randn(8, 3))
        seen = []
        layer.observers.append(lambda batch: seen.append(batch))
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(file, weights_only=False),
        ]
        x = torch.randn(8, 3)
        y = layer(x)
        assert len(seen) == 1
        for twin in copies:
            assert torch.equal(twin(x), y)
            assert same(state(twin), state(layer))
        assert len(seen) == 1

    def test_a_constant_channel_has_no_variance(self, make):
        layer = make()
        seen = []
        layer.observers.append(seen.append)
        y = layer(torch.full((8, 3, 2, 2), 7.0))
        # torch folds mean and rstd into one scale and shift: 7 / sqrt(eps) times float32's rounding
        assert y.abs().max() < 1e-3
        assert (seen[0].var >= 0).all()
        assert (seen[0].var < 1e-11).all()


def model():
    return nn.Sequential(BatchNorm(3), nn.ReLU(), GhostBatchNorm(3, nbs=2), GroupNorm(3, groups=3))


def test_population_layers():
    net = model()
    assert population_layers(net) == {"0": net[0], "2": net[2]}
    shared = BatchNorm(3)
    assert population_layers(nn.Sequential(shared, nn.Sequential(shared))) == {"0": shared}
    assert population_layers(shared) == {"": shared}


def choices(net):
    return [(v.statistics, v.update, v.group_size) for v in population_layers(net).values()]


def test_normalization_sets_and_restores():
    net = model()
    net[0].update, net[2].group_size = False, 8
    before = choices(net)
    with normalization(net, statistics="batch", group_size=4):
        assert choices(net) == [("batch", False, 4), ("batch", None, 4)]
        with normalization(net, update=True):
            assert choices(net) == [("batch", True, 4), ("batch", True, 4)]
        assert choices(net) == [("batch", False, 4), ("batch", None, 4)]
    assert choices(net) == before
    with pytest.raises(KeyError), normalization(net, statistics="population", update=False):
        raise KeyError
    assert choices(net) == before


def test_normalization_leaves_frozen_layers():
    net = model()
    net[0].statistics = "population"
    with normalization(net, statistics="batch", update=True, group_size=2):
        assert choices(net) == [("population", None, None), ("batch", True, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"statistics": "ema"}, "'batch' or 'population'"), ({"group_size": 0}, "group_size must be")],
)
def test_normalization_refuses(arguments, message):
    net = model()
    before = choices(net)
    with pytest.raises(ValueError, match=message), normalization(net, **arguments):
        pass
    assert choices(net) == before


@pytest.mark.parametrize("features", [0, -3])
def test_num_features_must_be_positive(features):
    with pytest.raises(ValueError, match="num_features must be a whole number of at least 1"):
        BatchNorm(features)
    with pytest.raises(ValueError, match="num_features must be a whole number of at least 1"):
        GroupNorm(features, groups=1)


def test_two_forwards_before_one_backward():
    """As in a GAN's discriminator: the second forward must not break the first's gradient."""
    x, z = torch.randn(8, 3, 4), torch.randn(8, 3, 4)
    for layer in (BatchNorm(3), GhostBatchNorm(3, nbs=2)):
        (layer(x) * layer(z)).sum().backward()
        assert layer.weight.grad.isfinite().all()
        assert layer.num_batches_tracked == 2


def test_repr_says_what_the_layer_is():
    assert repr(BatchNorm(3)) == "BatchNorm(3, eps=1e-05, decay=0.9, affine=True)"
    ghost = GhostBatchNorm(3, nbs=2, affine=False)
    assert "affine=False, nbs=2, grouping=contiguous, population=mean" in repr(ghost)
    assert repr(GroupNorm(4, channels_per_group=2)) == (
        "GroupNorm(4, eps=1e-05, affine=True, groups=2)"
    )


def test_population_normalization_is_torch_s_inference():
    layer = GhostBatchNorm(3, nbs=2).eval()
    x = torch.randn(5, 3, 4)
    expected = F.batch_norm(x, torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_observers_get_the_biased_variance_by_any_route(layout, learning, update):
    """P1: what is observed is the mean and the 1/m variance, in every layout, learning or not."""
    layer = BatchNorm(3)
    layer.update = update
    seen = []
    layer.observers.append(seen.append)
    x = lay_out(torch.randn(2, 3, 2, 1) * 3 + 1, layout)
    with torch.set_grad_enabled(learning):
        layer(x)
    (batch,) = seen
    values = x.double().movedim(1, 0).flatten(1)
    assert batch.count == 4
    expected = values.var(1, correction=0).float()
    torch.testing.assert_close(batch.mean[0], values.mean(1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.var[0], expected, rtol=1e-5, atol=1e-6)


def test_copies_start_without_observers():
    layer = BatchNorm(2)
    layer.observers.append(lambda _: None)
    assert copy.deepcopy(layer).observers == []
    assert len(layer.observers) == 1
