"""The route of large NCHW inputs, at sizes of a test: its lower limits are taken away."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.ghost import GROUPING
from oracles.ghost import forward as by_definition
from oracles.moments import forward_backward, sets_per_channel, statistics
from torch import nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from normlab.norms import BatchRenorm, GhostBatchNorm, _chunked
from normlab.norms._grouped import grouped_batch_norm

from .checks import check_against_formula
from .zoo import close, run


def without_limits(patch):
    patch.setattr(_chunked, "_ELEMENTS", 1)
    patch.setattr(_chunked, "_POSITIONS", 1)


@pytest.fixture
def any_size(monkeypatch):
    without_limits(monkeypatch)


def taken(y):
    """Whether y came by this route."""
    return type(y.grad_fn).__name__ == "_ChunkedNormBackward"


@pytest.mark.parametrize(
    ("size", "takes"), [((16, 8, 64, 64), True), ((2048, 4, 8, 8), False), ((8, 8, 64, 64), False)]
)
def test_which_inputs_take_it(size, takes):
    x, dy = torch.randn(size).requires_grad_(), torch.randn(size)
    layer = GhostBatchNorm(size[1], nbs=4)
    assert taken(layer(x)) == takes
    if takes:  # limits and all: the definition, as torch has it
        y = layer(x)
        y.backward(dy)
        other = x.detach().requires_grad_()
        torch.cat([nn.BatchNorm2d(size[1])(chunk) for chunk in other.split(4)]).backward(dy)
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("nbs", "grouping"), [*product([2, 4], GROUPING)])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((8, 6, 5), "contiguous"),
        ((8, 6, 4, 3), "contiguous"),
        ((8, 6, 4, 3), "sliced"),
        ((8, 6, 4, 3), "permuted"),
        ((8, 6, 2, 3, 2), "contiguous"),
    ],
)
@pytest.mark.usefixtures("any_size")
def test_formula(shape, layout, nbs, grouping, dtype):
    sets = sets_per_channel(shape, GROUPING[grouping](8, nbs))
    y = check_against_formula(
        GhostBatchNorm(6, nbs=nbs, grouping=grouping), shape, sets, dtype, layout
    )
    assert taken(y)
    assert y.is_contiguous()


@settings(max_examples=80, deadline=None)
@given(
    chunks=st.integers(2, 4),
    nbs=st.integers(2, 4),
    channels=st.integers(1, 4),
    spatial=st.sampled_from([(5,), (2, 3), (2, 1, 2)]),
    interleaved=st.booleans(),
    learnt=st.tuples(*[st.sampled_from([None, "shared", "own"])] * 2),
    wanted=st.tuples(*[st.booleans()] * 3),
    twice=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gradients_of_whatever_is_wanted(
    chunks, nbs, channels, spatial, interleaved, learnt, wanted, twice, seed
):
    """Weight and bias absent, shared or of each chunk; any of them, or the input, frozen."""
    torch.manual_seed(seed)
    sizes = {"shared": (channels,), "own": (chunks, channels)}
    x = torch.randn(chunks * nbs, channels, *spatial, dtype=torch.float64)
    weight, bias = (None if s is None else torch.randn(sizes[s]).double() for s in learnt)
    leaves = [
        v.requires_grad_()
        for v, w in zip((x, weight, bias), wanted, strict=True)
        if w and v is not None
    ]
    with pytest.MonkeyPatch.context() as patch:
        without_limits(patch)
        y, mean, var = grouped_batch_norm(
            x, chunks, interleaved=interleaved, weight=weight, bias=bias, eps=1e-2
        )
    assert taken(y) == bool(leaves)
    grouping = "interleaved" if interleaved else "contiguous"
    expected, *moments = by_definition(x, chunks, grouping, weight, bias, 1e-2)
    torch.testing.assert_close((mean, var), tuple(value.detach() for value in moments))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    if leaves:
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, dy, create_graph=twice)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected, leaves, dy), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("grouping", GROUPING)
@pytest.mark.usefixtures("any_size")
def test_gradients_of_gradients_agree_with_numerical_ones(grouping):
    torch.manual_seed(0)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def norm(x, weight, bias):
        interleaved = grouping == "interleaved"
        return grouped_batch_norm(
            x, 2, interleaved=interleaved, weight=weight, bias=bias, eps=1e-2
        )[0]

    assert torch.autograd.gradcheck(norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(norm, (x, weight, bias))


@pytest.mark.parametrize("grouping", GROUPING)
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.usefixtures("any_size")
def test_large_means_keep_precision(offset, grouping):
    """P64: a few units of the mean's last place, where dy follows x and where samples differ."""
    torch.manual_seed(0)
    shape, eps = (16, 3, 12, 12), torch.finfo(torch.float32).eps
    layer = GhostBatchNorm(3, nbs=4, grouping=grouping, decay=0.5)
    x = torch.randn(shape) + 3 * torch.randn(16, 3, 1, 1)
    dy = torch.randn(shape) + x
    x = (x + offset).requires_grad_()
    y = layer(x)
    y.backward(dy)
    exact = x.detach().double().numpy()
    sets = sets_per_channel(shape, GROUPING[grouping](16, 4))
    expected = forward_backward(exact, sets, np.ones(3), np.zeros(3), dy.double().numpy())
    for value, want in zip((y, x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True):
        bound = (2 * offset * eps + 2e-6) * max(1, np.abs(want).max())
        np.testing.assert_allclose(value.detach().double().numpy(), want, rtol=0, atol=bound)
    means, biased = (v.reshape(4, 3).mean(0) for v in statistics(exact, sets))
    np.testing.assert_allclose(layer.running_mean, 0.5 * means, rtol=2 * eps, atol=1e-6)
    unbiased = 0.5 + 0.5 * biased * 576 / 575
    np.testing.assert_allclose(layer.running_var, unbiased, rtol=2e-6 + 0.2 * offset * eps)


@pytest.mark.parametrize("grouping", GROUPING)
@pytest.mark.parametrize("population", ["mean", "pooled", "first", "sequential"])
def test_buffers_and_observers_are_the_other_route_s(population, grouping, monkeypatch):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = GhostBatchNorm(3, nbs=2, population=population, grouping=grouping).double()
        layer.observers.append(lambda batch: results.append({"m": batch.mean, "v": batch.var}))
        x, dy = (torch.randn(6, 3, 4, 4, dtype=torch.float64) for _ in range(2))
        results.append(run(layer, x, dy))
        without_limits(monkeypatch)
    close(results[2], results[0], 1e-13)
    close(results[3], results[1], 1e-12)


def test_chunked_renorm_is_the_other_route_s(monkeypatch):
    """Its weight and bias are each chunk's own."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = BatchRenorm(3, nbs=2, start=0.0, r_end=0.0, d_end=0.0).double()
        x, dy = (3 * torch.randn(6, 3, 4, 4, dtype=torch.float64) + 1 for _ in range(2))
        assert taken(layer(x.clone().requires_grad_())) == bool(results)
        results.append(run(layer, x, dy))
        without_limits(monkeypatch)
    close(results[1], results[0], 1e-12)


@pytest.mark.usefixtures("any_size")
def test_constant_maps_and_infinities_stay_their_chunk_s():
    """A channel without a spread is its bias, and what is not a number is one chunk's."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4)
    x[:, 0] = 300.0
    x[2, 1, 0, 0] = torch.inf
    layer = GhostBatchNorm(3, nbs=2, eps=3e-4)  # of which float32 makes a variance below 0
    seen = []
    layer.observers.append(seen.append)
    found = run(layer, x, torch.randn_like(x))
    assert (seen[0].var[:, 0] >= 0).all()
    assert (found["y"][:, 0].abs() < 0.02).all()  # 300's last place by the root of eps
    for name in ("y", "dx"):
        finite = found[name].isfinite()
        assert not finite[2:4, 1].any()
        finite[2:4, 1] = True
        assert finite.all()


@pytest.mark.usefixtures("any_size")
def test_a_later_layer_may_work_in_place():
    """And a checkpointed forward repeats to the bit."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4)
    gradients = []
    for inplace, repeated in ((False, False), (True, False), (True, True)):
        network = nn.Sequential(GhostBatchNorm(3, nbs=2), nn.ReLU(inplace))
        leaf = x.clone().requires_grad_()
        y = checkpoint(network, leaf, use_reentrant=False) if repeated else network(leaf)
        (y * x).sum().backward()
        gradients.append(leaf.grad)
        assert network[0].num_batches_tracked == 1
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.usefixtures("any_size")
def test_backward_keeps_the_input_and_no_copy():
    x = torch.randn(16, 3, 8, 8).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for grouping in GROUPING:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            GhostBatchNorm(3, nbs=4, grouping=grouping)(x)
    kept.pop(x.untyped_storage().data_ptr())
    assert sum(kept.values()) < x.nbytes / 10


@pytest.mark.usefixtures("any_size")
def test_transformations_take_the_other_route():
    layer = GhostBatchNorm(3, nbs=2)
    layer.update = False
    x = torch.randn(2, 6, 3, 4, 4)
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(batch) for batch in x]))
