"""How the layers' tests hold tensors to what tests/oracles says."""

import numpy as np
import torch
from oracles.moments import forward_backward

from .inputs import lay_out, random_affine


def numpy(tensor):
    """The tensor's values in float64, apart from the tensor."""
    return tensor.detach().double().numpy().copy()


def assert_values(tensors, expected, atol):
    """Within atol, relative to the largest value of each where that is above 1."""
    for tensor, values in zip(tensors, expected, strict=True):
        # Sums over a reduction in bfloat16's gradients: relative to their size.
        scale = max(1.0, np.abs(values).max())
        np.testing.assert_allclose(numpy(tensor), values, rtol=0, atol=atol * scale)


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
    weight, bias = numpy(layer.weight), numpy(layer.bias)
    expected = forward_backward(numpy(x), sets, weight, bias, numpy(dy), layer.eps)
    assert y.dtype == dtype
    assert torch.equal(x.detach(), before)
    atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    atol += (
        offset * torch.finfo(dtype).eps * 8
    )  # the input's own rounding, relative to a spread of 1
    assert_values((y, x.grad, layer.weight.grad, layer.bias.grad), expected, atol)
    return y
