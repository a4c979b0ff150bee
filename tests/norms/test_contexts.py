"""`normalization` around, within and beside itself, and around `population.estimate`."""

import copy
from contextlib import ExitStack
from itertools import permutations, product

import pytest
import torch
from torch import nn

from normlab.norms import BatchNorm, FrozenBatchNorm, GhostBatchNorm, GroupNorm, normalization
from normlab.population import estimate

SOURCES = ("batch", "population", None)
ESTIMATORS = ("pooled", "mean", "layerwise", "cheap")


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(BatchNorm(3), nn.ReLU(), GhostBatchNorm(3, nbs=2))
    for layer in (net[0], net[2]):
        with torch.no_grad():
            layer.running_mean.add_(torch.rand(3, generator=generator))
    return net


def choices(net: nn.Module) -> list[tuple]:
    return [(m.statistics, m.update, m.group_size) for m in net.modules() if hasattr(m, "update")]


def x() -> torch.Tensor:
    return torch.randn((8, 3, 2, 2), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_the_innermost_context_chooses(training):
    """Three deep, every combination: by what it says, else by what is around it."""
    net = network().train(training)
    for three in product(SOURCES, repeat=3):
        with ExitStack() as stack:
            for depth, statistics in enumerate(three):
                stack.enter_context(normalization(net, statistics=statistics, update=False))
                said = [s for s in three[: depth + 1] if s is not None]
                expected = said[-1] if said else ("batch" if training else "population")
                assert {net[0].source, net[2].source} == {expected}
        assert choices(net) == [(None, None, None)] * 2


def test_each_choice_nests_by_itself():
    net = network()
    with normalization(net, group_size=4), normalization(net, statistics="population"):
        assert choices(net) == [("population", None, 4)] * 2
        with normalization(net, statistics="batch", update=False, group_size=2):
            assert choices(net) == [("batch", False, 2)] * 2
            before = copy.deepcopy(net.state_dict())
            assert not torch.equal(
                net(x())[:2], net(torch.cat([x()[:1], x()[2:4]]).repeat(2, 1, 1, 1))[:2]
            )
            assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert choices(net) == [("population", None, 4)] * 2
    assert choices(net) == [(None, None, None)] * 2


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ({"statistics": "population"}, {"update": True}),
        ({"update": True}, {"statistics": "population"}),
        ({"statistics": "population", "update": False}, {"update": True, "group_size": 2}),
    ],
)
def test_contradictions_between_contexts_are_refused_by_name(outer, inner):
    """P50: before anything is set, and the outer context goes on."""
    net = network()
    with normalization(net, **outer):
        within = choices(net)
        with (
            pytest.raises(ValueError, match="update=True needs statistics='batch'"),
            normalization(net, **inner),
        ):
            pass
        assert choices(net) == within
        with normalization(net, statistics="batch", update=True):
            net(x())
        assert choices(net) == within
    assert choices(net) == [(None, None, None)] * 2
    assert net[0].num_batches_tracked == 1


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("fails", [True, False])
def test_contexts_may_end_in_any_order(order, fails):
    """As those of generators do: nothing stays behind, by an exception or without."""
    net = network()
    net[0].update = False
    before = choices(net)
    chosen = [{"statistics": "batch"}, {"statistics": "population"}, {"group_size": 2}]
    contexts = [normalization(net, **one) for one in chosen]
    for context in contexts:
        context.__enter__()
    for ended, index in enumerate(order):
        error = KeyError() if fails else None
        contexts[index].__exit__(type(error) if fails else None, error, None)
        left = [chosen[i] for i in range(3) if i not in order[: ended + 1]]
        assert net[2].statistics == next(
            (c["statistics"] for c in left[::-1] if "statistics" in c), None
        )
        assert net[2].group_size == (2 if {"group_size": 2} in left else None)
    assert choices(net) == before


def test_what_its_owner_froze_stays_frozen_in_every_context():
    net = nn.Sequential(BatchNorm(3), FrozenBatchNorm(3), BatchNorm(3, statistics="population"))
    with normalization(net, statistics="population"):
        assert [layer.frozen for layer in net] == [False, True, True]
        with normalization(net, statistics="batch", update=True):
            assert [layer.statistics for layer in net] == ["batch", "population", "population"]
    with normalization(net, statistics="batch", update=True):
        assert choices(net) == [("batch", True, None), *[("population", None, None)] * 2]
    assert [layer.frozen for layer in net] == [False, True, True]


def test_copies_made_within_a_context_have_the_owner_s_choices():
    """Nobody would end the context for them."""
    net = network()
    net[0].update = False
    with normalization(net, statistics="population", group_size=2):
        twin = copy.deepcopy(net)
        assert choices(net)[0] == ("population", False, 2)
    assert choices(twin) == choices(net) == [(None, False, None), (None, None, None)]
    with normalization(twin, update=True):
        assert choices(net) == [(None, False, None), (None, None, None)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "around",
    [
        {"statistics": "population"},
        {"statistics": "population", "update": False, "group_size": 2},
        {"statistics": "batch", "update": True, "group_size": 4},
    ],
)
def test_an_estimate_is_the_same_in_every_context(around, estimator):
    """And leaves the contexts around it as they are."""
    net = network()
    alone = estimate(net, [x()], estimator=estimator)
    assert list(alone) == ["0", "2"]
    before = copy.deepcopy(net.state_dict())
    with normalization(net, **around):
        chosen = choices(net)
        found = estimate(net, [x()], estimator=estimator)
        assert choices(net) == chosen
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert found.keys() == alone.keys()
    for name, values in alone.items():
        assert torch.equal(found[name].mean, values.mean)
        assert torch.equal(found[name].var, values.var)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_to_estimate_is_an_error(estimator):
    """P40: an empty population would pass for an estimate."""
    net = nn.Sequential(FrozenBatchNorm(3), BatchNorm(3, statistics="population"))
    with pytest.raises(ValueError, match="nothing to estimate: all 2 batch norms"):
        estimate(net, [x()], estimator=estimator)


def test_a_model_that_was_not_converted_is_refused_by_name():
    """P62: a discriminator of torch's layers would go on updating with fake images."""
    strange = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), BatchNorm(3))
    with (
        pytest.raises(ValueError, match=r"1 is torch's BatchNorm2d, .* \(normlab\.convert\)"),
        normalization(strange, update=False),
    ):
        pass
    assert choices(strange) == [(None, None, None)]
    strange[1] = nn.BatchNorm2d(3, track_running_stats=False)
    for legal in (strange, nn.Sequential(GroupNorm(4, groups=2)), nn.Linear(2, 2)):
        with normalization(legal, update=False):
            pass
