import copy
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.ghost import GROUPING
from oracles.moments import sets_per_channel, statistics
from oracles.population import after_chunks
from torch import nn

from normlab.norms import BatchNorm, GhostBatchNorm

from .checks import check_against_formula
from .inputs import LAYOUTS, cases, lay_out


@pytest.mark.parametrize(("nbs", "grouping"), [*product([2, 4], GROUPING), (8, "contiguous")])
@cases()
def test_formula(shape, nbs, dtype, layout, grouping):
    layer = GhostBatchNorm(6, nbs=nbs, grouping=grouping)
    if dtype == torch.float32 and len(shape) == 2 and nbs == 2:
        layer.eps = 1e-2  # two close values: 1 / sqrt(var) magnifies float32's rounding
    if dtype == torch.bfloat16 and len(shape) == 2:
        layer.eps = 1.0
    sets = sets_per_channel(shape, GROUPING[grouping](shape[0], nbs))
    y = check_against_formula(layer, shape, sets, dtype, layout)
    if layout == "channels_last" and len(shape) > 3:
        assert y.movedim(1, -1).is_contiguous()
    if layout == "contiguous":
        assert y.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 5),
    nbs=st.integers(2, 5),
    channels=st.integers(1, 5),
    spatial=st.sampled_from([(), (3,), (2, 2), (1, 1), (2, 1, 2)]),
    layout=st.sampled_from(LAYOUTS),
    interleaved=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_is_a_batch_norm_per_chunk(
    chunks, nbs, channels, spatial, layout, interleaved, affine, seed
):
    """Outputs and all gradients are those of torch's batch norm on each chunk, shared affine."""
    generator = torch.Generator().manual_seed(seed)
    shape = (chunks * nbs, channels, *spatial)
    x = lay_out(torch.randn(shape, generator=generator, dtype=torch.float64), layout)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    grouping = "interleaved" if interleaved else "contiguous"
    layer = GhostBatchNorm(channels, nbs=nbs, grouping=grouping, affine=affine, eps=1e-2).double()
    reference = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    torch_layer = reference[len(shape)](channels, affine=affine, eps=1e-2).double()
    torch_layer.load_state_dict(layer.state_dict())

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours)
    y.backward(dy)
    rows = GROUPING[grouping](len(x), nbs)
    for k in range(chunks):
        y_k = torch_layer(theirs[rows == k])
        torch.testing.assert_close(y[rows == k], y_k, rtol=0, atol=1e-12)
        y_k.backward(dy[rows == k])
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    for p, q in zip(layer.parameters(), torch_layer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("population", ["mean", "pooled", "first", "sequential"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_batch_is_batch_norm(layout, population):
    torch.manual_seed(0)
    x = lay_out(torch.randn(8, 5, 6, 6), layout)
    ghost, plain = GhostBatchNorm(5, nbs=8, population=population), BatchNorm(5)
    assert torch.equal(ghost(x), plain(x))
    assert torch.equal(ghost.running_mean, plain.running_mean)
    assert torch.equal(ghost.running_var, plain.running_var)


def test_every_chunk_of_the_output_is_standardized():
    x = 3 * torch.randn(12, 4, 5, 5, dtype=torch.float64) + 2
    y = GhostBatchNorm(4, nbs=3, eps=1e-12, affine=False).double()(x)
    for chunk in y.split(3):
        torch.testing.assert_close(chunk.mean((0, 2, 3)), torch.zeros(4).double())
        torch.testing.assert_close(chunk.var((0, 2, 3), correction=0), torch.ones(4).double())


@pytest.mark.parametrize("grouping", GROUPING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("population", ["mean", "pooled", "first", "sequential"])
def test_population_rule(population, layout, grouping):
    torch.manual_seed(0)
    shape, nbs = (8, 3, 2, 2), 2
    layer = GhostBatchNorm(3, nbs=nbs, population=population, grouping=grouping, decay=0.7).double()
    running = np.zeros(3), np.ones(3)
    sets = sets_per_channel(shape, GROUPING[grouping](8, nbs))
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) + step
        layer(lay_out(x, layout))
        means, biased = (v.reshape(-1, 3) for v in statistics(x.numpy(), sets))
        running = after_chunks(population, running, means, biased, nbs * 4, 0.7)
    np.testing.assert_allclose(layer.running_mean.numpy(), running[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(layer.running_var.numpy(), running[1], rtol=1e-9)
    assert layer.num_batches_tracked == 3


def test_pooled_is_the_batch_norm_of_the_whole_batch():
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    ghost, plain = GhostBatchNorm(3, nbs=2, population="pooled").double(), BatchNorm(3).double()
    ghost(x)
    plain(x)
    torch.testing.assert_close(ghost.running_mean, plain.running_mean)
    torch.testing.assert_close(ghost.running_var, plain.running_var)


def test_population_rules_differ():
    x = torch.randn(8, 3, 4, 4)
    layers = [
        GhostBatchNorm(3, nbs=2, population=rule)
        for rule in ("mean", "pooled", "first", "sequential")
    ]
    for layer in layers:
        layer(x)
    variances = torch.stack([layer.running_var for layer in layers])
    assert len(variances.unique(dim=0)) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouping", GROUPING)
def test_evaluates_any_batch_size(layout, grouping):
    """P47: chunks are of training."""
    torch.manual_seed(0)
    layer = GhostBatchNorm(4, nbs=4, grouping=grouping)
    layer(torch.randn(8, 4, 5, 5))
    layer.eval()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(layer.state_dict(), strict=True)
    for samples in (1, 3, 7):
        x = lay_out(torch.randn(samples, 4, 5, 5), layout)
        assert torch.equal(layer(x), plain.eval()(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5])
def test_large_means_keep_precision(layout, offset):
    """float32, spread 1: errors below 8 times the rounding of the input, eps * mean."""
    shape = (8, 6, 4, 4)
    layer = GhostBatchNorm(6, nbs=4)
    sets = sets_per_channel(shape, np.arange(8) // 4)
    check_against_formula(layer, shape, sets, torch.float32, layout, offset=offset)


@pytest.mark.parametrize("samples", [10, 2, 3])
def test_a_remainder_is_refused_before_anything_changes(samples):
    """P48: no chunk of another size, and after the refusal everything is as before."""
    layer = GhostBatchNorm(3, nbs=4)
    seen = []
    layer.observers.append(seen.append)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=rf"batch of {samples} .*nbs=4"):
        layer(torch.randn(samples, 3, 2, 2))
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
    assert seen == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nbs": 1}, "nbs=1 is instance norm"),
        ({"nbs": 0}, "nbs must be"),
        ({"nbs": -2}, "nbs must be"),
        ({"nbs": 2.0}, "nbs must be"),
        ({"nbs": True}, "nbs"),
        ({"nbs": 2, "grouping": "random"}, "grouping is one of"),
        ({"nbs": 2, "population": "last"}, "population is one of"),
        ({"nbs": 2, "decay": 1.0}, "decay must be in"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GhostBatchNorm(3, **arguments)


def test_nbs_is_required():
    with pytest.raises(TypeError, match="nbs"):
        GhostBatchNorm(3)


def test_group_size_replaces_nbs_and_grouping():
    x = torch.randn(12, 3, 2, 2, dtype=torch.float64)
    layer = GhostBatchNorm(3, nbs=4, grouping="interleaved").double()
    layer.group_size = 6
    expected = GhostBatchNorm(3, nbs=6).double()(x)
    assert torch.equal(layer(x), expected)


def test_a_group_of_one_element_is_refused():
    layer = GhostBatchNorm(3, nbs=4)
    layer.group_size = 1
    with pytest.raises(ValueError, match="more than one element per group"):
        layer(torch.randn(8, 3))
    layer(torch.randn(8, 3, 2))  # two positions: the statistics of one sample exist


def test_gradients_of_gradients_agree_with_numerical_ones():
    torch.manual_seed(0)
    layer = GhostBatchNorm(2, nbs=2).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_gradcheck_channels_last():
    torch.manual_seed(0)
    layer = GhostBatchNorm(2, nbs=2).double()
    x = lay_out(torch.randn(4, 2, 3, 2, dtype=torch.float64), "channels_last").requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast_keeps_statistics_in_float32(layout):
    x = lay_out(torch.randn(8, 4, 9, 9).bfloat16(), layout)
    for affine in (True, False):
        layer = GhostBatchNorm(4, nbs=2, affine=affine)
        seen = []
        layer.observers.append(seen.append)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert seen[0].mean.dtype == seen[0].var.dtype == layer.running_var.dtype == torch.float32
        expected = x.double().view(4, 2, 4, 81).var((1, 3), correction=0)
        torch.testing.assert_close(seen[0].var.double(), expected, rtol=1e-5, atol=0)
