"""The gradient of a channels_last input is in channels_last, as its convolution wants it."""

import pytest
import torch

from .inputs import lay_out
from .zoo import LAYERS, data, make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", LAYERS)
def test_gradients_are_laid_out_as_their_input(variant, dtype):
    x = lay_out(data(1).to(dtype), "channels_last").requires_grad_()
    y = make(variant).train()(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.stride() == dx.stride() == x.stride()
