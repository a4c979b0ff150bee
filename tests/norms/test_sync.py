"""One rank's batch norm against the batch norm of all ranks' elements, in one process."""

import copy
import pickle

import pytest
import torch
from oracles.population import ema
from oracles.sync import statistics, step
from torch import distributed, nn

from normlab import build, config
from normlab.norms import BatchNorm, SyncBatchNorm

from .checks import numpy
from .inputs import LAYOUTS, lay_out, random_affine

EQUAL = [(4, 6, 3, 2)] * 4
SHAPES = {
    "equal": EQUAL,
    "unequal": [(5, 6, 3, 2), (3, 6, 3, 2), (1, 6, 3, 2), (7, 6, 3, 2)],
    "positions": [(2, 6, 3, 5), (3, 6, 4, 1), (1, 6, 7, 7), (4, 6, 1, 1)],
    "empty": [(0, 6, 3, 2), (5, 6, 3, 2), (0, 6, 3, 2), (2, 6, 3, 2)],
    "one each": [(1, 6, 1, 1)] * 4,
    "one at all": [(0, 6, 1), (0, 6, 1), (1, 6, 2), (0, 6, 1)],
    "2d": [(3, 6), (1, 6), (0, 6), (2, 6)],
    "3d": [(3, 6, 4), (1, 6, 4), (2, 6, 4), (2, 6, 4)],
    "5d": [(1, 6, 2, 3, 2), (2, 6, 2, 3, 2), (3, 6, 2, 3, 2), (1, 6, 2, 3, 2)],
}


def parts(shapes, dtype=torch.float64, offset=0.0, seed=0):
    """Each rank's x and dy, from distributions that differ between ranks."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    xs = [x * (1 + rank) + 2 * rank + offset for rank, (x, _) in enumerate(drawn)]
    return [x.to(dtype) for x in xs], [dy.to(dtype) for _, dy in drawn]


def made(layer, dtype=torch.float64):
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    return layer


def used(layer, x, dy, steps=1):
    """Everything that forward and backward leave behind."""
    seen = []
    layer.observers.append(seen.append)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        y = layer(x)
    y.backward(dy)
    return {
        "y": y.detach(), "dx": x.grad, **{name: p.grad for name, p in layer.named_parameters()},
        **{name: b.clone() for name, b in layer.named_buffers()},
        "mean": seen[-1].mean, "var": seen[-1].var, "count": seen[-1].count,
    }  # fmt: skip


def on_rank(rank, xs, dys, layout="contiguous", steps=1):
    layer = made(SyncBatchNorm(6), torch.promote_types(xs[0].dtype, torch.float32))
    return used(layer, lay_out(xs[rank], layout), lay_out(dys[rank], layout), steps)


def rows(x):
    """(N, C, ...) to (elements per channel, C)."""
    return x.movedim(1, -1).reshape(-1, x.size(1))


def in_one(xs, dys, steps=1):
    """The same by the definition: of one batch norm on all elements, in float64."""
    layer = made(BatchNorm(6))
    xs, dys = ([numpy(part) for part in parts] for parts in (xs, dys))
    affine = numpy(layer.weight), numpy(layer.bias)
    y, dx, dweight, dbias = step(xs, dys, *affine, layer.eps)
    mean, var, count = statistics(xs)
    values = {
        "y": y, "dx": dx, "weight": dweight, "bias": dbias, "mean": mean[None], "var": var[None],
        "running_mean": ema(0, [mean] * steps, layer.decay),
        "running_var": ema(1, [statistics(xs, ddof=1)[1]] * steps, layer.decay),
    }  # fmt: skip
    found = {name: torch.from_numpy(value) for name, value in values.items()}
    return {**found, "num_batches_tracked": torch.tensor(steps), "count": count}


def check(results, expected, atol, rtol=0.0):
    close = {"rtol": rtol, "atol": atol}
    for key in ("y", "dx"):
        found = torch.cat([rows(result[key].double()) for result in results])
        torch.testing.assert_close(found, expected[key], **close)
    for key in ("weight", "bias"):
        total = sum(result[key].double() for result in results)
        torch.testing.assert_close(total, expected[key], rtol=rtol, atol=atol * 8)
    for key in ("running_mean", "running_var", "num_batches_tracked", "mean", "var"):
        torch.testing.assert_close(results[0][key].to(expected[key].dtype), expected[key], **close)
        assert all(torch.equal(result[key], results[0][key]) for result in results)
    assert {result["count"] for result in results} == {expected["count"]}


def lone(rank, xs, dys, absent):
    layer = made(SyncBatchNorm(6))
    layer.register_parameter(absent, None)
    return used(layer, xs[rank], dys[rank])


@pytest.mark.parametrize(("absent", "kept"), [("weight", "bias"), ("bias", "weight")])
def test_a_weight_without_a_bias_and_the_reverse(ranks, absent, kept):
    """What convert makes of torch's BatchNorm2d(bias=False)."""
    xs, dys = parts(SHAPES["equal"])
    results = ranks.run(lone, xs, dys, absent)
    x, dy = (torch.cat([rows(part) for part in all_]) for all_ in (xs, dys))
    (layer := made(BatchNorm(6))).register_parameter(absent, None)
    expected = used(layer, x, dy)
    for key in ("y", "dx"):
        found = torch.cat([rows(result[key]) for result in results])
        torch.testing.assert_close(found, expected[key], rtol=0, atol=1e-12)
    total = sum(result[kept] for result in results)
    torch.testing.assert_close(total, expected[kept], rtol=0, atol=1e-11)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_is_the_batch_norm_of_all_elements(ranks, shapes):
    """P19, P20, P22, P32, P33: unequal counts and positions, empty ranks, one sample per rank.

    Outputs, input gradients, the sum of the ranks' parameter gradients and buffers, in float64,
    after three steps; on CPU ranks (P23). Without samples: empty output, zero gradients.
    """
    xs, dys = parts(shapes)
    results = ranks.run(on_rank, xs, dys, "contiguous", 3)
    check(results, in_one(xs, dys, 3), 1e-12)
    for x, result in zip(xs, results, strict=True):
        assert result["y"].shape == result["dx"].shape == x.shape
        if not len(x):
            assert not result["weight"].any()
            assert not result["bias"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_precisions(ranks, layout, dtype):
    """P21: channels_last and permuted inputs, values and gradients, against float64."""
    xs, dys = parts(SHAPES["unequal"], dtype)
    results = ranks.run(on_rank, xs, dys, layout)
    half = dtype in (torch.bfloat16, torch.float16)
    assert {result["y"].dtype for result in results} == {dtype}
    assert results[0]["var"].dtype == results[0]["running_var"].dtype
    assert results[0]["var"].dtype == torch.promote_types(dtype, torch.float32)
    expected = in_one(xs, dys)
    check(results, expected, {torch.float64: 1e-12, torch.float32: 4e-5}.get(dtype, 4e-2))
    if half:  # K11: statistics of the rounded input
        torch.testing.assert_close(results[0]["var"].double(), expected["var"], rtol=1e-5, atol=0)
    if layout == "channels_last":
        assert all(result["y"].movedim(1, -1).is_contiguous() for result in results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6])
def test_large_means_keep_precision(ranks, offset, layout):
    """P64: float32, a spread of some units: errors below a few roundings of the input."""
    xs, dys = parts(SHAPES["unequal"], torch.float32, offset)
    results = ranks.run(on_rank, xs, dys, layout)
    rounding = offset * torch.finfo(torch.float32).eps
    check(results, in_one(xs, dys), 4e-5 + 8 * rounding, rtol=1e-5)
    # The statistics themselves are as good as float32 can say them.
    expected = in_one(xs, dys)
    torch.testing.assert_close(results[0]["var"].double(), expected["var"], rtol=1e-6, atol=0)


def test_float16_does_not_overflow(ranks):
    xs, dys = parts(SHAPES["unequal"], torch.float16, 300)
    for result in ranks.run(on_rank, xs, dys):
        assert result["y"].isfinite().all()
        assert result["dx"].isfinite().all()


# -- groups ---------------------------------------------------------------------------------------


def in_pairs(rank, xs, dys):
    pairs = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    own, other = pairs[rank % 2], pairs[1 - rank % 2]
    try:
        SyncBatchNorm(6, group=other)
        said = ""
    except ValueError as error:
        said = str(error)
    layer = SyncBatchNorm(6, group=own).double()
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert twin.group is layer.group
    return used(made(layer), xs[rank], dys[rank]), twin(xs[rank]), said


def test_groups_of_ranks(ranks):
    """P26: 4 ranks in 2 groups have two sets of statistics; a foreign group is refused."""
    xs, dys = parts(SHAPES["unequal"])
    results, _, said = zip(*ranks.run(in_pairs, xs, dys), strict=True)
    for pair in ((0, 2), (1, 3)):
        expected = in_one([xs[rank] for rank in pair], [dys[rank] for rank in pair])
        check([results[rank] for rank in pair], expected, 1e-12)
    assert not torch.equal(results[0]["running_mean"], results[1]["running_mean"])
    for rank, message in enumerate(said):
        assert f"rank {rank} is not in the group" in message


def in_groups_of_one(rank, xs):
    groups = [distributed.new_group([each]) for each in range(4)]
    layer, plain = SyncBatchNorm(6, group=groups[rank]), BatchNorm(6)
    return torch.equal(layer(xs[rank]), plain(xs[rank])) and torch.equal(
        layer.running_var, plain.running_var
    )


def test_a_group_of_one_rank_is_batch_norm(ranks):
    assert ranks.run(in_groups_of_one, parts(EQUAL, torch.float32)[0]) == [True] * 4


def test_a_group_without_process_group_is_refused():
    group = distributed.ProcessGroup(0, 1)
    with pytest.raises(ValueError, match="has no process group"):
        SyncBatchNorm(6, group=group)


# -- disagreements and errors ---------------------------------------------------------------------


def disagree(rank, how):
    """What every rank says where rank 1 does otherwise; and that nothing was changed."""
    group = distributed.new_group()  # what ranks count in it would differ afterwards
    one, other = SyncBatchNorm(3, group=group), SyncBatchNorm(3, group=group)
    x = torch.randn(2, 3, 4, requires_grad=True)
    for layer in (one,) if how == "calls" else (one, other):
        layer(x)
    before = [buffer.clone() for buffer in one.buffers()]
    layer = one
    if rank == 1 and how == "update":
        layer.update = False
    if rank == 1 and how == "group":
        layer.group_size = 2
    if rank == 1 and how == "shape":
        x = x[:, :2]
    if (rank == 1) == (how == "layer") and how in ("layer", "calls"):
        layer = other
    try:
        with torch.set_grad_enabled(not (rank == 1 and how == "gradients")):
            layer(x if how != "elements" else x[:0] if rank else x[:1, :, :1])
    except (RuntimeError, ValueError) as error:
        same = all(torch.equal(a, b) for a, b in zip(before, one.buffers(), strict=True))
        return type(error), str(error), same
    return None


DIFFERENT = "different synchronized layers, or calls of one (rank 0: "
REFUSED = "ranks [1] refuse what a synchronized layer is called with there"


@pytest.mark.parametrize(
    ("how", "kind", "told", "own"),
    [
        (
            "layer",
            RuntimeError,
            DIFFERENT + "call 2 of layer 0, rank 1: call 2 of layer 1, rank 2",
            None,
        ),
        (
            "calls",
            RuntimeError,
            DIFFERENT + "call 1 of layer 1, rank 1: call 2 of layer 0, rank 2",
            None,
        ),
        ("shape", RuntimeError, REFUSED, "SyncBatchNorm(3) got 2 channels: (2, 2, 4)"),
        ("group", RuntimeError, REFUSED, "group_size=2 forms groups within a rank"),
        ("update", RuntimeError, "some ranks update in a synchronized layer, some do not", None),
        ("gradients", RuntimeError, "some ranks compute gradients", None),
        (
            "elements",
            ValueError,
            "more than one element per channel over its 4 ranks, which have 1",
            None,
        ),
    ],
)
def test_all_ranks_raise_where_they_disagree(ranks, how, kind, told, own):
    """P27: ranks which meet in different layers, calls or modes, or of which one is given what it
    has to refuse, raise on every rank instead of hanging; so does a batch of one element (P8).

    A rank that calls no synchronized layer at all cannot be heard of: the others wait.
    """
    for rank, result in enumerate(ranks.run(disagree, how)):
        assert result is not None
        alone = own is not None and rank == 1
        assert result[0] is (ValueError if alone else kind)
        assert (own if alone else told) in result[1]
        assert result[2]


def input_gradients_differ(rank):
    """Only rank 0's input requires a gradient: the others take part in its backward pass."""
    layer = SyncBatchNorm(3, affine=False).double()
    x = torch.arange(24, dtype=torch.float64).view(2, 3, 4).sin() + rank
    x.requires_grad_(rank == 0)
    y = layer(x)
    (y * torch.arange(4)).sum().backward()
    return x.grad


def test_one_rank_alone_may_need_input_gradients(ranks):
    first, *others = ranks.run(input_gradients_differ)
    x = torch.cat([torch.arange(24, dtype=torch.float64).view(2, 3, 4).sin() + r for r in range(4)])
    x.requires_grad_()
    (BatchNorm(3, affine=False).double()(x) * torch.arange(4)).sum().backward()
    torch.testing.assert_close(first, x.grad[:2], rtol=0, atol=1e-12)
    assert others == [None] * 3


# -- in one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 5), (8, 6, 4, 3), (8, 6, 2, 3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_is_batch_norm_to_the_bit(shape, layout):
    torch.manual_seed(0)
    x, dy = lay_out(torch.randn(shape), layout), torch.randn(shape)
    ours, theirs = made(SyncBatchNorm(6), torch.float32), made(BatchNorm(6), torch.float32)
    one, other = used(ours, x, dy, 2), used(theirs, x, dy, 2)
    assert all(torch.equal(value, other[key]) for key, value in one.items() if key != "count")
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_state_dict_and_copies():
    """P15: strict both ways with torch's layers, its own SyncBatchNorm included; pickles."""
    torch.manual_seed(0)
    layer = made(SyncBatchNorm(4), torch.float32)
    layer(torch.randn(8, 4, 3, 3))
    for other in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), BatchNorm(4)):
        other.load_state_dict(layer.state_dict(), strict=True)
        fresh = SyncBatchNorm(4)
        fresh.load_state_dict(other.state_dict(), strict=True)
        assert list(fresh.state_dict()) == list(layer.state_dict())
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, layer.state_dict()[name])
    x = torch.randn(8, 4, 3, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), copy.deepcopy(layer)(x))
        assert twin.group is None


def test_compiles_without_graph_breaks_in_one_process():
    torch.manual_seed(0)
    layer = SyncBatchNorm(4)
    x = torch.randn(8, 4, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def compiled_on_rank(rank, xs, dys):
    """What a compiled network leaves behind, and the plain one; what is said of a whole graph."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(6, 6, 1), SyncBatchNorm(6), nn.Conv2d(6, 6, 1)).double()
        call = torch.compile(network, backend="eager") if compiled else network
        for _ in range(3):
            x = xs[rank].clone().requires_grad_()
            y = call(x)
            y.backward(dys[rank])
        found.append([y.detach(), x.grad, *(p.grad for p in network.parameters())])
        found[-1] += list(network.buffers())
    try:
        torch.compile(network, backend="eager", fullgraph=True)(xs[rank])
        said = ""
    except torch._dynamo.exc.Unsupported as error:
        said = str(error)
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)], said


def test_compiles_with_a_graph_break_among_ranks(ranks):
    """An exception to P73 (docs/pains.md): equal to eager; a whole graph is refused."""
    for equal, said in ranks.run(compiled_on_rank, *parts(SHAPES["unequal"])):
        assert equal == [True] * 11
        assert "_synchronize" in said


def test_the_config_trains_as_batch_norm():
    """norm=sync in one process: the plan of bn, with and without an NBS, and its network."""
    for nbs in ("null", "16"):
        built = {}
        for norm in ("sync", "bn"):
            resolved = config.compose(["scale=demo", f"norm={norm}", f"nbs={nbs}", "device=cpu"])
            plan = build.plan(resolved)
            model = build.model(resolved, build.data(resolved))
            x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            built[norm] = (plan.nbs, plan.micro_batch, plan.accumulation), model(x)
            layers = [m for m in model.modules() if isinstance(m, SyncBatchNorm)]
            assert bool(layers) == (norm == "sync")
        assert built["sync"][0] == built["bn"][0]
        assert torch.equal(built["sync"][1], built["bn"][1])
