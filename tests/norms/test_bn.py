import copy

import numpy as np
import pytest
import torch
from oracles.moments import sets_per_channel
from oracles.population import ema
from torch import nn

from normlab.norms import BatchNorm
from normlab.population import EmaBank

from .checks import check_against_formula
from .inputs import LAYOUTS, cases, lay_out

TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@cases()
def test_formula(shape, dtype, layout):
    sets = sets_per_channel(shape, np.zeros(8, int))
    check_against_formula(BatchNorm(6), shape, sets, dtype, layout)


@pytest.mark.parametrize(
    ("affine", "observed"), [(True, False), (True, True), (False, False), (False, True)]
)
@cases()
def test_bitwise_torch(shape, dtype, layout, affine, observed):
    """Outputs, gradients and buffers over three steps and an evaluation, observed or not."""
    torch.manual_seed(0)
    ours = BatchNorm(6, decay=0.9, affine=affine)
    theirs = TORCH[len(shape)](6, momentum=0.1, affine=affine)
    if dtype == torch.float64:
        ours.double()
        theirs.double()
    if observed:
        ours.observers.append([].append)
    for _ in range(3):
        x = lay_out(torch.randn(shape).to(dtype), layout)
        dy = torch.randn(shape).to(dtype)
        results = []
        for layer in (ours, theirs):
            leaf = x.detach().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
            assert y.stride() == results[0][0].stride()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert_same_state(ours.state_dict(), theirs.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(("learning", "update"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_which_forwards_are_torch_s_to_the_bit(layout, learning, update):
    """All that update or compute gradients; the others in the layouts that have one route."""
    torch.manual_seed(0)
    x = lay_out(torch.randn(8, 6, 9, 9), layout)
    ours, theirs = BatchNorm(6), nn.BatchNorm2d(6)
    ours.update = update
    with torch.set_grad_enabled(learning):
        y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(y, expected) or not (learning or update or layout == "channels_last")


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("affine", [False, True])
def test_state_dict_moves_to_and_from_torch(affine):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(4, affine=affine), nn.BatchNorm2d(4, affine=affine)
    theirs(torch.randn(8, 4, 3, 3))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    ours(torch.randn(8, 4, 3, 3))
    fresh = nn.BatchNorm2d(4, affine=affine)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(fresh.state_dict(), ours.state_dict())


def test_running_average_closed_form():
    """P1, P2: t equal batches leave (1 - d^t) of theirs, of the unbiased variance."""
    x = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    layer = BatchNorm(1, decay=0.8).double()
    for _ in range(7):
        layer(x)
    assert layer.running_mean.item() == pytest.approx(ema(0, [2.5] * 7, 0.8), rel=1e-12)
    unbiased = 4.5  # ((1 - 2.5)^2 + (4 - 2.5)^2) / (2 - 1); the biased one is half of it
    assert layer.running_var.item() == pytest.approx(ema(1, [unbiased] * 7, 0.8), rel=1e-12)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cumulative_is_torch_s_to_the_bit(dtype, layout, observed):
    """P5: momentum=None, continued from torch's state; the plain average of the batches'."""
    torch.manual_seed(0)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    ours, theirs = BatchNorm(6, cumulative=True).to(kind), nn.BatchNorm2d(6, momentum=None).to(kind)
    batches = [(torch.randn(8, 6, 4, 3) * (t + 1)).to(dtype) for t in range(5)]
    theirs(batches[0])
    ours.load_state_dict(theirs.state_dict())
    if observed:
        ours.observers.append([].append)
    for x in batches[1:]:
        laid = lay_out(x, layout)
        assert torch.equal(ours(laid), theirs(laid))
        assert_same_state(ours.state_dict(), theirs.state_dict())
    ours.update = False
    ours(batches[0])
    assert_same_state(ours.state_dict(), theirs.state_dict())
    means = torch.stack([x.double().mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.double().var((0, 2, 3)) for x in batches])
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(ours.running_mean.double(), means.mean(0), rtol=rtol, atol=1e-6)
    torch.testing.assert_close(ours.running_var.double(), variances.mean(0), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 2, 4])
def test_cumulative_over_groups_averages_them(group_size):
    torch.manual_seed(0)
    layer = BatchNorm(3, cumulative=True).double()
    layer.group_size = group_size
    batches = torch.randn(4, 8, 3, 5, dtype=torch.float64)
    for x in batches:
        layer(x)
    groups = batches.reshape(-1, group_size or 8, 3, 5)
    assert layer.num_batches_tracked == 4
    torch.testing.assert_close(layer.running_mean, groups.mean((1, 3)).mean(0))
    torch.testing.assert_close(layer.running_var, groups.var((1, 3)).mean(0))


def test_a_bank_of_running_averages_beside_a_cumulative_one():
    """An EmaBank follows its own decays, whatever the layer's rule for its buffers."""
    layer, twin = BatchNorm(3, cumulative=True), BatchNorm(3, decay=0.5)
    bank = EmaBank(layer, [0.5])
    for _ in range(3):
        x = torch.randn(8, 3, 4)
        layer(x)
        twin(x)
    (followed,) = bank.population(0.5).values()
    torch.testing.assert_close(followed.mean.float(), twin.running_mean)
    torch.testing.assert_close(followed.var.float(), twin.running_var)
    assert not torch.allclose(layer.running_var, twin.running_var)


def test_eval_row_is_independent_of_its_batch():
    torch.manual_seed(0)
    layer = BatchNorm(4)
    layer(torch.randn(16, 4, 5, 5))
    layer.eval()
    x = torch.randn(8, 4, 5, 5)
    assert all(torch.equal(layer(x)[i : i + 1], layer(x[i : i + 1])) for i in range(8))


def test_decay_twin():
    assert BatchNorm(2, decay=0.9).momentum == 0.1
    assert BatchNorm(2, decay=0.99).momentum == 0.01


@pytest.mark.parametrize("decay", [1, 1.0, -0.1, 1.5, float("nan")])
def test_decay_out_of_range_is_refused(decay):
    """P4: statistics that never move are frozen ones, by name."""
    with pytest.raises(ValueError, match="decay must be in"):
        BatchNorm(2, decay=decay)


def test_a_torch_momentum_as_decay_warns_once():
    """P3: torch's 0.1 as a decay would keep almost only the last batch."""
    with pytest.warns(UserWarning, match=r"decay=0\.1") as caught:
        BatchNorm(2, decay=0.1)(torch.randn(4, 2))
    assert len(caught) == 1


def test_there_is_no_momentum_argument():
    with pytest.raises(TypeError, match="momentum"):
        BatchNorm(2, momentum=0.1)


@pytest.mark.parametrize("eps", [0, -1e-5])
def test_eps_must_be_positive(eps):
    with pytest.raises(ValueError, match="eps"):
        BatchNorm(2, eps=eps)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), "2 to 5 dimensions"),
        ((4, 3, 2, 2), "got 3 channels"),
        ((1, 2), "more than one element"),
        ((1, 2, 1, 1), "more than one element"),
        ((0, 2, 4, 4), "empty batch"),
    ],
)
def test_bad_input_changes_nothing(shape, message):
    layer = BatchNorm(2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))
    assert_same_state(layer.state_dict(), before)


def test_autocast_keeps_statistics_in_float32():
    torch.manual_seed(0)
    layer, conv = BatchNorm(4), nn.Conv2d(3, 4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = conv(torch.randn(8, 3, 9, 9))
        y = layer(x)
    assert x.dtype == y.dtype == torch.bfloat16
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    mean = x.double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * mean, rtol=1e-5, atol=1e-7)


def test_half_precision_without_affine_or_update_keeps_float32_statistics():
    x = torch.randn(16, 4, 9, 9).bfloat16()
    layer, updating = BatchNorm(4, affine=False), BatchNorm(4, affine=False)
    layer.update = False
    seen = []
    layer.observers.append(seen.append)
    assert torch.equal(layer(x), updating(x))
    expected = x.double().mean((0, 2, 3))
    torch.testing.assert_close(seen[0].mean[0].double(), expected, rtol=1e-5, atol=1e-7)


def test_float16_does_not_overflow():
    x = (torch.randn(8, 4, 9, 9) + 300).half()
    layer = BatchNorm(4)
    assert layer(x).isfinite().all()
    expected = 0.9 + 0.1 * x.double().var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("group_size", [2, 4])
def test_group_size_overrides_the_batch(group_size):
    """Each consecutive group normalized with its own statistics; one step towards their average."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    layer = BatchNorm(3).double()
    layer.group_size = group_size
    y = layer(x)
    parts = [nn.BatchNorm2d(3).double() for _ in range(8 // group_size)]
    chunks = x.split(group_size)
    expected = torch.cat([part(chunk) for part, chunk in zip(parts, chunks, strict=True)])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for name in ("running_mean", "running_var"):
        average = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(getattr(layer, name), average, rtol=0, atol=1e-12)
    assert layer.num_batches_tracked == 1
