"""Extra samples of large inputs, whose backward pass goes over the others alone."""

import copy
from itertools import product

import pytest
import torch
from oracles.virtual import own_samples
from torch import nn

from normlab.norms import BatchNorm, VirtualBatchNorm, _forward_only

from .inputs import LAYOUTS, SHAPES, lay_out, random_affine
from .test_virtual import EXTRA, check, made, same, state


@pytest.fixture
def taken(monkeypatch):
    """Every input is large; the sizes of those that went this way."""
    sizes, real = [], _forward_only.own_gradient
    monkeypatch.setattr(_forward_only, "LARGE", 0)
    monkeypatch.setattr(
        _forward_only, "own_gradient", lambda x, *rest: sizes.append(x.numel()) or real(x, *rest)
    )
    return sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("population", ["all", "own"])
def test_formula(population, shape, layout, taken):
    """y, dx, dweight, dbias and both buffers."""
    for dtype in (torch.float64, torch.float32):
        check("extra", "own", population, shape, dtype, layout)
        assert len(taken) == 1
        taken.clear()


def test_which_inputs_are_large():
    shape = (16, 8, 32, 32)
    layer = VirtualBatchNorm(8, extra=8)
    for dtype, samples, expected in (
        (torch.float32, 16, True),
        (torch.float64, 16, True),
        (torch.float32, 15, False),
        (torch.bfloat16, 16, False),
        (torch.float16, 16, False),
    ):
        x = torch.zeros(shape, dtype=dtype)[:samples]
        assert _forward_only.worth_own_sums(x) == expected
    with torch.no_grad():
        assert not _forward_only.worth_own_sums(torch.zeros(shape))
    names = {type(layer(torch.randn(shape)).grad_fn).__name__}
    layer.gradient = "all"
    names.add(type(layer(torch.randn(shape)).grad_fn).__name__)
    assert names == {"_OwnGradientBackward", "NativeBatchNormBackward0"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_as_accurate_as_batch_norm(offset, layout):
    """P64: its bits in y and buffers, and its distance from float64 in the gradients."""
    shape, own = (16, 8, 33, 32), 16 - EXTRA
    layer, plain = VirtualBatchNorm(8, extra=EXTRA), BatchNorm(8)
    random_affine(layer)
    plain.load_state_dict(layer.state_dict())
    z = made(shape, torch.float32, layout, offset=offset)
    dy = made(shape, torch.float32, layout, seed=4) + z - offset  # some of it along y
    errors = []
    exact = z.double().requires_grad_()
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    own_samples(exact, own, "extra", "own", weight, bias, layer.eps).backward(dy[:own].double())
    outputs = []
    for one in (layer, plain):
        w = lay_out(z.clone(), layout).requires_grad_()
        y = one(w)
        y[:own].backward(dy[:own])
        outputs.append(y)
        errors.append((w.grad[:own].double() - exact.grad[:own]).norm() / exact.grad.norm())
    assert type(outputs[0].grad_fn).__name__ == "_OwnGradientBackward"
    assert torch.equal(*outputs)
    assert same(state(layer), state(plain))
    assert errors[0] < 1.5 * errors[1] + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("population", ["all", "own"])
def test_without_some_of_what_can_learn(population, taken):
    """An affine part that is half there or not at all, and an input without gradient."""
    z, dy = (made((8, 6, 4, 3), torch.float64, "contiguous", seed=seed) for seed in (3, 4))
    for absent, learns in product(((), ("weight",), ("bias",), ("weight", "bias")), (True, False)):
        layer = VirtualBatchNorm(6, extra=EXTRA, population=population).double()
        random_affine(layer)
        for name in absent:
            layer.register_parameter(name, None)
        x, exact = (z.clone().requires_grad_(learns) for _ in range(2))
        weight = torch.ones(6).double() if layer.weight is None else layer.weight.detach().clone()
        bias = torch.zeros(6).double() if layer.bias is None else layer.bias.detach().clone()
        weight.requires_grad_("weight" not in absent)
        bias.requires_grad_("bias" not in absent)
        y = layer(x)
        assert taken.pop() == z.numel()
        if not y.requires_grad:
            continue
        y.backward(dy)
        own_samples(exact, 8 - EXTRA, "extra", "own", weight, bias, layer.eps).backward(dy[:5])
        for found, expected in ((x, exact), (layer.weight, weight), (layer.bias, bias)):
            if found is not None and found.requires_grad:
                torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("population", ["all", "own"])
def test_observers_change_nothing(population, taken):
    layer = VirtualBatchNorm(6, extra=EXTRA, population=population)
    watched, seen, grads = copy.deepcopy(layer), [], []
    watched.observers.append(seen.append)
    for one in (layer, watched):
        z = made((8, 6, 4, 3), torch.float32, "channels_last").requires_grad_()
        one(z).pow(3).sum().backward()
        grads.append(z.grad)
    assert torch.equal(*grads)
    assert same(state(layer), state(watched))
    followed = z[: 8 if population == "all" else 5].detach()
    (batch,) = seen
    assert batch.count == followed[:, 0].numel()
    torch.testing.assert_close(batch.mean[0], followed.mean((0, 2, 3)))
    torch.testing.assert_close(batch.var[0], followed.var((0, 2, 3), correction=0))
    assert len(taken) == 2


def test_second_derivatives(taken):
    torch.manual_seed(0)
    layer = VirtualBatchNorm(2, extra=2).double()
    v = torch.randn(2, 2, 3, dtype=torch.float64)
    values = [torch.randn(3, 2, 3).double(), *(torch.rand(2).double() + 0.5 for _ in range(2))]
    values = [value.requires_grad_() for value in values]

    def function(x, weight, bias):
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return layer(torch.cat([x, v]))[:3]

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)
    assert taken


def test_a_gradient_that_is_given_stays_as_it_is():
    """Where a graph of the backward pass is made, others may hold it: a copy is cut off."""
    x, dy = (torch.randn(4, 2, requires_grad=True) for _ in range(2))
    y = _forward_only.constant_from(x, 3)
    given = dy.detach().clone()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert torch.equal(dy, given)
    assert torch.equal(dx[:3], given[:3])
    assert (dx[3:] == 0).all()
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    assert torch.equal(ddy, (torch.arange(4) < 3).float()[:, None].expand(4, 2))


def test_what_follows_may_work_in_place(taken):
    found = []
    for inplace in (False, True):
        layer = VirtualBatchNorm(6, extra=EXTRA)
        z = made((8, 6, 4, 3), torch.float32, "contiguous").requires_grad_()
        nn.ReLU(inplace=inplace)(layer(z * 1)).square().sum().backward()
        found.append((z.grad, layer.weight.grad))
    assert all(map(torch.equal, *found))
    assert len(taken) == 2
