"""The convolutions that normalize their weights: definitions in float64, limits, replacement."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles.weights import filters
from torch import nn

from normlab import norms
from normlab.norms import (
    BatchNorm,
    CenteredWeightNormConv2d,
    WeightNormConv2d,
    WeightStandardizedConv2d,
    conv,
)
from normlab.norms.conv.base import replace

KINDS = {
    "timm": (WeightStandardizedConv2d, {"convention": "timm"}),
    "official": (WeightStandardizedConv2d, {"convention": "official"}),
    "wn": (WeightNormConv2d, {}),
    "cwn": (CenteredWeightNormConv2d, {}),
}
SHAPES = {  # what Conv2d is given, and the shape of its weight
    "3x3": ((3, 5, 3), {"padding": 1}),
    "strided": ((4, 6, (3, 2)), {"stride": 2, "bias": False}),
    "grouped": ((4, 6, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "depthwise": ((4, 4, 3), {"groups": 4, "padding": "same", "padding_mode": "circular"}),
    "pointwise": ((6, 3, 1), {}),
}


def make(kind, *arguments, **options):
    cls, more = KINDS[kind]
    return cls(*arguments, **options, **more)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_filters_and_output_are_the_definitions(kind, shape):
    """P69: multiplied by the inverse deviation, each convention by its name."""
    torch.manual_seed(0)
    arguments, options = SHAPES[shape]
    layer = make(kind, *arguments, **options).double()
    g = np.ones(layer.out_channels)
    if "wn" in kind:
        with torch.no_grad():
            layer.weight_g.uniform_(0.5, 2)
        g = layer.weight_g.detach().numpy()
    expected = filters(kind, layer.weight.detach().numpy(), g)
    np.testing.assert_allclose(layer.filters().detach().numpy(), expected, rtol=0, atol=1e-12)
    plain = nn.Conv2d(*arguments, **options).double()
    with torch.no_grad():
        plain.weight.copy_(torch.from_numpy(expected))
        if plain.bias is not None:
            plain.bias.copy_(layer.bias)
    x = torch.randn(2, layer.in_channels, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_numerical_ones(kind):
    torch.manual_seed(0)
    layer = make(kind, 2, 2, 2).double()
    x = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_in_channels_last_and_of_one_parameter(kind):
    torch.manual_seed(0)
    layer = make(kind, 2, 2, 2, bias=False).double().to(memory_format=torch.channels_last)
    for name, value in layer.named_parameters():

        def function(value, name=name):
            return torch.func.functional_call(
                layer, {name: value}, (torch.ones(1, 2, 2, 2).double(),)
            )

        value.requires_grad_()
        others = [p for n, p in layer.named_parameters() if n != name]
        for other in others:
            other.requires_grad_(False)
        assert torch.autograd.gradgradcheck(function, (value,))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_orthogonal_to_what_changes_nothing(kind):
    """To the filter, and to a constant where filters are centered."""
    torch.manual_seed(0)
    layer = make(kind, 3, 5, 3).double()
    layer.eps = 1e-14
    layer(torch.randn(4, 3, 5, 5, dtype=torch.float64)).square().sum().backward()
    gradient, weight = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1)
    size = gradient.norm(dim=1)
    along = (gradient * (weight if kind == "wn" else weight - weight.mean(1, True))).sum(1)
    assert (along.abs() < 1e-10 * size).all()
    centered = gradient.sum(1).abs() < 1e-10 * size
    assert centered.all() if kind != "wn" else not centered.any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_change_the_function(kind):
    """w -> a w + b per filter (a > 0); b only where filters are centered."""
    torch.manual_seed(0)
    layer = make(kind, 3, 5, 3).double()
    layer.eps = 1e-14
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(5, 1, 1, 1, dtype=torch.float64) + 0.5)
        if kind != "wn":
            layer.weight.add_(torch.randn(5, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(layer(x), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["timm", "official"])
def test_standardized_filters_have_mean_0_and_variance_1(kind):
    filters = make(kind, 3, 5, 3).double().filters().detach().flatten(1)
    zeros, ones = torch.zeros(5).double(), torch.ones(5).double()
    torch.testing.assert_close(filters.mean(1), zeros, rtol=0, atol=1e-12)
    variance = filters.var(1, correction=0 if kind == "timm" else 1)
    torch.testing.assert_close(variance, ones, rtol=0, atol=1e-3)
    ratio = make("timm", 3, 1, 3, bias=False), make("official", 3, 1, 3, bias=False)
    ratio[1].weight = ratio[0].weight
    for layer in ratio:
        layer.double().eps = 1e-14
    quotient = (ratio[0].filters() / ratio[1].filters()).mean().item()
    assert quotient == pytest.approx(math.sqrt(27 / 26))  # 1.9 %


@pytest.mark.parametrize("kind", ["wn", "cwn"])
def test_new_parameters_have_their_own_lengths(kind):
    """reset_parameters draws v anew: g stays the parameter it is, and becomes the new |v|."""
    layer = make(kind, 3, 5, 3)
    g = layer.weight_g
    with torch.no_grad():
        g.mul_(7)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = make(kind, 3, 5, 3)
    assert layer.weight_g is g
    assert all(map(torch.equal, layer.parameters(), fresh.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_filter_is_finite(kind, value, dtype):
    """P69: so are its gradients, where the authors' code has an infinite one."""
    layer = make(kind, 3, 4, 3).to(dtype)
    with torch.no_grad():
        layer.weight[1] = value
    y = layer(torch.randn(2, 3, 5, 5, dtype=dtype))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    if kind != "wn" or value == 0:
        assert layer.filters()[1].abs().max() < 1e-2
        assert layer.filters()[0].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_fan_in_of_one_is_finite(kind):
    """P69: 0 / 0 in the authors' formula; a filter of one weight is 0, and its sign in wn."""
    layer = make(kind, 4, 4, 1, groups=4, bias=False)
    y = layer(torch.randn(2, 4, 3, 3))
    y.square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    expected = layer.weight if kind == "wn" else torch.zeros_like(layer.weight)
    torch.testing.assert_close(layer.filters(), expected)


def test_a_zero_filter_of_weight_norm_can_leave_zero():
    layer = WeightNormConv2d(3, 2, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert layer.filters()[0].eq(0).all()
    assert layer.weight.grad[0].abs().max() > 0
    theirs = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3))
    with torch.no_grad():
        theirs.parametrizations.weight.original1[0] = 0
    assert theirs.weight[0].isnan().all()  # if this fails, the docstring is out of date


def test_weight_norm_is_torchs():
    torch.manual_seed(0)
    theirs = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))
    with torch.no_grad():
        theirs.parametrizations.weight.original0.uniform_(0.5, 2)
    ours = WeightNormConv2d(3, 5, 3)
    ours.load_state_dict(
        {
            "weight": theirs.parametrizations.weight.original1,
            "weight_g": theirs.parametrizations.weight.original0,
            "bias": theirs.bias,
        },
        strict=True,
    )
    x = torch.randn(2, 3, 6, 6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x))
    original = theirs.parametrizations.weight
    torch.testing.assert_close(ours.weight_g.grad, original.original0.grad)
    torch.testing.assert_close(ours.weight.grad, original.original1.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.filters().flatten(1).norm(dim=1), ours.weight_g.flatten(), rtol=1e-6, atol=1e-6
    )


def test_centered_weight_norm_is_weight_norm_of_the_centered_and_standardization_at_sqrt_m():
    torch.manual_seed(0)
    cwn = CenteredWeightNormConv2d(3, 5, 3, bias=False).double()
    wn = WeightNormConv2d(3, 5, 3, bias=False).double()
    with torch.no_grad():
        wn.weight.copy_(cwn.weight - cwn.weight.mean((1, 2, 3), keepdim=True))
        wn.weight_g.copy_(cwn.weight_g)
        torch.testing.assert_close(cwn.filters(), wn.filters(), rtol=0, atol=1e-14)
        cwn.weight_g.fill_(math.sqrt(27))
        ws = WeightStandardizedConv2d.from_conv(cwn, eps=1e-300)
        torch.testing.assert_close(cwn.filters(), ws.filters(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_have_float32_statistics(kind, dtype):
    """Also where filters are far from centered, and in their gradients."""
    torch.manual_seed(0)
    layer = make(kind, 3, 5, 3, bias=False)
    with torch.no_grad():
        layer.weight.add_(2).mul_(100)
    reference = copy.deepcopy(layer).to(dtype).double()
    half = layer.to(dtype)
    filters, expected = half.filters(), reference.filters()
    assert filters.dtype == dtype
    torch.testing.assert_close(filters.double(), expected, rtol=2e-2, atol=2e-2)
    df = torch.randn(filters.shape).to(dtype)
    filters.backward(df)
    expected.backward(df.double())
    error = (half.weight.grad - reference.weight.grad).norm() / reference.weight.grad.norm()
    assert error < torch.finfo(dtype).eps / 3  # what rounding it once leaves


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    layer = make(kind, 3, 5, 3)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_and_copies(kind):
    layer = make(kind, 3, 5, 3)
    x = torch.randn(2, 3, 6, 6)
    y = layer(x)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(x.contiguous(memory_format=torch.channels_last)), y)
    fresh = make(kind, 3, 5, 3)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh(x), y)
    keys = ["weight", "weight_g", "bias"] if "wn" in kind else ["weight", "bias"]
    assert sorted(layer.state_dict()) == sorted(keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"convention": "keras"}, "convention is one of"), ({"eps": 0.0}, "eps must be above 0")],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        WeightStandardizedConv2d(3, 5, 3, **options)


# -- replacement ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = BatchNorm(4)
        self.again = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), self.first)
        self.other = WeightNormConv2d(4, 4, 1)
        self.alias = self.first
        self.line = nn.Linear(4, 2)

    def forward(self, x):
        return self.line(self.other(self.norm(self.first(x)).relu()).mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_replace_keeps_parameters_and_draws_nothing(kind):
    torch.manual_seed(0)
    model = Net().eval()
    model.first.weight.requires_grad_(False)
    first, line, state = model.first.weight, model.line, torch.get_rng_state()
    cls, options = KINDS[kind]
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    before = model(x)
    assert replace(model, cls, **options) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model.first) is cls
    assert type(model.other) is WeightNormConv2d
    assert model.first.weight is first
    assert model.again[1] is model.alias is model.first
    assert model.again[0].bias is None
    assert model.line is line
    assert not any(m.training for m in model.modules())
    assert all(not p.is_meta for p in model.parameters())
    assert all(not p.requires_grad for n, p in model.named_parameters() if "first.weight" in n)
    after = model(x)
    if kind == "wn":  # the function stays, to rounding
        torch.testing.assert_close(after, before)
    else:
        assert (after - before).abs().max() > 1e-4


def test_replace_keeps_hooks_and_their_handles():
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    handles = [
        model[0].register_forward_hook(lambda module, *_: calls.append(module)),
        model[0].register_full_backward_hook(lambda module, *_: calls.append(module)),
        model[0].register_load_state_dict_pre_hook(lambda module, *_: calls.append(module)),
    ]
    replace(model, WeightStandardizedConv2d)
    for expected in ([model[0]] * 3, []):
        calls.clear()
        model(torch.randn(1, 3, 2, 2, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert calls == expected
        for handle in handles:
            handle.remove()


def test_replace_a_convolution_itself():
    plain = nn.Conv2d(2, 3, 3, padding="same")
    layer = replace(plain, WeightNormConv2d)
    assert type(layer) is WeightNormConv2d
    torch.testing.assert_close(layer(torch.ones(1, 2, 4, 4)), plain(torch.ones(1, 2, 4, 4)))


def test_a_norm_after_it_undoes_the_length_of_the_filters():
    """What replacing changes under a batch norm: only the filters' means, here already 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4)).double()
    with torch.no_grad():
        model[0].weight.sub_(model[0].weight.mean((1, 2, 3), keepdim=True))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before = model(x)
    replace(model, WeightStandardizedConv2d)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


# -- names ----------------------------------------------------------------------------------------


def test_names():
    assert conv.names() == ["cwn", "wn", "ws"]
    assert conv.find("ws") is WeightStandardizedConv2d is norms.WeightStandardizedConv2d
    with pytest.raises(ValueError, match="no convolution 'base'; there are: plain, cwn, wn, ws"):
        conv.find("base")
    code = "import sys, normlab.norms.conv as c; c.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_filters_at_test_can_be_written_into_a_plain_convolution():
    layer = WeightStandardizedConv2d(3, 5, 3).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), F.conv2d(x, layer.filters(), layer.bias))
