"""Second derivatives of every layer in both memory layouts, against numerical ones.

Of a loss that is linear in the output, too: there backward gets a constant, and a gradient that is
one itself would be a second derivative of zero that nobody hears of.
"""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad

from normlab import kernels
from normlab.norms import SeparateBatchNorm, SyncBatchNorm, domains

from .inputs import lay_out
from .zoo import LAYERS, close, data, in_float64, make

SHAPE = (8, 6, 2, 2)
LAYOUTS = ["contiguous", "channels_last"]
LABELS = [0, 1, 1, 0, 0, 1, 0, 1]
OWN = "separate-own"
VARIANTS = [*LAYERS, pytest.param(OWN, id=OWN)]


def made(variant):
    """The layer, and what labels its samples; nothing in a forward moves."""
    if variant == OWN:
        layer = SeparateBatchNorm(6, num_domains=2, share_statistics=True, share_affine=False)
    else:
        layer = make(variant, SHAPE)
    layer.update = False
    if hasattr(layer, "r_max"):  # batch renorm's r and d at limits, where they are constants
        layer.r_max, layer.d_max = 1.1, 0.1
        layer.running_mean.fill_(5)
        layer.running_var.fill_(50)
    return layer, domains(layer, LABELS) if variant == OWN else nullcontext()


def function(layer, rest):
    """The layer of x and its parameters, beside samples `rest` that are constants to it."""
    names = [name for name, v in layer.named_parameters() if v.requires_grad]

    def of(x, *values):
        known = dict(zip(names, values, strict=True))
        z = torch.cat([x, rest]) if len(rest) else x
        assert z.stride() == x.stride()
        return functional_call(layer, known, z)[: len(x)]

    return of


def split(layer, x):
    """What of x the layer learns from, and the samples that are forward-only to it."""
    virtual = layer.virtual if getattr(layer, "gradient", "all") == "own" else 0
    return x[: len(x) - virtual], x[len(x) - virtual :]


def learning(values):
    return [v.detach().clone().requires_grad_() for v in values]


def parameters(layer):
    return [v for v in layer.parameters() if v.requires_grad]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_are_the_numerical_ones(variant, layout):
    layer, context = made(variant)
    x, rest = split(layer, lay_out(data(1, SHAPE), layout))
    of = function(layer.double(), rest)
    values = learning([x, *parameters(layer)])
    dy = lay_out(data(2, SHAPE)[: len(x)], layout)
    with context:
        assert gradgradcheck(of, values, dy, fast_mode=True)  # a linear loss
        assert gradgradcheck(of, values, fast_mode=True)


@pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_those_of_the_kernels_are_those_of_float64(variant, layout):
    layer, _ = made(variant)
    twin = in_float64(layer)

    def found(layer, x, dy, v):
        x, rest = split(layer, x)
        dy, v = dy[: len(x)], v[: len(x)]
        values = learning([x, *parameters(layer)])
        with domains(layer, LABELS) if variant == OWN else nullcontext():
            y = function(layer, rest)(*values)
        (dx,) = torch.autograd.grad(y, values[0], dy, create_graph=True)
        if not dx.requires_grad:  # of a layer that is linear in x
            return {i: torch.zeros_like(value) for i, value in enumerate(values)}
        second = torch.autograd.grad(dx, values, v, allow_unused=True, materialize_grads=True)
        return dict(enumerate(second))

    given = [data(seed, SHAPE) for seed in (1, 2, 3)]
    expected = found(twin, *given)
    with kernels.use(True):
        close(found(layer, *(lay_out(v.float(), layout) for v in given)), expected, 2e-5)


@pytest.mark.parametrize("variant", [("gn", 0), ("instance", 0), ("ghost", 0)])
def test_transformations_differentiate_twice(variant):
    """torch.func.grad of torch.func.grad is autograd's."""
    layer, _ = made(variant)
    layer.double()
    x, dy, v = (lay_out(data(seed, SHAPE), "channels_last") for seed in (1, 2, 3))

    def slope(x):
        return (grad(lambda x: (layer(x) * dy).sum())(x) * v).sum()

    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf), leaf, dy, create_graph=True)
    (expected,) = torch.autograd.grad(dx, leaf, v)
    torch.testing.assert_close(grad(slope)(x), expected, rtol=0, atol=1e-12)


def twice(rank, linear):
    x = (data(rank) + rank).requires_grad_()
    y = SyncBatchNorm(6).double()(x)
    (dx,) = torch.autograd.grad((y if linear else y.square()).sum(), x, create_graph=True)
    try:
        dx.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "a second derivative"


@pytest.mark.parametrize("linear", [True, False])
def test_across_ranks_they_are_refused_not_zero(ranks, linear):
    assert ranks.run(twice, linear) == ["SyncBatchNorm has no second derivatives across ranks"] * 4
