"""Estimates that several ranks make together (P36): those of one process with all the batches."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from normlab.norms import BatchNorm, GhostBatchNorm, SyncBatchNorm
from normlab.population import AveragedWeights, estimate

ESTIMATORS = ["pooled", "mean", "layerwise", "cheap"]
UNEQUAL = [[4, 6, 2], [], [8], [2, 2, 4, 10]]
"""The sizes of each rank's batches."""


def network(middle=None):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        BatchNorm(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        GhostBatchNorm(4, nbs=2) if middle is None else middle,
        nn.Conv2d(4, 3, 3),
        BatchNorm(3),
    ).double()


def batches(sizes=UNEQUAL):
    """Each rank's batches: images that differ from batch to batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            (torch.randn(n, 2, 7, 7, generator=generator) * (1 + rank) + number).double()
            for number, n in enumerate(own)
        ]
        for rank, own in enumerate(sizes)
    ]


def union(of_ranks):
    return [batch for own in of_ranks for batch in own]


def kept(model):
    """What an estimate must leave as it is."""
    return [
        [m.training for m in model.modules()],
        [getattr(m, "observers", None) for m in model.modules()],
        [getattr(m, "statistics", None) for m in model.modules()],
        [getattr(m, "require_forward_param_sync", None) for m in model.modules()],
        [len(m._forward_pre_hooks) for m in model.modules()],
        {name: value.tolist() for name, value in model.state_dict().items()},
    ]


def assert_equal(found, expected, close=1e-12):
    """One value on all ranks, to the bit, and that of one process."""
    for population in found:
        assert list(population) == list(expected)
        for name, statistics in population.items():
            assert torch.equal(statistics.mean, found[0][name].mean)
            assert torch.equal(statistics.var, found[0][name].var)
            assert statistics.mean.dtype == statistics.var.dtype == torch.float64
            assert statistics.count == expected[name].count
            near = {"rtol": close, "atol": close}
            torch.testing.assert_close(statistics.mean, expected[name].mean, **near)
            torch.testing.assert_close(statistics.var, expected[name].var, **near)


def together(rank, of_ranks):
    model = network()
    model[6].statistics = "population"
    for buffer in model.buffers():
        buffer += rank  # what the buffers hold, and on which rank, plays no role
    before = kept(model)
    found = {name: estimate(model, of_ranks[rank], estimator=name) for name in ESTIMATORS}
    assert kept(model) == before
    return found


@pytest.mark.parametrize("sizes", [UNEQUAL, [[], [], [4, 2], []], [[2], [2], [4], [2]]])
def test_unequal_loaders_are_one_process_on_the_union(ranks, sizes):
    """P36"""
    of_ranks = batches(sizes)
    results = ranks.run(together, of_ranks)
    model = network()
    model[6].statistics = "population"
    for name in ESTIMATORS:
        expected = estimate(model, union(of_ranks), estimator=name)
        assert_equal([result[name] for result in results], expected)


def wrapped(rank, of_ranks, inside):
    """In two ranks only: to load what the wrapper needs takes a second each."""
    pair = distributed.new_group([0, 1])
    if rank > 1:
        return None
    model = DistributedDataParallel(network(), process_group=pair)
    if inside:
        model = nn.Sequential(model, nn.Flatten())
    for buffer in model.buffers():
        buffer += rank
    before = kept(model)
    found = [estimate(model, of_ranks[rank], estimator=e, group=pair) for e in ESTIMATORS]
    assert kept(model) == before
    return found


@pytest.mark.parametrize("inside", [False, True])
def test_a_distributed_data_parallel_broadcasts_nothing(ranks, inside):
    """P36, P28: not every rank would join, and ranks' buffers would be overwritten."""
    of_ranks = batches([[4, 2, 6], []])
    results = ranks.run(wrapped, of_ranks, inside)[:2]
    for number, name in enumerate(ESTIMATORS):
        one = estimate(network(), of_ranks[0], estimator=name)
        expected = {("0." if inside else "") + f"module.{layer}": v for layer, v in one.items()}
        assert_equal([result[number] for result in results], expected)


def in_groups(rank, of_ranks):
    """Ranks 1 and 3 together, each of the others alone."""
    both = distributed.new_group([1, 3])
    group = both if rank in (1, 3) else "alone"
    return [estimate(network(), of_ranks[rank], estimator=e, group=group) for e in ESTIMATORS]


def test_some_ranks_or_one_alone(ranks):
    of_ranks = batches([[4, 2], [2], [6], [2, 4]])
    results = ranks.run(in_groups, of_ranks)
    for number, name in enumerate(ESTIMATORS):
        found = [result[number] for result in results]
        pair = estimate(network(), of_ranks[1] + of_ranks[3], estimator=name)
        assert_equal([found[1], found[3]], pair)
        for rank in (0, 2):
            alone = estimate(network(), of_ranks[rank], estimator=name)
            assert_equal([found[rank]], alone, close=0)


class Choosing(nn.Module):
    """Which layers it uses depends on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = BatchNorm(2).double(), BatchNorm(2).double()

    def forward(self, x):
        for name in {4: "ab", 3: "a", 2: "ba"}[len(x)]:
            x = getattr(self, name)(x)
        return x


def choose(rank, of_ranks):
    return estimate(Choosing(), of_ranks[rank], estimator="pooled")


def test_a_layer_that_some_ranks_never_reach_has_the_others_statistics(ranks):
    """P42"""
    of_ranks = [[x[..., 0, 0] for x in own] for own in batches([[3], [4, 3], [3], []])]
    expected = estimate(Choosing(), union(of_ranks), estimator="pooled")
    assert expected["b"].count == 4
    assert_equal(ranks.run(choose, of_ranks), expected)


def averaged(rank, of_ranks):
    model = network()
    average = AveragedWeights(model)
    average.update()
    return dict(average.model(buffers="estimate", batches=of_ranks[rank]).named_buffers())


def test_averaged_weights_have_the_same_buffers_on_all_ranks(ranks):
    """P45, P36"""
    of_ranks = batches()
    model = network()
    average = AveragedWeights(model)
    average.update()
    expected = average.model(buffers="estimate", batches=union(of_ranks))
    for found in ranks.run(averaged, of_ranks):
        for name, value in expected.named_buffers():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


# -- synchronized layers --------------------------------------------------------------------------


def synchronized(rank, of_ranks, estimator, pairs, options):
    group = None
    if pairs:
        groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
        group = groups[rank // 2]
    model = network(SyncBatchNorm(4, group=group))
    try:
        return estimate(model, of_ranks[rank], estimator=estimator, **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("estimator", ["pooled", "mean", "cheap"])
def test_what_synchronized_layers_see_counts_once(ranks, estimator, pairs):
    of_ranks = batches([[2, 4]] * 4)
    results = ranks.run(synchronized, of_ranks, estimator, pairs, {})
    first, middle = network()[:4], network()[4:]  # up to, and from, the synchronized layer
    alone = estimate(first, union(of_ranks), estimator=estimator)
    middle[0] = BatchNorm(4).double()
    inputs = [
        [nn.functional.batch_norm(first[0](x), None, None, training=True).relu() for x in own]
        for own in of_ranks
    ]
    sets = [(0, 1), (2, 3)] if pairs else [(0, 1, 2, 3)]
    joined = [torch.cat([inputs[r][i] for r in s]).detach() for s in sets for i in (0, 1)]
    expected = alone | {"4": estimate(middle[0], joined, estimator=estimator)[""]}
    found = [{name: result[name] for name in ("1", "4")} for result in results]
    assert_equal(found, expected)
    assert all(torch.equal(r["6"].var, results[0]["6"].var) for r in results)
    assert results[0]["6"].count == alone["1"].count // 25 * 9


@pytest.mark.parametrize(
    ("estimator", "options"), [("pooled", {"group_size": 2}), ("layerwise", {})]
)
def test_where_they_exchange_nothing_the_loaders_may_differ(ranks, estimator, options):
    of_ranks = batches()
    results = ranks.run(synchronized, of_ranks, estimator, False, options)
    model = network(BatchNorm(4))
    assert_equal(results, estimate(model, union(of_ranks), estimator=estimator, **options))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([[2, 2], [2, 2], [2], [2, 2]], {}, "layers that are synchronized over ranks need as many"),
        ([[2, 2]] * 4, {"group": "alone"}, "4 exchanges its statistics with ranks that take no"),
    ],
)
def test_where_they_would_wait_for_ever_it_is_refused(ranks, sizes, options, message):
    """P27"""
    for said in ranks.run(synchronized, batches(sizes), "pooled", False, options):
        assert said.startswith(message)


# -- what fails on one rank -----------------------------------------------------------------------


def failing(loader):
    yield from loader
    raise KeyError("broken")


class Unreadable:
    def __iter__(self):
        raise KeyError("broken")


def mistaken(rank, of_ranks, estimator, mistake):
    """What each rank raises where rank 1 is mistaken; afterwards all can go on."""
    model, odd, options = network(), rank == 1, {}
    given = of_ranks[rank]
    if mistake == "nothing":
        given = []
    elif mistake == "order":
        model, given = Choosing(), [torch.randn(2 if odd else 4, 2).double()]
    elif mistake == "decay":
        options = {"decay": 0.9}
    if mistake in ("step", "start"):
        model = network(SyncBatchNorm(4))
    if odd and mistake in ("loader", "step"):
        given = failing(given)
    elif odd and mistake == "start":
        given = Unreadable()
    elif odd and mistake == "group_size":
        options = {"group_size": 2}
    elif odd and mistake == "batch":
        given = [given[0], given[0][:3]]  # not a multiple of the ghost's chunks
    elif odd and mistake == "later":
        given = [given[0], given[0][:, :1]]
    elif odd and mistake == "estimator":
        estimator = "mean"
    elif odd and mistake == "layers":
        model[1] = nn.Identity()
    elif odd and mistake == "torch":
        model[1] = nn.BatchNorm2d(4)
    elif odd and mistake == "spent":
        given = iter(given)
    before = kept(model)
    try:
        estimate(model, given, estimator=estimator, **options)
    except Exception as error:
        assert kept(model) == before
        assert torch.is_grad_enabled()
        sum_of_ranks = torch.ones(())
        distributed.all_reduce(sum_of_ranks)
        assert sum_of_ranks == 4
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("estimator", "mistake", "kind", "message"),
    [
        *((name, "nothing", ValueError, "need at least one batch") for name in ESTIMATORS),
        ("pooled", "loader", KeyError, "broken"),
        ("pooled", "step", KeyError, "broken"),
        ("pooled", "start", KeyError, "broken"),
        ("mean", "group_size", ValueError, "their estimators, group_size or layers differ"),
        ("cheap", "batch", ValueError, "not a multiple of nbs=2"),
        ("pooled", "estimator", ValueError, "their estimators, group_size or layers differ"),
        ("mean", "layers", ValueError, "their estimators, group_size or layers differ"),
        ("mean", "torch", ValueError, "1 is torch's BatchNorm2d"),
        ("cheap", "decay", ValueError, "those of several ranks have none"),
        ("layerwise", "later", RuntimeError, "channels"),
        ("layerwise", "spent", ValueError, "not an iterator"),
        ("layerwise", "order", ValueError, "ranks reach the layers in different orders"),
    ],
)
def test_a_failure_of_one_rank_is_one_of_all(ranks, estimator, mistake, kind, message):
    """P36, P27: nobody waits for a rank that raised, and nobody takes a part for the whole."""
    results = ranks.run(mistaken, batches([[2], [4], [2], [2]]), estimator, mistake)
    of_all = mistake in ("nothing", "estimator", "group_size", "layers", "decay", "order")
    for rank, (raised, said) in enumerate(results):
        if of_all or rank == 1:
            assert raised is kind
            assert message in said
        else:
            assert raised is RuntimeError
            assert said == "the estimate failed on ranks [1]: their own errors say why"


def test_a_group_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'alone', not 'all'"):
        estimate(BatchNorm(2), [torch.randn(4, 2)], estimator="pooled", group="all")


def test_alone_is_the_process_without_a_group():
    model, of_one = network(), union(batches())
    expected = estimate(model, of_one, estimator="pooled")
    assert_equal([estimate(model, of_one, estimator="pooled", group="alone")], expected, close=0)
