"""Virtual batch norm, in both its definitions, against float64 formulas."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.population import ema
from oracles.virtual import followed, forward_only_samples, own_samples
from torch import nn

from normlab.norms import BatchNorm, VirtualBatchNorm, forward_only
from normlab.population import EmaBank, estimate

from .checks import numpy
from .inputs import LAYOUTS, SHAPES, lay_out, random_affine

EXTRA = 3  # of the 8 samples of a shape
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def state(layer):
    return copy.deepcopy(layer.state_dict())


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def made(shape, dtype, layout, offset=0.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    return lay_out(x.to(dtype), layout)


def check(definition, gradient, population, shape, dtype, layout, tolerance=None):
    layer = VirtualBatchNorm(
        shape[1], **{definition: EXTRA}, gradient=gradient, population=population
    )
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    exact = copy.deepcopy(layer).double()
    own = shape[0] - EXTRA
    z = made(shape, dtype, layout).requires_grad_()
    dy = made(shape, dtype, layout, seed=4)[:own]
    before = z.detach().clone()
    y = layer(z)
    y[:own].backward(dy)
    reference = z.detach().double().requires_grad_()
    expected = own_samples(
        reference, own, definition, gradient, exact.weight, exact.bias, exact.eps
    )
    expected.backward(dy.double())
    atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    atol = tolerance or atol[dtype]
    assert y.dtype == dtype
    assert torch.equal(z.detach(), before)
    if layout == "channels_last" and len(shape) > 3:
        assert y.movedim(1, -1).is_contiguous()
    for actual, wanted in (
        (y[:own], expected),
        (z.grad, reference.grad),
        (layer.weight.grad, exact.weight.grad),
        (layer.bias.grad, exact.bias.grad),
    ):
        scale = max(1.0, float(wanted.detach().abs().max()))
        torch.testing.assert_close(
            actual.detach().double(), wanted.detach(), rtol=0, atol=atol * scale
        )
    if gradient == "own":
        assert not z.grad[own:].any()
    # The forward-only samples: extra ones by the statistics of all, a reference by its own.
    values, affine = numpy(z), (numpy(layer.weight), numpy(layer.bias))
    y_virtual = forward_only_samples(values, own, definition, *affine, layer.eps)
    np.testing.assert_allclose(numpy(y[own:]), y_virtual, rtol=0, atol=atol * 4)
    mean, var = followed(values, own, population)
    np.testing.assert_allclose(numpy(layer.running_mean), ema(0, [mean], 0.9), rtol=0, atol=1e-6)
    np.testing.assert_allclose(numpy(layer.running_var), ema(1, [var], 0.9), rtol=0, atol=1e-5)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("population", ["all", "own"])
@pytest.mark.parametrize("gradient", ["own", "all"])
@pytest.mark.parametrize("definition", ["extra", "reference"])
def test_formula(definition, gradient, population, dtype, layout):
    """P1: y, dx, dweight, dbias, and both buffers by the named population rule."""
    check(definition, gradient, population, (8, 6, 4, 3), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("definition", ["extra", "reference"])
def test_shapes_and_layouts(definition, shape, layout):
    check(definition, "all", "all", shape, torch.float64, layout)
    check(definition, "own", "own", shape, torch.float64, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["own", "all"])
def test_extra_is_batch_norm_of_the_whole_batch_to_the_bit(gradient, layout, dtype):
    torch.manual_seed(0)
    layer, plain = VirtualBatchNorm(6, extra=EXTRA, gradient=gradient), BatchNorm(6)
    random_affine(layer)
    plain.load_state_dict(layer.state_dict())
    if dtype == torch.float64:
        layer, plain = layer.double(), plain.double()
    z = made((8, 6, 4, 3), dtype, layout).requires_grad_()
    w = lay_out(z.detach().clone(), layout).requires_grad_()
    y, expected = layer(z), plain(w)
    assert torch.equal(y, expected)
    assert same(state(layer), state(plain))
    y[:5].float().square().sum().backward()
    expected[:5].float().square().sum().backward()
    assert torch.equal(z.grad[:5], w.grad[:5])
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(z.grad[5:], w.grad[5:]) == (gradient == "all")


def test_without_forward_only_samples_it_is_batch_norm():
    torch.manual_seed(0)
    for layer, context in (
        (VirtualBatchNorm(6), 0),
        (VirtualBatchNorm(6, extra=2), 0),
        (VirtualBatchNorm(6, population="own"), None),
    ):
        plain = BatchNorm(6)
        x = torch.randn(8, 6, 3, 3, requires_grad=True)
        w = x.detach().clone().requires_grad_()
        if context is None:
            y = layer(x)
        else:
            with forward_only(layer, context):
                y = layer(x)
        expected = plain(w)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, w.grad)
        assert same(state(layer), state(plain))


@pytest.mark.parametrize("definition", ["extra", "reference"])
def test_nothing_is_learnt_from_the_outputs_of_forward_only_samples(definition):
    found = []
    for outputs in (5, 8):
        layer = VirtualBatchNorm(6, **{definition: 3}).double()
        z = made((8, 6, 4), torch.float64, "contiguous").requires_grad_()
        layer(z)[:outputs].pow(3).sum().backward()
        found.append((z.grad, layer.weight.grad, layer.bias.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("definition", ["extra", "reference"])
def test_what_follows_may_work_in_place(definition, layout):
    """As the ReLU after a norm does in torchvision's networks."""
    found = []
    for inplace in (False, True):
        layer = VirtualBatchNorm(6, **{definition: 3})
        z = made((8, 6, 4, 3), torch.float32, layout).requires_grad_()
        nn.ReLU(inplace=inplace)(layer(z * 1))[:5].square().sum().backward()
        found.append((z.grad, layer.weight.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (VirtualBatchNorm(3, extra=4), (4, 3, 2), "of which 4 are forward-only, has no other"),
        (VirtualBatchNorm(3, reference=8), (4, 3, 2), "of which 8 are forward-only, has no other"),
        (VirtualBatchNorm(3, reference=1), (4, 3), "in its reference batch: 1 samples"),
        (VirtualBatchNorm(3, extra=3, population="own"), (4, 3), "population='own' needs more"),
        (VirtualBatchNorm(3), (1, 3), "more than one element per group and channel"),
        (VirtualBatchNorm(3), (0, 3, 2), "empty batch"),
    ],
)
def test_what_has_no_statistics_is_refused_before_anything_changes(layer, shape, message):
    before = state(layer)
    with pytest.raises(ValueError, match=message) as caught:
        layer(torch.randn(shape))
    assert "\n" not in str(caught.value)
    assert same(state(layer), before)


def test_a_reference_of_none_is_refused():
    layer = VirtualBatchNorm(3, reference=2)
    with pytest.raises(ValueError, match="in its reference batch: 0"), forward_only(layer, 0):
        layer(torch.randn(4, 3, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": -1}, "extra must be a whole number from 0 on, not -1"),
        ({"reference": 1.5}, "reference must be a whole number from 0 on"),
        ({"extra": True}, "extra must be a whole number"),
        ({"extra": 1, "reference": 1}, "two definitions"),
        ({"gradient": "none"}, "gradient is one of"),
        ({"population": "reference"}, "population is one of"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VirtualBatchNorm(3, **options)


@pytest.mark.parametrize("population", ["all", "own"])
@pytest.mark.parametrize("options", [{"extra": 3}, {"reference": 3}])
class TestPopulation:
    def test_observers_get_what_the_population_follows(self, options, population):
        layer = VirtualBatchNorm(3, **options, population=population).double()
        seen = []
        layer.observers.append(seen.append)
        z = made((8, 3, 4), torch.float64, "contiguous", offset=2.0)
        layer(z)
        (batch,) = seen
        mean, var = followed(numpy(z), 5, population)
        np.testing.assert_allclose(numpy(batch.mean[0]), mean, atol=1e-12)
        np.testing.assert_allclose(numpy(batch.unbiased()[0]), var, atol=1e-12)
        assert batch.count == (8 if population == "all" else 5) * 4

    def test_watching_changes_nothing(self, options, population):
        layer = VirtualBatchNorm(3, **options, population=population)
        watched = copy.deepcopy(layer)
        bank = EmaBank(watched, [0.9])
        for seed in range(3):
            z = made((8, 3, 4), torch.float32, "contiguous", seed=seed)
            assert torch.equal(layer(z), watched(z))
        assert same(state(layer), state(watched))
        found = bank.population(0.9)[""]
        torch.testing.assert_close(found.var.float(), layer.running_var)

    def test_estimate(self, options, population):
        model = nn.Sequential(VirtualBatchNorm(3, **options, population=population)).double()
        batches = [made((8, 3, 4), torch.float64, "contiguous", seed=s) for s in range(3)]
        found = estimate(model, batches, estimator="pooled")["0"]
        kept = torch.cat([z if population == "all" else z[:5] for z in batches])
        torch.testing.assert_close(found.mean, kept.mean((0, 2)))
        torch.testing.assert_close(found.var, kept.var((0, 2), correction=0))
        grouped = estimate(model, batches, estimator="pooled", group_size=4)["0"]
        torch.testing.assert_close(grouped.mean, torch.cat(batches).mean((0, 2)))

    @pytest.mark.parametrize("update", [None, False, True])
    @pytest.mark.parametrize("source", [None, "batch", "population"])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_four_choices(self, options, population, training, source, update):
        """P50: every legal combination runs a step, the illegal one is refused by name."""
        layer = VirtualBatchNorm(3, **options, population=population).train(training)
        layer.statistics, layer.update = source, update
        uses_batch = source == "batch" or (source is None and training)
        before, x = state(layer), torch.randn(8, 3, 2)
        if update and not uses_batch:
            with pytest.raises(ValueError, match="update=True needs statistics='batch'"):
                layer(x)
            assert same(state(layer), before)
            return
        layer(x).sum().backward()
        moved = uses_batch and (training if update is None else update)
        assert same(state(layer), before) != moved


def test_group_size_takes_over():
    x = torch.randn(8, 3, 4)
    for options in ({"extra": 3}, {"reference": 3}):
        layer, plain = VirtualBatchNorm(3, **options), BatchNorm(3)
        layer.group_size = plain.group_size = 4
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("options", [{"extra": 3}, {"reference": 3}])
@pytest.mark.parametrize("population", ["all", "own"])
def test_large_means_keep_precision(population, options, layout):
    """P64: a mean of 1e4 and a spread of 1 in float32."""
    x = made((8, 3, 8, 8), torch.float32, layout, offset=1e4)
    layer = VirtualBatchNorm(3, **options, population=population)
    exact = copy.deepcopy(layer).double()
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0, atol=1e-2)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-2, atol=0)


@pytest.mark.parametrize("options", [{"extra": 3}, {"reference": 3}])
@pytest.mark.parametrize("affine", [True, False])
def test_half_precision_keeps_float32_statistics(options, affine):
    """P65: float16 inputs of size 300 do not overflow."""
    x = (torch.randn(8, 3, 6, 6) + 300).half()
    layer = VirtualBatchNorm(3, **options, population="own", affine=affine)
    exact = copy.deepcopy(layer).double()
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0, atol=1e-2)
    assert layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-3, atol=0)


def test_state_moves_between_batch_norms():
    """P15: the layout is torch's; copies are independent."""
    layer = VirtualBatchNorm(3, reference=2)
    layer(torch.randn(6, 3, 2))
    plain = nn.BatchNorm2d(3)
    plain.load_state_dict(layer.state_dict(), strict=True)
    other = VirtualBatchNorm(3, extra=2)
    other.load_state_dict(plain.state_dict(), strict=True)
    assert same(state(other), state(layer))
    twin, x = copy.deepcopy(layer), torch.randn(6, 3, 2)
    assert torch.equal(twin(x), layer(x))
    assert same(state(twin), state(layer))


@settings(max_examples=30, deadline=None)
@given(
    own=st.integers(1, 4),
    virtual=st.integers(1, 4),
    spatial=st.sampled_from([(2,), (2, 2), (1, 3)]),
    definition=st.sampled_from(["extra", "reference"]),
    seed=st.integers(0, 1000),
)
def test_statistics_of_the_output(own, virtual, spatial, definition, seed):
    """The definition on the output: what was normalized together has mean 0 and variance 1."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(own + virtual, 2, *spatial, generator=generator, dtype=torch.float64)
    layer = VirtualBatchNorm(2, **{definition: virtual}, eps=1e-12).double()
    y = layer(z)
    among = y if definition == "extra" else y[own:]
    flat = among.movedim(1, 0).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(2).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(flat.var(1, correction=0), torch.ones(2).double())


@pytest.mark.parametrize("options", [{"extra": 2}, {"reference": 2}])
def test_gradcheck(options):
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    layer = VirtualBatchNorm(2, **options, gradient="all").double()
    assert torch.autograd.gradcheck(layer, x)
    layer.gradient = "own"  # of one layer, v is constant to x anyway
    v = torch.randn(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: layer(torch.cat([x[:3], v]))[:3], x)


def test_repr_says_which_definition():
    assert "extra=2, gradient=own, population=all" in repr(VirtualBatchNorm(3, extra=2))
    assert "reference=2, gradient=all" in repr(VirtualBatchNorm(3, reference=2, gradient="all"))
