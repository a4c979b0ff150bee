import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.l1 import K, at_test, forward_backward, squares
from oracles.population import ema
from torch import nn

from normlab.norms import BatchNorm, L1BatchNorm
from normlab.norms.base import normalization
from normlab.population import EmaBank, Statistics, estimate, using

from .checks import assert_values, numpy
from .inputs import cases, lay_out, random_affine

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("groups", [1, 2])
@cases([d for d in TOLERANCE if d != torch.float64])
def test_formula(shape, dtype, layout, groups):
    layer = L1BatchNorm(6, eps=1e-3, decay=0.8)
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    leaf = lay_out(x.clone(), layout).requires_grad_()
    layer.group_size = len(x) // groups
    y = layer(leaf)
    y.backward(lay_out(dy, layout))
    weight, bias = numpy(layer.weight), numpy(layer.bias)
    *expected, mean, scale = forward_backward(numpy(x), weight, bias, numpy(dy), layer.eps, groups)
    assert y.dtype == dtype
    tensors = y, leaf.grad, layer.weight.grad, layer.bias.grad
    assert_values(tensors, expected, TOLERANCE[dtype])
    kept = {"rtol": 0, "atol": min(TOLERANCE[dtype], 1e-5)}  # the statistics stay float32
    square = squares(scale, x[:, 0].numel() // groups)
    np.testing.assert_allclose(numpy(layer.running_mean), ema(0, mean.mean(0)[None], 0.8), **kept)
    np.testing.assert_allclose(numpy(layer.running_var), ema(1, square.mean(0)[None], 0.8), **kept)
    assert layer.num_batches_tracked == 1
    y = at_test(
        numpy(x), numpy(layer.running_mean), numpy(layer.running_var), weight, bias, layer.eps
    )
    np.testing.assert_allclose(
        numpy(layer.eval()(lay_out(x, layout))), y, rtol=0, atol=TOLERANCE[dtype] * np.abs(y).max()
    )


def test_channels_last_stays():
    y = L1BatchNorm(4)(lay_out(torch.randn(4, 4, 3, 3), "channels_last"))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_gradients_agree_with_numerical_ones():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    for layer in (L1BatchNorm(2).double(), L1BatchNorm(2).double().eval()):
        assert torch.autograd.gradcheck(layer, x)


def test_on_normal_data_the_scale_is_the_standard_deviation():
    x = 3 * torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0))
    layer = L1BatchNorm(1, decay=0.5).double()
    with torch.no_grad():
        y = layer(x.double())
    assert (2 * layer.running_var - 1).sqrt().item() == pytest.approx(3, rel=3e-3)
    torch.testing.assert_close(y, BatchNorm(1).double()(x.double()), rtol=3e-3, atol=1e-3)


def test_two_values_have_the_scale_that_tells_the_layers_apart():
    x = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    layer = L1BatchNorm(1, eps=1e-9).double()
    torch.testing.assert_close(layer(x).detach(), x / (2 * K), rtol=1e-8, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    scale=st.floats(1e-3, 1e3),
    negative=st.booleans(),
    offset=st.floats(-10, 10),
    seed=st.integers(0, 1000),
)
def test_the_scale_is_equivariant(scale, negative, offset, seed):
    """s(a x + b) = |a| s(x), and mean(a x + b) = a mean(x) + b."""
    scale = -scale if negative else scale
    x = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen = []
    layer = L1BatchNorm(2).double()
    layer.observers.append(seen.append)
    layer(x)
    layer(scale * x + offset)
    one, other = seen
    torch.testing.assert_close(other.var.sqrt(), abs(scale) * one.var.sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(other.mean, scale * one.mean + offset, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_a_constant_channel_is_finite(value, training):
    """P64: the subgradient of |x - mean| at 0, and a running scale of 0."""
    layer = L1BatchNorm(2).train(training)
    layer.running_var.zero_()
    layer.running_mean.fill_(value)
    x = torch.full((4, 2, 3), value, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert all(v.isfinite().all() for v in (x.grad, layer.weight.grad, layer.running_var))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e4, 1e5, 1e6])
def test_large_means_keep_precision(layout, offset):
    """P64: float32 of spread 1, errors below 8 times the rounding of the input."""
    x = lay_out(torch.randn(8, 3, 5, 5) + offset, layout)
    expected = forward_backward(
        x.double().numpy(), np.ones(3), np.zeros(3), np.ones(x.shape), 1e-5
    )[0]
    y = L1BatchNorm(3)(x).detach().double().numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=8 * offset * 2**-23)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_of_300_have_float32_statistics(dtype):
    x = (300 * torch.randn(16, 2, 4, 4)).to(dtype)
    layer = L1BatchNorm(2, decay=0.5)
    y = layer(x)
    assert y.dtype == dtype
    assert y.isfinite().all()
    h = x.double() - x.double().mean((0, 2, 3), keepdim=True)
    expected = (K * h.abs().mean((0, 2, 3))) ** 2 * 256 / 255
    torch.testing.assert_close(2 * layer.running_var.double() - 1, expected, rtol=1e-5, atol=0)


def test_checkpoints_move_to_and_from_batch_norm():
    """P15: one layout; the same function at test but for eps, since running_var is a variance."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(3)
    for _ in range(3):
        theirs(2 * torch.randn(8, 3, 4, 4) + 1)
    ours = L1BatchNorm(3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
    back = nn.BatchNorm2d(3)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in back.state_dict().items())
    again = copy.deepcopy(ours)
    assert torch.equal(again(x), ours(x))


def scale_of(x):
    h = x - x.mean((0, 2), keepdim=True)
    return K * h.abs().mean((0, 2))


def test_one_precise_batch_is_the_scale_of_that_batch():
    x = torch.randn(32, 3, 5, dtype=torch.float64) ** 3  # far from normal
    layer = L1BatchNorm(3).double()
    pooled = estimate(layer, [x], estimator="pooled")[""]
    torch.testing.assert_close(pooled.var.sqrt(), scale_of(x), rtol=1e-12, atol=0)
    with using(layer, {"": pooled}):
        y = layer.eval()(x)
    torch.testing.assert_close(y, layer.train()(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["pooled", "mean"])
@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform", "skewed"])
def test_precise_statistics_of_shuffled_batches_are_right_for_l1(draw, estimator):
    """Against the s of all elements; a variance, pooled or not, is off by 7 % or more."""
    random = np.random.default_rng(0)
    shape = (4096, 2, 5)
    values = {
        "normal": lambda: random.normal(size=shape),
        "laplace": lambda: random.laplace(size=shape),
        "uniform": lambda: random.uniform(size=shape),
        "skewed": lambda: random.exponential(size=shape),
    }[draw]()
    x = torch.from_numpy(3 * values + 2)
    found = estimate(L1BatchNorm(2).double(), x.split(64), estimator=estimator)[""]
    torch.testing.assert_close(found.var.sqrt(), scale_of(x), rtol=5e-3, atol=0)
    if draw != "normal":
        deviation = x.std((0, 2), correction=0)
        assert ((deviation / scale_of(x) - 1).abs() > 0.07).all()


def test_sorted_batches_are_approximated_as_documented():
    """Batches of constants -1 and 1: the pooled square is 1, where s of all is sqrt(pi/2)."""
    x = torch.cat([torch.full((8, 1, 4), -1.0), torch.full((8, 1, 4), 1.0)]).double()
    found = estimate(L1BatchNorm(1).double(), x.split(8), estimator="pooled")[""]
    assert found.var.item() == 1
    assert scale_of(x).item() == pytest.approx(K)


def test_the_ema_bank_follows_the_buffers():
    torch.manual_seed(0)
    layer = L1BatchNorm(3, decay=0.9)
    bank = EmaBank(layer, [0.5, 0.9])
    for _ in range(5):
        layer(torch.randn(8, 3, 4) * 2 + 1)
    own = bank.population(0.9)[""]
    assert isinstance(own, Statistics)
    torch.testing.assert_close(own.var, layer.running_var.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(own.mean, layer.running_mean.double(), rtol=1e-5, atol=1e-6)
    assert (bank.population(0.5)[""].var > own.var).all()  # closer to 4, further from 1


def test_the_choices_of_a_batch_norm():
    torch.manual_seed(0)
    layer = L1BatchNorm(3).double()
    x = torch.randn(8, 3, 4, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    with normalization(layer, update=False, group_size=4):
        y = layer(x)
    halves = torch.cat([L1BatchNorm(3).double()(part) for part in x.split(4)])
    assert torch.equal(y, halves)
    with normalization(layer, statistics="population", update=False):
        z = layer(x)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
    assert torch.equal(z, layer.eval()(x))
    with pytest.raises(ValueError, match="more than one element"):  # P8
        layer.train()(x[:1, :, :1])


def test_no_affine():
    layer = L1BatchNorm(3, affine=False)
    assert list(layer.parameters()) == []
    assert layer(torch.randn(4, 3, 2)).shape == (4, 3, 2)
