"""Separate batch norm against float64 formulas, and against one batch norm per domain."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.separate import at_test, buffers, forward_backward

from normlab.norms import BatchNorm, SeparateBatchNorm, domains

from .checks import assert_values, numpy
from .inputs import LAYOUTS, SHAPES, lay_out, random_affine

LABELS = [2, 0, 2, 2, 0, 2, 0, 2]  # of 8 samples; domain 1 is absent
SWITCHES = list(product([False, True], repeat=3))  # statistics, population, affine: shared?


def separate(channels, number=3, switches=(False, False, True), **options):
    names = ("share_statistics", "share_population", "share_affine")
    return SeparateBatchNorm(
        channels, num_domains=number, **dict(zip(names, switches, strict=True)), **options
    )


def state(layer):
    return copy.deepcopy(layer.state_dict())


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def check_combination(layer, switches, shape, dtype, layout, labels=LABELS):
    """y, dx, dweight, dbias and buffers in train(), y and dx in eval(), from the definitions."""
    generator = torch.Generator().manual_seed(3)
    labels = labels[: shape[0]]
    shift = torch.tensor(labels, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + shift) + 3 * shift
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    x = lay_out(x.to(dtype), layout).requires_grad_()
    values, gradient = numpy(x), numpy(dy)
    affine = numpy(layer.weight), numpy(layer.bias)
    expected = forward_backward(values, gradient, labels, *affine, layer.eps, switches[0])
    kept = numpy(layer.running_mean), numpy(layer.running_var)
    mean, var, steps = buffers(values, labels, *kept, layer.decay, switches[0])

    with domains(layer, labels):
        y = layer(x)
    y.backward(lay_out(dy, layout))
    assert y.dtype == dtype
    if layout == "channels_last" and len(shape) > 3:
        assert y.movedim(1, -1).is_contiguous()
    atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]

    assert_values((y, x.grad, layer.weight.grad, layer.bias.grad), expected, atol)
    assert_values((layer.running_mean, layer.running_var), (mean, var), atol)
    assert layer.num_batches_tracked.tolist() == np.asarray(steps).tolist()

    layer.eval()
    x.grad = None
    with domains(layer, labels):
        y = layer(x)
    y.backward(dy)
    kept = numpy(layer.running_mean), numpy(layer.running_var)
    assert_values((y, x.grad), at_test(values, gradient, labels, *kept, *affine, layer.eps), atol)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_combination_of_the_switches(switches, dtype, layout):
    """P58: each of the 8 combinations of table 5 is what its definition says."""
    check_combination(separate(6, switches=switches), switches, (8, 6, 4, 3), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("switches", [(False, False, False), (True, False, False)])
def test_shapes_and_layouts(switches, shape, layout):
    check_combination(separate(6, switches=switches), switches, shape, torch.float64, layout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("own_affine", [False, True])
def test_is_one_batch_norm_per_domain_to_the_bit(own_affine, layout, dtype):
    """P56, P57: a mixed batch is each domain's own batch norm: outputs, gradients and buffers."""
    torch.manual_seed(0)
    layer = separate(5, switches=(False, False, not own_affine))
    random_affine(layer)
    if dtype == torch.float64:
        layer.double()
    each = [BatchNorm(5).to(layer.weight.dtype) for _ in range(3)]
    for d, norm in enumerate(each):
        weight, bias = layer._affine(d)
        norm.load_state_dict({**norm.state_dict(), "weight": weight, "bias": bias})
    for labels in (LABELS, [0, 0, 0, 1, 1, 2, 2, 2], [1] * 8):
        indices = torch.tensor(labels)
        x = lay_out(torch.randn(8, 5, 4, 4).to(dtype), layout).requires_grad_()
        dy = lay_out(torch.randn(8, 5, 4, 4).to(dtype), layout)
        layer.zero_grad()
        with domains(layer, labels):
            y = layer(x)
        y.backward(dy)
        for d in range(3):
            each[d].zero_grad()
            mine = indices == d
            if not mine.any():
                continue
            z = lay_out(x.detach()[mine], layout).requires_grad_()
            expected = each[d](z)
            expected.backward(lay_out(dy[mine], layout))
            assert torch.equal(y[mine], expected)
            assert torch.equal(x.grad[mine], z.grad)
            assert torch.equal(layer.running_mean[d], each[d].running_mean)
            assert torch.equal(layer.running_var[d], each[d].running_var)
            if own_affine:
                assert torch.equal(layer.weight.grad[d], each[d].weight.grad)
                assert torch.equal(layer.bias.grad[d], each[d].bias.grad)
        if not own_affine:
            total = sum(norm.weight.grad for norm in each if norm.weight.grad is not None)
            torch.testing.assert_close(layer.weight.grad, total)
        assert layer.num_batches_tracked.tolist() == [int(v.num_batches_tracked) for v in each]
    layer.eval()
    x = lay_out(torch.randn(8, 5, 4, 4).to(dtype), layout)
    with domains(layer, LABELS):
        y = layer(x)
    for d in (0, 2):
        mine = torch.tensor(LABELS) == d
        assert torch.equal(y[mine], each[d].eval()(lay_out(x[mine], layout)))


def test_shared_population_is_one_batch_norm_called_on_each_domain():
    """P58: specific statistics, one buffer moved by each domain in turn, as heads share BN."""
    torch.manual_seed(0)
    layer, once = separate(5, switches=(False, True, True)), BatchNorm(5)
    x = torch.randn(8, 5, 3, 3)
    with domains(layer, LABELS):
        y = layer(x)
    for d in (0, 2):
        mine = torch.tensor(LABELS) == d
        assert torch.equal(once(x[mine]), y[mine])
    assert same(state(layer), state(once))


@pytest.mark.parametrize("switches", SWITCHES)
def test_one_domain_is_batch_norm(switches):
    torch.manual_seed(0)
    layer, plain = separate(5, 1, switches), BatchNorm(5)
    assert layer.load_state_dict(plain.state_dict())
    x = torch.randn(8, 5, 3, 3, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    for labels in (None, 0, [0] * 8):
        if labels is None:
            y = layer(x)
        else:
            with domains(layer, labels):
                y = layer(x)
        expected = plain(z)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, z.grad)
    assert same(state(layer), state(plain))
    assert plain.load_state_dict(layer.state_dict())


def test_all_shared_is_batch_norm_and_needs_no_labels():
    torch.manual_seed(0)
    layer, plain = separate(5, 3, (True, True, True)), BatchNorm(5)
    x = torch.randn(8, 5, 3, 3)
    assert torch.equal(layer(x), plain(x))
    with domains(layer, LABELS):
        assert torch.equal(layer(x), plain(x))
    assert same(state(layer), state(plain))
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=2, max_size=9),
    switches=st.sampled_from(SWITCHES),
    layout=st.sampled_from(LAYOUTS),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_permuting_the_batch_permutes_the_output(labels, switches, layout, training, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), 3, 2, 2)
    x = lay_out(torch.randn(shape, generator=generator, dtype=torch.float64), layout)
    order = torch.randperm(len(labels), generator=generator)
    one = separate(3, 4, switches).double().train(training)
    random_affine(one)
    two = copy.deepcopy(one)
    labels = torch.tensor(labels)
    with domains(one, labels), domains(two, labels[order]):
        torch.testing.assert_close(one(x)[order], two(x[order]), rtol=0, atol=1e-11)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("switches", [s for s in SWITCHES if not s[1]])
def test_an_absent_domain_keeps_its_buffers(switches):
    layer = separate(3, 3, switches)
    with torch.no_grad():
        layer.running_mean.uniform_()
        layer.running_var.uniform_()
    before = state(layer)
    with domains(layer, LABELS):
        layer(torch.randn(8, 3, 2, 2)).sum().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        now = getattr(layer, name)
        assert torch.equal(now[1], before[name][1])
        assert not torch.equal(now[0], before[name][0])
    if not switches[2]:
        assert not layer.weight.grad[1].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_large_means_keep_precision(switches, layout):
    """P64: a mean of 1e4 and a spread of 1 in float32, for outputs and every population."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64) + 1e4
    x = lay_out(x.float(), layout)
    layer, exact = separate(3, 3, switches, decay=0.5), separate(3, 3, switches, decay=0.5).double()
    with domains(layer, LABELS), domains(exact, LABELS):
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0, atol=1e-2)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-2, atol=0)


@pytest.mark.parametrize("switches", SWITCHES)
def test_half_precision_keeps_float32_statistics(switches):
    """P65: float16 inputs of size 300 do not overflow, and the buffers stay float32."""
    x = (torch.randn(8, 3, 6, 6) + 300).half()
    layer, exact = separate(3, 3, switches), separate(3, 3, switches).double()
    with domains(layer, LABELS), domains(exact, LABELS):
        y = layer(x)
        expected = exact(x.double())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-2)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-3, atol=0)


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_layer_in_half_precision_runs(switches):
    """Parameters and buffers in half too: forward, backward, update and evaluation."""
    layer = separate(3, 3, switches).bfloat16()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(8, 3, 6, 6).bfloat16().requires_grad_()
    with domains(layer, LABELS), domains(exact, LABELS):
        for training in (True, False):
            y, expected = layer.train(training)(x), exact.train(training)(x.detach().double())
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
            y.square().sum().backward()
            assert x.grad.isfinite().all()
    assert all(v.dtype in (torch.bfloat16, torch.int64) for v in layer.state_dict().values())


@pytest.mark.parametrize("switches", SWITCHES)
def test_gradcheck(switches):
    torch.manual_seed(0)
    layer = separate(2, 3, switches).double()
    x = torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True)
    with domains(layer, LABELS):
        assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize(
    ("switches", "backend"),
    [((False, False, False), "aot_eager"), ((True, False, False), "eager")],
)
def test_compiles_into_one_graph(switches, backend):
    """P73: sorted by domain and back without a graph break, equal to eager."""
    torch.manual_seed(0)
    layer = separate(3, 3, switches)
    twin, x = copy.deepcopy(layer), torch.randn(8, 3, 4)
    torch._dynamo.reset()  # its limit of recompilations is one for all layers of a process
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    with domains(layer, LABELS), domains(twin, LABELS):
        torch.testing.assert_close(compiled(x), layer(x))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_domains": 0}, "num_domains must be a whole number from 1 on, not 0"),
        ({"num_domains": 2.0}, "num_domains must be a whole number"),
        ({"num_domains": True}, "num_domains must be a whole number"),
        ({"num_domains": 2, "share_affine": False, "affine": False}, "share_affine=False needs"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeparateBatchNorm(3, **options)


def test_no_affine():
    layer = separate(3, 2, affine=False)
    with domains(layer, [0, 0, 1, 1]):
        y = layer(torch.randn(4, 3, 5))
    torch.testing.assert_close(y[:2].mean((0, 2)), torch.zeros(3), rtol=0, atol=1e-6)
    assert layer.weight is layer.bias is None


def test_repr_says_what_is_shared():
    assert "num_domains=3, share_statistics=False, share_population=True" in repr(
        separate(3, 3, (False, True, True))
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weights_of_a_domain_act_on_values_that_are_not_rounded_before(layout):
    """One rounding to half, of the output: 64 h - 64 is small where h is near 1."""
    layer = separate(3, 2, (True, True, False))
    torch.nn.init.constant_(layer.weight, 64.0)
    torch.nn.init.constant_(layer.bias, -64.0)
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with domains(layer, [0, 1] * 4):
        y = layer(lay_out(x, layout)).double()
    z = x.double()
    centered = z - z.mean((0, 2, 3), keepdim=True)
    rstd = (centered.square().mean((0, 2, 3), keepdim=True) + layer.eps).rsqrt()
    exact = 64 * centered * rstd - 64
    assert ((y - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
