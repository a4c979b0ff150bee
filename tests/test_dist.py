"""The collectives against what one process computes that has everything."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.population import mixture
from torch import distributed, nn
from torch.distributed import ProcessGroup

from normlab import dist
from normlab.norms import BatchNorm

UNEQUAL = [3, 0, 5, 1]


def samples(rows, *shape, seed=0):
    """Each rank's rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=generator, dtype=torch.float64) for n in rows]


# -- collectives ----------------------------------------------------------------------------------


def reduce_and_gather(rank, parts, square, weights):
    """The losses of the ranks differ: their sum is what the gradients are of."""
    x, z = parts[rank].requires_grad_(), square[rank].requires_grad_()
    gathered, total = dist.all_gather(x), dist.all_reduce(z)
    ((gathered.square() * weights[rank]).sum() + (total**3).sum() * (rank + 1)).backward()
    return gathered.detach(), total.detach(), x.grad, z.grad


@pytest.mark.parametrize("rows", [UNEQUAL, [2, 2, 2, 2], [0, 0, 4, 0], [0, 0, 0, 0]])
def test_values_and_gradients(ranks, rows):
    parts, square = samples(rows, 2, 3), samples([2] * 4, 3)
    weights = samples([sum(rows)] * 4, 2, 3, seed=1)
    results = ranks.run(reduce_and_gather, parts, square, weights)
    x, z = torch.cat(parts).requires_grad_(), torch.stack(square).requires_grad_()
    loss = sum(
        (x.square() * w).sum() + (z.sum(0) ** 3).sum() * (r + 1) for r, w in enumerate(weights)
    )
    loss.backward()
    for rank, (gathered, total, dx, dz) in enumerate(results):
        assert torch.equal(gathered, x)
        torch.testing.assert_close(total, z.sum(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(dx, x.grad.split(rows)[rank], rtol=0, atol=1e-12)
        torch.testing.assert_close(dz, z.grad[rank], rtol=0, atol=1e-11)


def second_derivatives(rank, parts):
    x = parts[rank].requires_grad_()
    loss = (dist.all_reduce(dist.all_gather(x)) ** 3).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    return first.detach(), second


def test_gradients_of_gradients(ranks):
    """f = 4 ranks' sum (4 x)^3 = 256 x^3: f' = 768 x^2, d/dx f'^2 = 4 * 768^2 x^3."""
    parts = samples(UNEQUAL, 2)
    for x, (first, second) in zip(parts, ranks.run(second_derivatives, parts), strict=True):
        torch.testing.assert_close(first, 768 * x**2)
        torch.testing.assert_close(second, 4 * 768**2 * x**3)


def gather_with_one_gradient(rank, parts):
    x = parts[rank].requires_grad_(rank == 0)
    gathered = dist.all_gather(x)
    gathered.square().sum().backward()
    with torch.no_grad():
        quiet = dist.all_gather(x).requires_grad
    return x.grad, quiet


def test_one_rank_alone_may_need_gradients(ranks):
    parts = samples(UNEQUAL, 2)
    results = ranks.run(gather_with_one_gradient, parts)
    torch.testing.assert_close(results[0][0], 4 * 2 * parts[0])
    assert [grad for grad, _ in results[1:]] == [None] * 3
    assert not any(quiet for _, quiet in results)


def gather_what_differs(rank, xs, without_gradient=()):
    try:
        with torch.set_grad_enabled(rank not in without_gradient):
            dist.all_gather(xs[rank])
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "odd", [torch.zeros(2, 4), torch.zeros(2, 3, 1), torch.zeros(2, 3).double()]
)
def test_rows_that_differ_are_refused_on_every_rank(ranks, odd):
    xs = [torch.zeros(2, 3), odd, torch.zeros(0, 3), torch.zeros(2, 3)]
    for said in ranks.run(gather_what_differs, xs):
        assert "differ in shape or type" in said
        assert str(tuple(odd.shape[1:])) in said


@pytest.mark.parametrize("odd", [torch.zeros(()), torch.zeros([1] * 9), torch.zeros(2, 3).bool()])
def test_what_cannot_be_gathered_is_refused_on_every_rank(ranks, odd):
    """P27: a rank that raised alone would leave the others waiting."""
    xs = [torch.zeros(2, 3), odd, torch.zeros(0, 3), odd]
    for rank, said in enumerate(ranks.run(gather_what_differs, xs)):
        assert said.startswith("ranks [1, 3] have what cannot be gathered")
        assert (f"shape {tuple(odd.shape)} and type {odd.dtype}" in said) == (rank in (1, 3))
    with pytest.raises(ValueError, match="cannot be gathered"):
        dist.all_gather(odd)


def test_a_rank_that_computes_no_gradient_is_refused_on_every_rank(ranks):
    """P27: but only where another one needs it."""
    plain, needing = torch.zeros(2, 3), torch.zeros(2, 3).requires_grad_()
    xs = [plain, plain, needing, plain]
    for said in ranks.run(gather_what_differs, xs, [1]):
        assert said.endswith("some compute none: [True, False, True, True]")
    assert ranks.run(gather_what_differs, xs, [2]) == [""] * 4


def in_a_group(rank, parts):
    """Ranks 3 and 1 as a group; the others are refused."""
    group = distributed.new_group([1, 3])
    if rank in (0, 2):
        try:
            dist.all_reduce(parts[rank], group)
        except ValueError as error:
            return str(error)
    x = parts[rank]
    moved, shuffled = dist.shuffle(x, seed=1, group=group)
    returned = dist.unshuffle(moved, shuffled, group=group)
    merged = dist.merge(x.mean(0), x.var(0, correction=0), len(x), group)
    return dist.place(group), dist.all_gather(x, group), merged, torch.equal(returned, x)


def test_a_group_is_its_own_world(ranks):
    parts = samples([2, 3, 4, 5], 3)
    results = ranks.run(in_a_group, parts)
    both = torch.cat([parts[1], parts[3]])
    for rank, place in ((1, 0), (3, 1)):
        assert results[rank][0] == (place, 2)
        assert torch.equal(results[rank][1], both)
        torch.testing.assert_close(results[rank][2][1], both.var(0, correction=0))
        assert results[rank][3]
    for rank in (0, 2):
        assert f"rank {rank} is not in the group" in results[rank]


# -- statistics -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    offset=st.sampled_from([0.0, 1e4, 1e6, -1e6]),
    seed=st.integers(0, 1000),
)
def test_pool_is_the_statistics_of_the_union(rows, offset, seed):
    """P41, P64: whatever the split and the offset; empty parts say nothing, not even nan."""
    parts = [x + offset for x in samples(rows, 3, seed=seed)]
    means = torch.stack([x.mean(0) for x in parts])
    variances = torch.stack([(x - x.mean(0)).square().mean(0) for x in parts])
    mean, var, count = dist.pool(means, variances, torch.tensor(rows))
    everything = torch.cat(parts)
    assert count == sum(rows)
    torch.testing.assert_close(mean, everything.mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(var, everything.var(0, correction=0), rtol=1e-7, atol=1e-13)


def merge_on(rank, parts):
    x = parts[rank]
    mean = x.mean(0)
    return dist.merge(mean, (x - mean).square().mean(0), len(x))


def test_merge_is_exact_and_equal_on_all_ranks(ranks):
    """P36: count-weighted, ranks without samples included, bitwise the same everywhere."""
    parts = [2 * rank + (1 + rank) * x for rank, x in enumerate(samples(UNEQUAL, 2, 3))]
    results = ranks.run(merge_on, parts)
    everything = torch.cat(parts)
    for mean, var, count in results:
        assert count == 9
        torch.testing.assert_close(mean, everything.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(var, everything.var(0, correction=0), rtol=1e-13, atol=0)
        assert torch.equal(mean, results[0][0])
        assert torch.equal(var, results[0][1])


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no elements"):
        dist.merge(torch.zeros(2), torch.zeros(2), 0)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 1), BatchNorm(3), nn.BatchNorm2d(3, affine=False), nn.ReLU()]
    shared = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(*layers, shared, nn.Sequential(layers[1], nn.BatchNorm2d(3)))


def train_and_average(rank, parts, how, count):
    model = network()
    for _ in range(rank + 1):
        model(parts[rank].float())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dist.average_buffers(model, how=how, count=1 if count is None else count[rank])
    return before, model.state_dict()


@pytest.mark.parametrize(
    ("how", "count"), [("average", None), ("average", [3, 0, 5, 1]), ("broadcast", None)]
)
def test_average_buffers(ranks, how, count):
    """P30: the averaged variance includes the spread of the ranks' means; P29: equal to the bit."""
    parts = [x * (rank + 1) + 3 * rank for rank, x in enumerate(samples([4] * 4, 2, 3, 3))]
    results = ranks.run(train_and_average, parts, how, count)
    weights = torch.tensor(count or [1] * 4).double()
    weights /= weights.sum()
    for _, state in results:
        assert all(torch.equal(value, results[0][1][name]) for name, value in state.items())
    statistics = [name for name in results[0][1] if name.endswith("running_mean")]
    assert len(statistics) == 4  # one of the layers under two names
    for name in results[0][1]:
        found = [before[name].double() for before, _ in results]
        if "running" not in name and "num_batches" not in name:
            expected = found[0]  # parameters stay
        elif how == "broadcast":
            expected = found[0]
        elif name.endswith("running_mean"):
            expected = sum(w * m for w, m in zip(weights, found, strict=True))
        elif name.endswith("running_var"):
            means = torch.stack([b[name.replace("_var", "_mean")].double() for b, _ in results])
            spread = mixture(means, torch.zeros_like(means), weights)[1]
            assert name != "1.running_var" or spread.max() > 0.1
            expected = torch.from_numpy(mixture(means, torch.stack(found), weights)[1])
        else:
            expected = torch.stack(found).amax(0)
        torch.testing.assert_close(results[0][1][name].double(), expected, rtol=1e-6, atol=1e-7)


def average_again(rank, parts):
    model = network()
    model(parts[0].float())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dist.average_buffers(model, count=rank / 3)
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_equal_buffers_stay_to_the_bit(ranks):
    assert ranks.run(average_again, samples([4], 2, 3, 3)) == [True] * 4


BAD = {
    "layers": "ranks hold different numbers of means in layer 0: 2, 3, 2, 2",
    "order": "ranks hold different numbers of means in layer 0: 2, 3, 2, 2",
    "none": "ranks hold different numbers of means in layer 0: 2, no layer, 2, 2",
    "counters": "ranks hold different numbers of counts of batches in layer 0: 1, 0, 1, 1",
    "how": "how is one of average, mean, broadcast, on every rank the same",
    "negative": "count must be at least 0 and finite, not 1, -1, 1, 1",
    "infinite": "count must be at least 0 and finite, not 1, inf, 1, 1",
    "nan": "count must be at least 0 and finite, not 1, nan, 1, 1",
    "zero": "there are no statistics of no elements",
    "many": "there are no statistics of inf elements",
}


def average_badly(rank, mistake):
    """What this rank says where rank 1, or all, are mistaken; and whether nothing changed."""
    odd = rank == 1
    widths = {"layers": (3,), "order": (3, 2), "none": ()}.get(mistake if odd else "", (2, 3))
    model = nn.Sequential(*(BatchNorm(width) for width in widths))
    for layer in model:
        layer.running_mean.fill_(rank)
    if odd and mistake == "counters":
        model[0].num_batches_tracked = None
    counts = {"negative": -1, "infinite": math.inf, "nan": math.nan}
    count = counts.get(mistake if odd else "", {"zero": 0, "many": 1e308}.get(mistake, 1))
    try:
        how = "broadcast" if odd and mistake == "how" else "average"
        dist.average_buffers(model, how=how, count=count)
    except ValueError as error:
        return str(error), all((layer.running_mean == rank).all() for layer in model)
    return None


@pytest.mark.parametrize("mistake", BAD)
def test_average_buffers_refuses_on_every_rank(ranks, mistake):
    """P27: what one rank does wrong, all learn, before anything changes."""
    for said, unchanged in ranks.run(average_badly, mistake):
        assert said.startswith(BAD[mistake])
        assert unchanged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "median"}, "average, mean, broadcast"),
        ({"count": -1}, "count must be at least 0 and finite, not -1"),
        ({"count": math.inf}, "count must be at least 0 and finite, not inf"),
    ],
)
def test_average_buffers_refuses_alone(arguments, message):
    with pytest.raises(ValueError, match=message):
        dist.average_buffers(BatchNorm(2), **arguments)


def average_nothing(_rank):
    dist.average_buffers(nn.Linear(2, 2))
    dist.average_buffers(nn.ReLU())


def test_a_model_without_statistics_is_left_alone(ranks):
    assert ranks.run(average_nothing) == [None] * 4


# -- shuffling ------------------------------------------------------------------------------------


def head(x):
    """Something computed for each sample by itself."""
    return torch.stack([x.sum(1).sin(), x.prod(1)], dim=1)


def shuffled(rank, parts, dys):
    x = parts[rank].requires_grad_()
    moved, back = dist.shuffle(x, seed=7 + rank)  # the first rank's seed counts
    returned = dist.unshuffle(moved, back)
    y = dist.unshuffle(head(moved), back)
    y.backward(dys[rank], retain_graph=True)
    dx, x.grad = x.grad, None
    returned.backward(parts[rank].detach())
    return moved.detach(), returned.detach(), y.detach(), dx, x.grad, back


@pytest.mark.parametrize("rows", [UNEQUAL, [2, 2, 2, 2], [0, 0, 4, 0]])
def test_shuffle_and_back(ranks, rows):
    """K10: identity in values and gradients, with a head between, for unequal and empty ranks."""
    parts, dys = samples(rows, 3), samples(rows, 2, seed=1)
    state = torch.get_rng_state()
    results = ranks.run(shuffled, parts, dys)
    assert torch.equal(state, torch.get_rng_state())
    everything = torch.cat(parts)
    order = torch.randperm(sum(rows), generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.cat([moved for moved, *_ in results]), everything[order])
    for rank, (moved, returned, y, dx, identity, back) in enumerate(results):
        x = parts[rank].clone().requires_grad_()
        head(x).backward(dys[rank])
        assert len(moved) == rows[rank]
        assert torch.equal(returned, x)
        assert torch.equal(identity, x)
        assert torch.equal(y, head(x))
        torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-14)
        assert torch.equal(back.order, order)


def unshuffle_too_few(rank, parts):
    moved, back = dist.shuffle(parts[rank], seed=0)
    try:
        dist.unshuffle(moved[: 2 if rank == 2 else None], back)
    except ValueError as error:
        return str(error)
    return ""


def test_a_lost_sample_is_noticed_on_every_rank(ranks):
    for said in ranks.run(unshuffle_too_few, samples(UNEQUAL, 3)):
        assert said == "ranks had (3, 0, 5, 1) shuffled samples, and now (3, 0, 2, 1)"


# -- alone ----------------------------------------------------------------------------------------


def test_alone_everything_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert dist.place() == (0, 1)
    assert dist.all_reduce(x) is x
    assert dist.all_gather(x) is x
    moved, back = dist.shuffle(x, seed=0)
    assert moved is x
    assert dist.unshuffle(x, back) is x
    assert torch.equal(dist.stack(x), x[None])
    mean, var, count = dist.merge(x.mean(0), x.var(0), 3)
    assert torch.equal(mean, x.mean(0).double())
    assert torch.equal(var, x.var(0).double())
    assert count == 3
    model = network()
    model(torch.randn(2, 2, 3, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for how in ("average", "broadcast"):
        dist.average_buffers(model, how=how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_alone_a_group_is_refused():
    with pytest.raises(ValueError, match="no process group"):
        dist.place(ProcessGroup(0, 1))
