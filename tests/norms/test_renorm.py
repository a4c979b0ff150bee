import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.moments import sets_per_channel, statistics
from oracles.population import after_chunks
from oracles.renorm import forward_backward
from torch import nn

from normlab.norms import BatchNorm, BatchRenorm, GhostBatchNorm
from normlab.norms.base import normalization
from normlab.population import EmaBank, estimate

from .checks import assert_values, numpy
from .inputs import LAYOUTS, cases, lay_out, random_affine

NOW = {"start": 0.0, "r_end": 0.0, "d_end": 0.0}
"""Final limits from the first forward on."""
OFF = {"r_max": 1.0, "d_max": 0.0, **NOW}
FREE = {"r_max": math.inf, "d_max": math.inf, **NOW}
PARTLY = {"r_max": 1.5, "d_max": 0.5, **NOW}


def moved(layer, seed=1):
    """The layer with running statistics that no batch of these tests has."""
    generator = torch.Generator().manual_seed(seed)
    c = layer.num_features
    layer.running_mean.copy_(torch.randn(c, generator=generator, dtype=torch.float64))
    layer.running_var.copy_(torch.rand(c, generator=generator, dtype=torch.float64) * 3 + 0.1)
    return layer


@pytest.mark.parametrize("limits", [OFF, PARTLY, FREE], ids=["off", "partly", "free"])
@pytest.mark.parametrize("nbs", [None, 4])
@cases()
def test_formula(shape, nbs, dtype, layout, limits):
    layer = BatchRenorm(6, nbs=nbs, eps=1e-2, **limits)
    layer = moved(layer.double() if dtype == torch.float64 else layer)
    random_affine(layer)
    torch.manual_seed(3)
    x = lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout).requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64).to(dtype)
    state = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    expected = forward_backward(
        *(numpy(value) for value in (x, dy, *state)),
        eps=layer.eps, nbs=nbs or len(x), r_limit=limits["r_max"], d_limit=limits["d_max"],
    )  # fmt: skip
    y = layer(x)
    y.backward(lay_out(dy, layout))
    assert y.dtype == dtype
    if layout == "channels_last" and len(shape) > 3:
        assert y.movedim(1, -1).is_contiguous()
    atol = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 4e-2}[dtype]
    assert_values((y, x.grad, layer.weight.grad, layer.bias.grad), expected, atol)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nbs", [None, 2, 4])
def test_without_correction_it_is_batch_norm_over_the_chunks(nbs, layout):
    torch.manual_seed(0)
    renorm = moved(BatchRenorm(3, nbs=nbs, **OFF).double())
    plain = BatchNorm(3) if nbs is None else GhostBatchNorm(3, nbs=nbs)
    plain = plain.double()
    plain.load_state_dict(renorm.state_dict(), strict=True)
    for layer in (renorm, plain):
        random_affine(layer)
    for _ in range(3):
        x, dy = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
        inputs = [lay_out(x, layout).requires_grad_() for _ in range(2)]
        outputs = [layer(v) for layer, v in zip((renorm, plain), inputs, strict=True)]
        for y in outputs:
            y.backward(dy)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(*(v.grad for v in inputs), rtol=0, atol=1e-12)
    for ours, theirs in zip(renorm.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(renorm.state_dict()[key], value, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.integers(1, 4),
    nbs=st.integers(2, 4),
    spatial=st.sampled_from([(), (3,), (2, 2), (2, 1, 2)]),
    layout=st.sampled_from(LAYOUTS),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_free_correction_is_population_forward_and_batch_backward(
    chunks, nbs, spatial, layout, affine, seed
):
    """The output is eval's at the same statistics; dx is not, and sums to 0 per chunk."""
    torch.manual_seed(seed)
    layer = moved(BatchRenorm(3, nbs=nbs, affine=affine, eps=1e-2, **FREE).double(), seed)
    random_affine(layer)
    shape = (chunks * nbs, 3, *spatial)
    x = lay_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64)
    with normalization(layer, statistics="population"):
        population = layer(x)
    (constant,) = torch.autograd.grad(population, x, dy)
    y = layer(x)
    torch.testing.assert_close(y, population, rtol=0, atol=1e-11)
    y.backward(dy)
    for chunk in x.grad.split(nbs):
        sums = chunk.transpose(0, 1).flatten(1).sum(1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-10)
    assert (x.grad - constant).abs().max() > 1e-3


def test_correction_acts_before_weight_and_bias():
    """P52: r and d are no part of the affine."""
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    layer = moved(BatchRenorm(3, **PARTLY).double())
    layer.update = False
    plain = layer(x)
    with torch.no_grad():
        layer.weight.fill_(2)
        layer.bias.fill_(3)
    torch.testing.assert_close(layer(x), 2 * plain + 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nbs", [None, 2])
def test_the_correction_uses_the_statistics_before_the_update(nbs):
    """P53: others read the running statistics that this very batch had already moved."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64) + 1
    layer = moved(BatchRenorm(3, nbs=nbs, decay=0.5, **FREE).double())
    before = copy.deepcopy(layer).eval()
    expected = before(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    assert not torch.equal(layer.running_mean, before.running_mean)


@pytest.mark.parametrize("nbs", [None, 2])
def test_eps_does_not_reach_the_running_variance(nbs):
    """P54: running_var follows the chunks' unbiased variances alone, for however large an eps."""
    torch.manual_seed(0)
    shape = (8, 3, 2, 2)
    layer = moved(BatchRenorm(3, nbs=nbs, eps=10.0, decay=0.7).double())
    mean, var = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    size = nbs or 8
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) + step
        layer(x)
        sets = sets_per_channel(shape, np.arange(8) // size)
        means, biased = (v.reshape(-1, 3) for v in statistics(x.numpy(), sets))
        mean, var = after_chunks("mean", (mean, var), means, biased, size * 4, 0.7)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-12)
    assert layer.num_batches_tracked == 3


def test_eval_uses_running_statistics_and_moves_nothing():
    """P53: others update in eval. P55: the state_dict is BatchNorm2d's, whatever the variant."""
    torch.manual_seed(0)
    layer = moved(BatchRenorm(3, nbs=4))
    random_affine(layer)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(layer.state_dict(), strict=True)
    for samples in (1, 3, 8):
        x = torch.randn(samples, 3, 4, 4)
        assert torch.equal(layer(x), plain(x))
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
    trained = nn.BatchNorm2d(3)
    trained(torch.randn(8, 3, 4, 4))
    layer.load_state_dict(trained.state_dict(), strict=True)
    assert layer.num_batches_tracked == 1


def test_two_forwards_before_one_backward():
    """P28: an update moves nothing that an earlier forward's gradient needs."""
    layer = moved(BatchRenorm(3, **PARTLY))
    x = torch.randn(2, 8, 3, 4, 4, requires_grad=True)
    (layer(x[0]).square().sum() + layer(x[1]).square().sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("nbs", [None, 2])
def test_estimates_and_observers_get_the_batchs_own_statistics(nbs):
    torch.manual_seed(0)
    x = torch.randn(12, 3, 4, 4)
    layer = moved(BatchRenorm(3, nbs=nbs, **PARTLY))
    before = copy.deepcopy(layer.state_dict())
    (values,) = estimate(layer, x.split(4), estimator="pooled").values()
    torch.testing.assert_close(values.mean, x.double().mean((0, 2, 3)), rtol=0, atol=1e-6)
    expected = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(values.var, expected, rtol=1e-6, atol=0)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())


def test_an_ema_bank_follows_the_buffers():
    layer = BatchRenorm(3, nbs=4, decay=0.8)
    bank = EmaBank(layer, [0.8])
    for step in range(4):
        layer(torch.randn(8, 3, 4, 4) + step)
    (values,) = bank.population(0.8).values()
    torch.testing.assert_close(values.mean.float(), layer.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(values.var.float(), layer.running_var, rtol=1e-5, atol=1e-6)


def test_group_size_replaces_the_chunks():
    torch.manual_seed(0)
    x = torch.randn(12, 3, 2, 2, dtype=torch.float64)
    layer = moved(BatchRenorm(3, nbs=4, **PARTLY).double())
    other = moved(BatchRenorm(3, nbs=6, **PARTLY).double())
    with normalization(layer, group_size=6):
        assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("nbs", [None, 4])
@pytest.mark.parametrize("statistics", ["batch", "population"])
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_combination_of_choices_runs_or_is_refused(nbs, statistics, update, training):
    """P50: chunks, correction, source and update compose, or say that they do not."""
    layer = moved(BatchRenorm(3, nbs=nbs, **PARTLY)).train(training)
    before = layer.running_mean.clone()
    layer.statistics, layer.update = statistics, update
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    if update and statistics == "population":
        with pytest.raises(ValueError, match="update=True"):
            layer(x)
    else:
        layer(x).square().sum().backward()
        assert x.grad.isfinite().all()
        assert torch.equal(before, layer.running_mean) is not update


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("nbs", [None, 4])
@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_large_means_keep_precision(offset, nbs, layout):
    """P64: the variance is taken of centered values, to the rounding of the input itself."""
    torch.manual_seed(0)
    x = lay_out(torch.randn(8, 3, 8, 8) + offset, layout)
    layer = BatchRenorm(3, nbs=nbs, decay=0.5)
    layer(x)
    chunks = x.double().split(nbs or 8)
    expected = torch.stack([c.var((0, 2, 3)) for c in chunks]).mean(0)
    error = (layer.running_var.double() - (0.5 + 0.5 * expected)).abs().max()
    assert error < 1e-6 * offset + 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("nbs", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_have_float32_statistics(dtype, nbs, layout):
    torch.manual_seed(0)
    x = lay_out((torch.randn(8, 3, 9, 9) * 300).to(dtype), layout).requires_grad_()
    for affine in (True, False):
        layer = BatchRenorm(3, nbs=nbs, affine=affine)
        seen = []
        layer.observers.append(seen.append)
        y = layer(x)
        y.sum().backward()
        assert y.dtype == dtype
        assert y.isfinite().all()
        assert seen[0].var.dtype == layer.running_var.dtype == torch.float32
        expected = x.detach().double().view(-1, nbs or 8, 3, 81).var((1, 3), correction=0)
        torch.testing.assert_close(seen[0].var.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("nbs", [None, 2])
def test_gradients_agree_with_numerical_ones(nbs):
    """With r and d at their limits, where they are constant; also gradients of gradients."""
    torch.manual_seed(0)
    layer = BatchRenorm(2, nbs=nbs, r_max=1.1, d_max=0.1, **NOW).double()
    layer.running_mean.fill_(5)
    layer.running_var.fill_(50)
    layer.update = False
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    values = x, layer.weight, layer.bias
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(lambda x: call(x, *values[1:]), x)


def test_copies_start_afresh_and_behave_alike():
    layer = BatchRenorm(3, nbs=4, **PARTLY)
    layer(torch.randn(8, 3, 4, 4))
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.running_var, twin.running_var)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nbs": 1}, "nbs=1 is instance norm"),
        ({"nbs": 0}, "nbs must be"),
        ({"nbs": 2.0}, "nbs must be"),
        ({"nbs": True}, "nbs"),
        ({"r_max": 0.9}, "r_max must be at least 1"),
        ({"r_max": math.nan}, "r_max must be at least 1"),
        ({"d_max": -0.1}, "d_max must be at least 0"),
        ({"start": -0.1}, "start must be at least 0"),
        ({"start": 0.3}, "d_end must be at least start=0.3"),
        ({"r_end": 0.01}, "r_end must be at least start=0.04"),
        ({"d_end": math.inf}, "d_end must be at least start=0.04 and finite"),
        ({"forwards": 0}, "forwards must be"),
        ({"forwards": 1.5}, "forwards must be"),
        ({"decay": 1.0}, "decay must be in"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(3, **arguments)


@pytest.mark.parametrize("samples", [10, 0, 1])
def test_a_bad_batch_is_refused_before_anything_changes(samples):
    """P8: also one element per channel, where there is nothing to normalize."""
    layer = BatchRenorm(3, nbs=4 if samples == 10 else None)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"batch of 10|empty batch|more than one element"):
        layer(torch.randn(samples, 3))
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())
