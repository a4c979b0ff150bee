"""Batch Renorm in one call of the kernels, against Algorithm 1 in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import renorm as oracle

from normlab import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())

EPS = 1e-5
SIZES = [(), (1,), (5,), (3, 5), (4, 4), (7, 9), (2, 3, 9)]
NAMES = "y", "dx", "dweight", "dbias"


def laid(x, last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def drawn(groups, size, channels, shape, dtype, last, seed):
    torch.manual_seed(seed)
    x, dy = (laid(torch.randn(groups * size, channels, *shape).to(dtype), last) for _ in range(2))
    weight, bias, mean = torch.randn(3, channels)
    return x, dy, weight, bias, mean, torch.rand(channels) + 0.2


def ours(x, dy, weight, bias, mean, var, limits, groups):
    y, *batch, correction = kernels.renorm(
        x, weight, bias, mean, var, limits, groups=groups, eps=EPS
    )
    dx, (dbias, dweight) = kernels.renorm_backward(dy, x, weight, *batch, correction, eps=EPS)
    assert y.dtype == dx.dtype == x.dtype
    assert y.stride() == dx.stride() == x.stride()
    return y, dx, dweight, dbias, *batch


def check(data, limits, groups):
    x, dy, weight, _, _, var = data
    exact = (v.double().numpy() for v in data)
    how = {"nbs": len(x) // groups, "r_limit": limits[0], "d_limit": limits[1]}
    right = [torch.from_numpy(v) for v in oracle.forward_backward(*exact, eps=EPS, **how)]
    with torch.no_grad():
        *got, batch_mean, batch_var = ours(*data, limits, groups)
    half = x.dtype == torch.bfloat16
    rstd = float((batch_var.min() + EPS).rsqrt())
    elements = x.numel() / x.size(1)
    ratio = max(1.0, float(((batch_var + EPS) / (var.double() + EPS)).max()) ** 0.5)
    largest = float(dy.abs().max() * weight.abs().max())
    scales = float(right[0].abs().max()), largest * rstd * ratio, elements, elements
    for name, mine, value, scale in zip(NAMES, got, right, scales, strict=True):
        allowed = (5e-6 + (2.0**-8 if half and name in ("y", "dx") else 0)) * (scale + 1e-6)
        error = float((mine.double() - value).abs().max())
        assert error <= allowed, f"{name}: {error} > {allowed}"
    parts = x.double().reshape(groups, len(x) // groups, x.size(1), -1)
    torch.testing.assert_close(batch_mean, parts.mean((1, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch_var, parts.var((1, 3), correction=0), rtol=1e-5, atol=1e-6)


@given(
    groups=st.integers(1, 4),
    size=st.integers(2, 4),
    channels=st.sampled_from([1, 2, 3, 5, 16, 23, 32, 64, 65]),
    shape=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    last=st.booleans(),
    limits=st.sampled_from([(1.0, 0.0), (3.0, 5.0), (1.2, 0.1), (math.inf, math.inf)]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_any_shape(groups, size, channels, shape, dtype, last, limits, seed):
    if size * math.prod(shape) < 4:
        return  # of two values, h is -1 and 1 and dx next to nothing: no scale to be right at
    check(drawn(groups, size, channels, shape, dtype, last, seed), limits, groups)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_large_groups(groups, last):
    """Cut into pieces and shared out among threads, which change no bit."""
    data = drawn(groups, 8, 40, (33, 65), torch.float32, last, 0)
    check(data, (1.5, 0.5), groups)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(ours(*data, (1.5, 0.5), groups))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_at_its_limits_it_is_batch_norm_to_the_bit(last):
    x, dy, weight, bias, mean, var = drawn(2, 3, 7, (3, 5), torch.float32, last, 1)
    with torch.no_grad():
        y, dx, dweight, dbias, *batch = ours(x, dy, weight, bias, mean, var, (1.0, 0.0), 2)
        right, *known = kernels.batch_norm(x, weight, bias, groups=2, eps=EPS)
        how = {"groups": 2, "eps": EPS}
        right_dx, affine = kernels.batch_norm_backward(dy, x, weight, *known, **how)
    for got, expected in zip(
        (y, *batch, dx, dbias, dweight), (right, *known, right_dx, *affine), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("last", [False, True])
def test_what_is_not_finite_stays_so(bad, last):
    """Of the channel and group that has it, and of a channel whose running statistics have it."""
    x, dy, weight, bias, mean, var = drawn(2, 2, 6, (4, 5), torch.float32, last, 2)
    x[1, 2, 3, 3] = bad
    mean[4] = float("nan")
    with torch.no_grad():
        y, dx, dweight, *_ = ours(x, dy, weight, bias, mean, var, (3.0, 5.0), 2)
    for made in (y, dx):
        assert not made[:2, 2].isfinite().any()
        assert made[2:, 2].isfinite().all()
        assert made[:, [0, 1, 3, 5]].isfinite().all()
    assert not y[:, 4].isfinite().any()
    assert dx[:, 4].isfinite().all()  # d is no factor of it
    assert dweight.isfinite().tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
def test_without_a_part_of_the_affine(given):
    """Ones and zeros in its place."""
    x, dy, weight, bias, mean, var = drawn(2, 3, 5, (3, 4), torch.float32, False, 3)
    some = [v if there else None for v, there in zip((weight, bias), given, strict=True)]
    full = torch.ones(5) if not given[0] else weight, torch.zeros(5) if not given[1] else bias
    with torch.no_grad():
        got = ours(x, dy, *some, mean, var, (3.0, 5.0), 2)
        expected = ours(x, dy, *full, mean, var, (3.0, 5.0), 2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_second_derivatives_are_those_of_the_formula():
    data = drawn(2, 3, 4, (3, 2), torch.float32, False, 4)
    x, dy, weight, bias, mean, var = data
    with torch.no_grad():
        _, *batch, correction = kernels.renorm(
            x, weight, bias, mean, var, (3.0, 5.0), groups=2, eps=1e-3
        )
        plain = kernels.renorm_backward(dy, x, weight, *batch, correction, eps=1e-3)
    leaves = [v.clone().requires_grad_() for v in (x, dy, weight)]
    found = kernels.renorm_backward(leaves[1], leaves[0], leaves[2], *batch, correction, eps=1e-3)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    second = torch.autograd.grad(sum(v.square().sum() for v in found), leaves)

    exact = [v.double().detach().requires_grad_() for v in leaves]
    z = exact[0].reshape(2, 3, 4, -1)
    h = (z - z.mean((1, 3), keepdim=True)) * (
        z.var((1, 3), correction=0, keepdim=True) + 1e-3
    ) ** -0.5
    r, d = (v.double().view(2, 1, 4, 1) for v in correction)
    made = ((h * r + d) * exact[2].view(4, 1)).reshape(x.shape)
    first = torch.autograd.grad(made, (exact[0], exact[2]), exact[1], create_graph=True)
    total = sum(v.square().sum() for v in (*first, exact[1].sum((0, 2, 3))))
    right = torch.autograd.grad(total, exact)
    for got, expected in zip(second, right, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
