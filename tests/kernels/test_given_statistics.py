"""Normalizing by given statistics: one pass in the order of the memory, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())

EPS = 1e-5
SIZES = [(), (1,), (5,), (3, 5), (4, 4), (7, 9), (2, 3, 9)]


def laid(x, last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


@st.composite
def inputs(draw):
    groups = draw(st.integers(1, 3))
    # Factors that come again within two blocks of any width, and others.
    channels = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 65, 128]))
    shape = (groups * draw(st.integers(1, 5)), channels, *draw(st.sampled_from(SIZES)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 9)))
    x = laid(torch.randn(shape).to(dtype), draw(st.booleans()))
    mean = torch.randn(groups, channels) if draw(st.booleans()) else None
    affine = (torch.randn(channels) if draw(st.booleans()) else None for _ in range(2))
    return x, mean, torch.rand(groups, channels) + 0.1, *affine, draw(st.booleans())


@given(inputs())
@settings(max_examples=80, deadline=None)
def test_any_shape(drawn):
    x, mean, var, weight, bias, interleaved = drawn
    groups, channels = var.shape
    got = kernels.normalize(
        x, mean, var, weight, bias, groups=groups, interleaved=interleaved, eps=EPS
    )
    assert (got.dtype, got.stride()) == (x.dtype, x.stride())
    size = len(x) // groups
    right = torch.empty_like(x, dtype=torch.float64)
    at = (channels, *[1] * (x.dim() - 2))
    for i, sample in enumerate(x.double()):
        g = i % groups if interleaved else i // size
        row = sample - (0 if mean is None else mean[g].double().view(at))
        row = row / (var[g].double().view(at) + EPS).sqrt()
        row = row * (1 if weight is None else weight.double().view(at))
        right[i] = row + (0 if bias is None else bias.double().view(at))
    rounding = 2.0**-8 if x.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), right, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 16, 96, 96), (8, 48, 64, 64), (8, 100, 64, 65)])
@pytest.mark.parametrize("last", [False, True])
def test_the_number_of_threads_changes_no_bit(shape, last):
    torch.manual_seed(0)
    x = laid(torch.randn(shape), last)
    known = torch.randn(shape[1]), torch.rand(shape[1]) + 1, torch.randn(shape[1]), None
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.normalize(x, *known, eps=EPS))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    right = torch.nn.functional.batch_norm(x, *known, False, eps=EPS)
    torch.testing.assert_close(results[0], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_where_it_is(bad, last):
    x = laid(torch.randn(4, 16, 5, 7), last)
    x[1, 3, 2, 2] = bad
    y = kernels.normalize(x, torch.zeros(16), torch.ones(16), None, None, eps=EPS)
    assert torch.equal(y.isfinite(), x.isfinite())
    y = kernels.normalize(x, torch.full((16,), bad), torch.ones(16), None, None, eps=EPS)
    assert not y.isfinite().any()


@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_past_the_caches(dtype, channels):
    """A result of more than 32 MiB, whose channels do and do not stay in registers, with a tail."""
    torch.manual_seed(1)
    shape = (5, channels, 300, 201 if dtype == torch.bfloat16 else 101)
    x, dy = (laid(torch.randn(shape).to(dtype), True) for _ in range(2))
    weight, bias = torch.rand(2, channels).unbind()
    y, mean, var = kernels.batch_norm(x, weight, bias, groups=1, eps=EPS)
    assert y.nbytes > 32 << 20
    assert torch.equal(kernels.normalize(x, mean, var, weight, bias, eps=EPS), y)
    how = {"groups": 1, "eps": EPS}
    with torch.no_grad():
        dx, _ = kernels.batch_norm_backward(dy, x, weight, mean, var, **how)
    part = slice(None), [3, channels - 1]  # all of two channels, in float64
    z, d = (v[part].double() for v in (x, dy))
    at, over = (1, 2, 1, 1), (0, 2, 3)
    rstd = (z.var(over, correction=0, keepdim=True) + EPS).rsqrt()
    h = (z - z.mean(over, keepdim=True)) * rstd
    rest = d - d.mean(over, keepdim=True) - h * (d * h).mean(over, keepdim=True)
    w, b = (v[part[1]].double().view(at) for v in (weight, bias))
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y[part].double(), h * w + b, rtol=rounding, atol=1e-5)
    torch.testing.assert_close(dx[part].double(), rest * rstd * w, rtol=rounding, atol=1e-5)
