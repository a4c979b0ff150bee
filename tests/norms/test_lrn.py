import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.lrn import forward_backward

from normlab.norms import LocalResponseNorm

from .checks import assert_values, numpy
from .inputs import cases, lay_out

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("squares", ["sum", "mean"])
@pytest.mark.parametrize("size", [1, 3, 4, 13])
@cases([d for d in TOLERANCE if d != torch.float64])
def test_formula(shape, dtype, layout, size, squares):
    """P70: alpha with and without the division by the window's size, each by its name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    leaf = lay_out(x.clone(), layout).requires_grad_()
    layer = LocalResponseNorm(6, size=size, alpha=0.7, beta=0.6, k=1.3, squares=squares)
    y = layer(leaf)
    y.backward(lay_out(dy, layout))
    expected = forward_backward(numpy(x), numpy(dy), size, 0.7, 0.6, 1.3, squares == "mean")
    assert y.dtype == dtype
    assert_values((y, leaf.grad), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_mean_is_torch(size):
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64)
    layer = LocalResponseNorm(6, size=size, alpha=0.5, beta=0.8, k=1.0, squares="mean")
    expected = F.local_response_norm(x, size, alpha=0.5, beta=0.8, k=1.0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-14)


def test_the_window_of_four_has_two_below_and_one_above():
    x = torch.zeros(1, 6, 1, dtype=torch.float64)
    x[0, 3] = 1
    layer = LocalResponseNorm(6, size=4, alpha=1, beta=1, k=1)
    weights = torch.autograd.functional.jacobian(lambda z: 1 / (layer(z + 1e-9) / (z + 1e-9)), x)
    touched = weights[0, :, 0, 0, 3, 0].abs() > 0.1
    assert touched.tolist() == [False, False, True, True, True, True]  # outputs that look at 3


def test_limits():
    x = torch.randn(4, 6, 3)
    assert torch.equal(LocalResponseNorm(6, alpha=0.0, k=1.0)(x), x)
    y = LocalResponseNorm(6, alpha=0.0, k=3.0, beta=0.5)(x)
    torch.testing.assert_close(y, x / 3**0.5)
    y = LocalResponseNorm(6, size=12, alpha=1.0, beta=0.5, k=1e-12)(x)
    torch.testing.assert_close(y, F.normalize(x, dim=1))


def test_the_defaults_are_the_papers():
    x = 10 * torch.randn(2, 7, 3, dtype=torch.float64)
    expected, _ = forward_backward(x.numpy(), x.numpy(), 5, 1e-4, 0.75, 2, divided=False)
    np.testing.assert_allclose(LocalResponseNorm(7)(x).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_inputs_do_not_overflow(dtype):
    x = (300 * torch.randn(8, 6, 4, 4)).to(dtype)
    y = LocalResponseNorm(6, alpha=1.0)(x)
    assert y.dtype == dtype
    expected, _ = forward_backward(x.double().numpy(), x.double().numpy(), 5, 1.0, 0.75, 2, False)
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=1e-2, atol=1e-3)


def test_no_state_and_the_same_in_eval():
    layer, x = LocalResponseNorm(3), torch.randn(2, 3, 4, 4)
    assert layer.state_dict() == {}
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer(x[:0]).shape == (0, 3, 4, 4)
    assert layer(lay_out(x, "channels_last")).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be a whole number of at least 1"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"k": 0.0}, "k must be above 0"),
        ({"squares": "torch"}, "squares is one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalResponseNorm(3, **arguments)
    with pytest.raises(ValueError, match="got 4 channels"):
        LocalResponseNorm(3)(torch.randn(2, 4, 3))
