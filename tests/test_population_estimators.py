"""`population.estimate` in one process (layerwise and cheap have files of their own, ranks too)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.population import mean_of_batches
from populations import (
    ESTIMATORS,
    assert_statistics,
    assert_unchanged,
    everything,
    exact,
    network,
)
from torch import nn

from normlab.norms import BatchNorm, GhostBatchNorm, GroupNorm
from normlab.population import estimate, using

SPLIT = [2, 2, 4, 8, 16, 32, 64]


class TestPooled:
    @settings(max_examples=40, deadline=None)
    @given(
        split=st.lists(st.integers(2, 20), min_size=1, max_size=8),
        spatial=st.sampled_from([(), (3,), (2, 3)]),
        seed=st.integers(0, 1000),
    )
    def test_any_split_gives_the_whole(self, split, spatial, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(split), 3, *spatial, generator=generator, dtype=torch.float64)
        x += torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1))  # batches that differ
        result = estimate(BatchNorm(3).double(), x.split(split), estimator="pooled")
        assert_statistics(result[""], *exact(x))
        assert result[""].count == x.numel() // 3

    @pytest.mark.parametrize("layer", [BatchNorm(3), GhostBatchNorm(3, nbs=2)])
    @pytest.mark.parametrize("group_size", [None, 2])
    def test_fvcore_s_split(self, layer, group_size):
        x = torch.randn(128, 3, 5, 5)
        result = estimate(layer, x.split(SPLIT), estimator="pooled", group_size=group_size)
        assert_statistics(result[""], *exact(x), rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
    def test_large_means(self, offset):
        """P41: float32, spread 1: off by no more than the rounding of the batches' means."""
        x = torch.randn(128, 3, 5, 5) + offset
        mean, var = exact(x)
        result = estimate(BatchNorm(3), x.split(SPLIT), estimator="pooled")[""]
        rounding = 2.0**-23 * offset
        assert_statistics(result, mean, var, rtol=0, atol=rounding)

    @pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
    def test_large_means_in_float64(self, offset):
        """P41: no difference of large squares."""
        x = torch.randn(128, 3, 5, 5, dtype=torch.float64) + offset
        result = estimate(BatchNorm(3).double(), x.split(SPLIT), estimator="pooled")
        assert_statistics(result[""], *exact(x), rtol=1e-9)

    def test_a_deep_layer_sees_batch_normalized_inputs(self):
        """The second layer's statistics are those of its inputs under batch statistics."""
        model = network().double()
        x = torch.randn(12, 2, 9, 9, dtype=torch.float64)
        inputs = []
        for part in x.split(4):
            z = model[2](nn.functional.batch_norm(model[0](part), None, None, training=True))
            inputs.append(model[4](z))
        result = estimate(model, x.split(4), estimator="pooled")
        assert_statistics(result["5"], *exact(torch.cat(inputs).detach()), rtol=1e-10)


class TestMean:
    def test_means_weighted_by_elements(self):
        """P44: a smaller last batch counts by its size."""
        x = torch.randn(128, 3, 5, 5, dtype=torch.float64)
        parts = x.split(SPLIT)
        result = estimate(BatchNorm(3).double(), parts, estimator="mean")
        assert_statistics(result[""], *mean_of_batches([part.numpy() for part in parts]))

    def test_groups_count_one_by_one(self):
        x = torch.randn(8, 3, dtype=torch.float64)
        result = estimate(BatchNorm(3).double(), [x], estimator="mean", group_size=2)
        assert_statistics(result[""], *mean_of_batches([part.numpy() for part in x.split(2)]))

    def test_equals_torch_s_cumulative_average_for_equal_batches(self):
        x = torch.randn(32, 3, 4, 4, dtype=torch.float64)
        theirs = nn.BatchNorm2d(3, momentum=None).double()
        for part in x.split(8):
            theirs(part)
        result = estimate(BatchNorm(3).double(), x.split(8), estimator="mean")
        assert_statistics(result[""], theirs.running_mean.numpy(), theirs.running_var.numpy())


def test_estimators_differ_where_batches_are_of_one_class():
    """P39: two estimators, two names; they agree where batches are i.i.d."""
    torch.manual_seed(0)
    classes = 6 * torch.arange(6.0).repeat_interleave(32).view(-1, 1)
    x = classes + torch.randn(192, 1)
    in_order, mixed = x.split(32), x[torch.randperm(192)].split(32)
    layer = BatchNorm(1)
    pooled = [estimate(layer, b, estimator="pooled")[""].var.item() for b in (in_order, mixed)]
    mean = [estimate(layer, b, estimator="mean")[""].var.item() for b in (in_order, mixed)]
    assert pooled[0] == pytest.approx(pooled[1], rel=1e-5)
    assert pooled[0] > 100
    assert mean[0] < 2
    assert mean[1] == pytest.approx(pooled[1], rel=0.1)


def batches_of(x, size):
    """What can be passed over again, but is no list."""

    class Loader:
        def __iter__(self):
            yield from x.split(size)

    return Loader()


@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestEstimate:
    def test_leaves_the_model_alone(self, estimator):
        model = network()
        model[2].eval()  # a mixture of modes
        model[1].update = False
        model[5].observers.append([].append)
        before = everything(model)
        estimate(model, torch.randn(12, 2, 9, 9).split(4), estimator=estimator, group_size=2)
        assert_unchanged(model, before)

    def test_never_updates(self, estimator):
        model = network()
        model[1].update = model[5].update = True
        before = everything(model)
        estimate(model, [torch.randn(8, 2, 9, 9)], estimator=estimator)
        assert_unchanged(model, before)

    def test_builds_no_graph(self, estimator):
        outputs = []
        estimate(
            network(),
            [torch.randn(8, 2, 9, 9)],
            estimator=estimator,
            forward=lambda model, batch: outputs.append(model(batch)),
        )
        assert not outputs[0].requires_grad

    def test_draws_no_random_number(self, estimator):
        model, x = network(), torch.randn(12, 2, 9, 9)
        before = torch.get_rng_state()
        estimate(model, x.split(4), estimator=estimator)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("where", ["batches", "forward", "layer"])
    def test_restores_after_an_exception(self, estimator, where):
        """P37: nothing stays attached or changed, wherever the loop ends."""
        model = network()
        model[2].eval()
        before = everything(model)

        class Loader:
            def __iter__(self):
                yield torch.randn(4, 2, 9, 9)
                if where == "batches":
                    raise KeyError
                yield torch.randn(4 if where == "forward" else 3, 2, 9, 9)

        calls = []

        def forward(model, batch):
            calls.append(batch)
            if where == "forward" and len(calls) == 2:
                raise KeyError
            return model(batch)

        with pytest.raises(
            (KeyError, ValueError), match="not a multiple" if where == "layer" else None
        ):
            estimate(model, Loader(), estimator=estimator, forward=forward, group_size=2)
        assert_unchanged(model, before)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert torch.is_grad_enabled()

    def test_a_short_loader_counts_what_there_is(self, estimator):
        """P37: no number of iterations is promised that a loader could fall short of."""
        x = torch.randn(10, 3, 2, 2)
        result = estimate(BatchNorm(3), batches_of(x, 4), estimator=estimator)
        assert result[""].count == 40

    def test_no_batch_is_an_error(self, estimator):
        """P40: zero iterations never become statistics of zero."""
        model = network()
        before = everything(model)
        with pytest.raises(ValueError, match="at least one batch"):
            estimate(model, [], estimator=estimator)
        assert_unchanged(model, before)

    def test_a_layer_used_twice_pools(self, estimator):
        """P42: a layer may be used more than once in a forward."""

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = BatchNorm(3)

            def forward(self, x):
                self.norm(x)
                return self.norm(3 * x + 1)

        x = torch.randn(16, 3, 4, 4, dtype=torch.float64)
        result = estimate(Twice().double(), x.split(8), estimator=estimator)
        seen = [part for half in x.split(8) for part in (half, 3 * half + 1)]
        alone = estimate(BatchNorm(3).double(), seen, estimator=estimator)[""]
        assert_statistics(result["norm"], alone.mean.numpy(), alone.var.numpy())

    def test_unseen_and_frozen_layers_are_absent(self, estimator):
        """P42, P44: a layer that was not reached has no 0/0, a frozen one is never overwritten."""
        model = nn.Sequential(BatchNorm(3), BatchNorm(3))
        model.unseen = BatchNorm(3)
        model.forward = lambda x: model[1](model[0](x))
        model[1].statistics = "population"
        result = estimate(model, [torch.randn(8, 3)], estimator=estimator)
        assert list(result) == ["0"]

    def test_a_model_without_batch_norm_has_no_statistics(self, estimator):
        with pytest.raises(ValueError, match="nothing to estimate: GroupNorm has no batch norm"):
            estimate(GroupNorm(4, groups=2), [torch.randn(4, 4, 2)], estimator=estimator)

    def test_batches_may_be_tuples_or_anything_forward_takes(self, estimator):
        """P38: models that take more than a tensor."""
        x = torch.randn(8, 3)
        plain = estimate(BatchNorm(3), [x], estimator=estimator)
        labelled = estimate(BatchNorm(3), [(x, None)], estimator=estimator)
        named = estimate(
            BatchNorm(3), [{"x": x}], estimator=estimator, forward=lambda model, b: model(b["x"])
        )
        for other in (labelled, named):
            assert torch.equal(other[""].mean, plain[""].mean)
            assert torch.equal(other[""].var, plain[""].var)

    def test_twice_is_once(self, estimator):
        """P46: an estimate does not depend on the statistics in the model, nor leave a trace."""
        model, a, b = network(), torch.randn(8, 2, 9, 9), torch.randn(8, 2, 9, 9)
        fresh = estimate(model, [b], estimator=estimator)
        with using(model, estimate(model, [a], estimator=estimator)):
            again = estimate(model, [b], estimator=estimator)
        for name, statistics in fresh.items():
            assert torch.equal(again[name].mean, statistics.mean)
            assert torch.equal(again[name].var, statistics.var)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "precise"}, "estimator is one of"),
        ({"estimator": "pooled", "decay": 0.9}, "decay belongs to estimator='cheap'"),
        ({"estimator": "cheap", "decay": 1.0}, r"decay must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate(BatchNorm(3), [torch.randn(4, 3)], **arguments)


def test_torch_s_own_batch_norms_are_refused_by_name():
    """An estimate of half a model's statistics must not pass for the whole."""
    model = nn.Sequential(BatchNorm(3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="1 is torch's BatchNorm1d"):
        estimate(model, [torch.randn(4, 3)], estimator="pooled")
    model[1] = nn.BatchNorm1d(3, track_running_stats=False)
    assert list(estimate(model, [torch.randn(4, 3)], estimator="pooled")) == ["0"]
