"""The kernels against float64, and never further from it than torch's own operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import groups as oracle

from normlab import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())

EPS = 1e-5
BFLOAT16 = 2.0**-8
"""Half a unit in the last place, relative."""


SIZES = [(), (1,), (3,), (2, 2), (3, 5), (4, 4), (7, 7), (5, 13), (2, 3, 9)]


def laid(x, last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def ours(x, weight, bias, dy, **how):
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias)]
    y, mean, var = kernels.batch_norm(*leaves, **how, eps=EPS)
    dx, dweight, dbias = torch.autograd.grad(y, leaves, dy)
    assert y.dtype == dx.dtype == x.dtype
    assert y.stride() == dx.stride() == x.stride()
    found = {"y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}
    return found | {"mean": mean, "var": var}


def check(x, dy, channels, floor, **how):
    """Each result within `floor` of float64's, relative to the largest of what it is a sum of."""
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    expected = oracle.batch_norm(x, weight, bias, dy, **how, eps=EPS)
    rounding = BFLOAT16 if x.dtype == torch.bfloat16 else 0.0
    elements = x.numel() / channels
    rstd = float((expected["var"].min() + EPS).rsqrt())
    largest = float(weight.abs().max()) * float(dy.abs().max()) * rstd
    scales = {
        "y": float(expected["y"].abs().max()),
        "dx": largest,
        "dweight": float(dy.abs().max()) * elements**0.5,
        "dbias": float(dy.abs().max()) * elements**0.5,
        "mean": float(expected["var"].max().sqrt()) + 1e-9 * float(x.abs().max()),
        "var": float(expected["var"].max()),
    }
    for name, got in ours(x, weight, bias, dy, **how).items():
        own = rounding if name in ("y", "dx") else 0.0
        error = float((got.double() - expected[name]).abs().max())
        allowed = (floor + own) * (scales[name] + 1e-30)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@st.composite
def inputs(draw):
    groups = draw(st.integers(1, 4))
    samples = groups * draw(st.integers(1, 3))
    span = draw(st.integers(1, 3))
    channels = span * draw(st.integers(1, 23))
    size = draw(st.sampled_from(SIZES))
    shape = (samples, channels, *size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    offset = draw(st.sampled_from([0.0, 0.0, 3.0, 1e4, 1e6])) if dtype == torch.float32 else 0.0
    last = draw(st.booleans())
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    x = laid((x + offset).to(dtype), last)
    return x, laid(dy.to(dtype), last), groups, draw(st.booleans()), span


@given(inputs())
@settings(max_examples=60, deadline=None)
def test_any_shape(drawn):
    """P64: tails, folds, both groupings, spans of channels, means of up to a million spreads."""
    x, dy, groups, interleaved, span = drawn
    if x.numel() // (x.size(1) // span * groups) < 4:
        return  # of two values, h is -1 and 1 and dx next to nothing: no scale to be right at
    check(x, dy, x.size(1), 4e-6, groups=groups, interleaved=interleaved, span=span)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(8, 3, 60, 70), (16, 40, 33, 9), (4096, 20), (300, 1, 4, 4)])
def test_large_groups(shape, last, offset):
    """Groups of many chains, cut into pieces, and more samples than a chain is long."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (laid(torch.randn(shape, generator=generator) + at, last) for at in (offset, 0))
    check(x, dy, shape[1], 2e-6, groups=2)


@pytest.mark.parametrize("last", [False, True])
def test_an_outlier_first(last):
    """What the sums are shifted by is a guess: where it is bad, they are taken again."""
    x = torch.randn(8, 5, 6, 7, generator=torch.Generator().manual_seed(2))
    x[:, :, 0, 0] = 1e5
    x[0, :, :3] = -3e6
    check(laid(x, last), laid(torch.randn_like(x), last), 5, 2e-6, groups=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_no_further_off_than_torch(dtype, last, offset):
    generator = torch.Generator().manual_seed(4)
    x = laid((torch.randn(16, 24, 20, 21, generator=generator) + offset).to(dtype), last)
    dy = laid(torch.randn(x.shape, generator=generator).to(dtype), last)
    weight, bias = (torch.randn(24, generator=generator) for _ in range(2))
    expected = oracle.batch_norm(x, weight, bias, dy, groups=1, eps=EPS)
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    running = torch.zeros(24), torch.zeros(24)
    y = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], True, 1.0, EPS)
    gradients = torch.autograd.grad(y, leaves, dy)
    theirs = dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
    count = x.numel() / 24
    theirs |= {"y": y.detach(), "mean": running[0], "var": running[1] * (count - 1) / count}
    found = ours(x, weight, bias, dy, groups=1)
    for name, value in theirs.items():
        right = expected[name].view(value.shape)
        off, allowed = ((v.double().view(right.shape) - right).norm() for v in (found[name], value))
        # As good, up to the rounding of float32 that either may have or not: of a sum, that of what
        # is typical of one of as many elements.
        typical = {"mean": 1.0, "dweight": count**0.5, "dbias": count**0.5}.get(name, 0.0)
        floor = 3e-7 * (right.norm() + typical * 24**0.5)
        assert off <= 1.1 * allowed + floor, f"{name}: {off} > {allowed}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad, last, dtype):
    """Of the channel and group that has it, and of no other."""
    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(5)).to(dtype)
    x[1, 2, 3, 3] = bad
    weight, bias = torch.ones(6), torch.zeros(6)
    y, mean, var = kernels.batch_norm(laid(x, last), weight, bias, groups=2, eps=EPS)
    assert not y[:2, 2].isfinite().any()
    assert y[2:].isfinite().all()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()
    clean = x.double()[:2, 2].mean()
    torch.testing.assert_close(mean[0, 2], clean, equal_nan=True)
    assert var[0, 2].isnan()
    assert torch.cat([mean[1], var[1]]).isfinite().all()


def test_a_nan_with_any_payload_survives_rounding():
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int64)
    weight = bits.to(torch.int32).view(torch.float32)
    x = torch.randn(8, 4, 6, 6).bfloat16()
    for last in (False, True):
        y, _, _ = kernels.batch_norm(laid(x, last), weight, None, groups=1, eps=EPS)
        assert y.isnan().all()


def test_the_number_of_threads_changes_no_bit():
    """Of groups that fit in cache, and of those that are cut into pieces."""
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(6)
    try:
        for shape in ((8, 48, 64, 64), (64, 16, 32, 33)):
            for last in (False, True):
                x, dy = (laid(torch.randn(shape, generator=generator), last) for _ in range(2))
                weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    results.append(ours(x, weight, bias, dy, groups=4))
                for other in results[1:]:
                    for name, value in results[0].items():
                        assert torch.equal(value, other[name]), (name, shape, last)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("last", [False, True])
def test_the_mean_of_bfloat16_values_is_not_rounded_one_way(last):
    """Their differences from a shift of more bits were: 1e-6 of a standard deviation, ten draws."""
    for seed in range(10):
        x = laid(torch.randn(8, 64, 7, 9, generator=torch.Generator().manual_seed(seed)), last)
        x = x.to(torch.bfloat16)
        _, mean, _ = kernels.batch_norm(x, torch.ones(64), torch.zeros(64), groups=1, eps=EPS)
        assert float((mean[0] - x.double().mean((0, 2, 3))).abs().max()) < 2e-7
