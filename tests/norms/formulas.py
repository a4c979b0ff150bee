"""The definition of every norm in float64 numpy, element by element: what the layers are held to.

A norm is a partition: `sets` gives each element of x the number of the set it is normalized in.
"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced"]
SHAPES = [(8, 6), (8, 6, 5), (8, 6, 4, 3), (8, 6, 2, 3, 2)]


def cases(dtypes=(torch.float32, torch.bfloat16), shapes=SHAPES):
    """Parametrizes (shape, dtype, layout): float64 in every shape and layout, `dtypes` in some.

    What precision chooses among, it chooses by layout, and 5 dimensions are 3 with more positions.
    """
    everywhere = [(s, t) for s in shapes for t in LAYOUTS if (len(s), t) != (2, "channels_last")]
    routes = [
        (SHAPES[0], "contiguous"), (SHAPES[1], "permuted"), (SHAPES[3], "channels_last"),
        (SHAPES[2], "contiguous"), (SHAPES[2], "channels_last"), (SHAPES[2], "sliced"),
    ]  # fmt: skip
    found = [(shape, torch.float64, layout) for shape, layout in everywhere]
    found += [(s, dtype, t) for dtype in dtypes for s, t in routes if s in shapes]
    names = ["x".join(map(str, s)) + f"-{str(d)[6:]}-{t}" for s, d, t in found]
    return pytest.mark.parametrize(("shape", "dtype", "layout"), found, ids=names)


def sets_per_channel(shape, group_of_sample):
    """BN family: one set per (group of samples, channel)."""
    sample, channel = np.indices(shape)[:2]
    return np.asarray(group_of_sample)[sample] * shape[1] + channel


def sets_per_sample(shape, groups):
    """GN family: one set per (sample, group of consecutive channels)."""
    sample, channel = np.indices(shape)[:2]
    return sample * groups + channel // (shape[1] // groups)


def statistics(x, sets):
    """Mean and biased variance of each set."""
    flat, sizes = sets.ravel(), np.bincount(sets.ravel())
    mean = np.bincount(flat, x.ravel()) / sizes
    return mean, np.bincount(flat, ((x - mean[sets]) ** 2).ravel()) / sizes


def forward_backward(x, sets, weight, bias, dy, eps=1e-5):
    """y, dx, dweight, dbias; dx = rstd (g - E[g] - h E[g h]), g = dy weight, h = (x - m) rstd."""
    per_channel = (slice(None), *[None] * (x.ndim - 2))
    others = tuple(axis for axis in range(x.ndim) if axis != 1)
    mean, var = statistics(x, sets)
    rstd = 1 / np.sqrt(var + eps)
    h = (x - mean[sets]) * rstd[sets]
    g = dy * weight[per_channel]
    g_mean, _ = statistics(g, sets)
    gh_mean, _ = statistics(g * h, sets)
    dx = rstd[sets] * (g - g_mean[sets] - h * gh_mean[sets])
    y = h * weight[per_channel] + bias[per_channel]
    return y, dx, (dy * h).sum(others), dy.sum(others)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    wider = torch.full((x.size(0), 2 * x.size(1), *x.shape[2:]), 7.0, dtype=x.dtype)
    wider[:, ::2] = x
    return wider[:, ::2]


def random_affine(layer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values + 0.5)


def check_against_formula(layer, shape, sets, dtype, layout, offset=0.0):
    """The layer's y, dx, dweight and dbias are the formula's, within the rounding of `dtype`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    x = lay_out(x.to(dtype), layout).requires_grad_()
    before = x.detach().clone()
    y = layer(x)
    y.backward(lay_out(dy, layout))
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    expected = forward_backward(
        x.detach().double().numpy(), sets, weight, bias, dy.double().numpy(), layer.eps
    )
    assert y.dtype == dtype
    assert torch.equal(x.detach(), before)
    atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    atol += (
        offset * torch.finfo(dtype).eps * 8
    )  # the input's own rounding, relative to a spread of 1
    for actual, values in zip(
        (y, x.grad, layer.weight.grad, layer.bias.grad), expected, strict=True
    ):
        # Sums over a reduction in bfloat16's gradients: relative to their size.
        scale = max(1.0, np.abs(values).max())
        np.testing.assert_allclose(
            actual.detach().double().numpy(), values, rtol=0, atol=atol * scale
        )
    return y
