import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.moments import sets_per_sample
from torch import nn

from normlab.norms import GroupNorm, InstanceNorm, LayerNorm

from .checks import check_against_formula
from .inputs import LAYOUTS, cases, lay_out


@pytest.mark.parametrize("groups", [1, 2, 3])
@cases()
def test_formula(shape, groups, dtype, layout):
    layer = GroupNorm(6, groups=groups, eps=1e-2)  # (8, 6): as few as two values in a group
    y = check_against_formula(layer, shape, sets_per_sample(shape, groups), dtype, layout)
    if layout == "channels_last" and len(shape) > 3:
        assert y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(layout, affine):
    torch.manual_seed(0)
    ours, theirs = GroupNorm(6, groups=3, affine=affine), nn.GroupNorm(3, 6, affine=affine)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = lay_out(torch.randn(4, 6, 5, 5), layout)
    torch.testing.assert_close(ours(x), theirs(x.contiguous()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_group_is_layer_norm_and_c_groups_are_instance_norm(layout):
    x = lay_out(torch.randn(4, 6, 5, 3, dtype=torch.float64), layout)
    one = GroupNorm(6, groups=1, affine=False)(x)
    torch.testing.assert_close(one, F.layer_norm(x, x.shape[1:]), rtol=0, atol=1e-12)
    torch.testing.assert_close(one, LayerNorm(6, affine=False)(x), rtol=0, atol=0)
    each = GroupNorm(6, groups=6, affine=False)(x)
    torch.testing.assert_close(each, F.instance_norm(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(each, InstanceNorm(6, affine=False)(x), rtol=0, atol=0)
    assert (one - each).abs().max() > 0.1


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    width=st.integers(1, 3),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    seed=st.integers(0, 1000),
)
def test_samples_are_independent(groups, width, layout, seed):
    """y_i and dx_i do not change with the other samples; permuting the batch permutes y."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 5, groups * width, 3, 2, generator=generator, dtype=torch.float64)
    x, dy = drawn
    layer = GroupNorm(groups * width, groups=groups).double()

    def both(x, dy):
        leaf = lay_out(x, layout).detach().requires_grad_()
        y = layer(leaf)
        return torch.stack([y.detach(), *torch.autograd.grad(y, leaf, dy)])

    found = both(x, dy)
    order = torch.randperm(5, generator=generator)
    torch.testing.assert_close(both(x[order], dy[order]), found[:, order], rtol=0, atol=1e-13)
    other = drawn.clone()
    other[:, 1:] = 100 * torch.randn(2, 4, *x.shape[1:], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(both(*other)[:, 0], found[:, 0], rtol=0, atol=1e-13)
    torch.testing.assert_close(both(x[:1], dy[:1])[:, 0], found[:, 0], rtol=0, atol=1e-13)


def test_permuting_channels_within_a_group_only():
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    layer = GroupNorm(6, groups=2, affine=False)
    y = layer(x)
    within, across = [2, 0, 1, 3, 5, 4], [3, 1, 2, 0, 4, 5]
    torch.testing.assert_close(layer(x[:, within]), y[:, within], rtol=0, atol=1e-12)
    assert (layer(x[:, across]) - y[:, across]).abs().max() > 0.05


def test_same_in_train_and_eval():
    layer, x = GroupNorm(6, groups=2), torch.randn(3, 6, 4)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_channels_per_group():
    assert GroupNorm(6, channels_per_group=3).num_groups == 2
    assert GroupNorm(6, groups=3).num_groups == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of groups and channels_per_group"),
        ({"groups": 2, "channels_per_group": 8}, "exactly one of groups and channels_per_group"),
        ({"groups": 32}, "GroupNorm: 16 channels are not divisible by groups=32"),
        ({"channels_per_group": 5}, "16 channels are not divisible by channels_per_group=5"),
        ({"groups": 0}, "groups must be .* not 0"),
        ({"groups": -4}, "groups must be .* not -4"),
    ],
)
def test_bad_groups_are_refused(arguments, message):
    """P72: at construction; groups and channels per group are two options, of which one."""
    with pytest.raises(ValueError, match=message):
        GroupNorm(16, **arguments)


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_one_element_is_refused_for_any_number_of_samples(samples):
    with pytest.raises(ValueError, match="more than one element per group"):
        GroupNorm(3, groups=3)(torch.randn(samples, 3))
    with pytest.raises(ValueError, match="more than one element per group"):
        GroupNorm(3, groups=3)(torch.randn(samples, 3, 1, 1))


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"GroupNorm\(4\) got 6 channels"):
        GroupNorm(4, groups=2)(torch.randn(2, 6, 3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5])
def test_large_means_keep_precision(layout, offset):
    """torch's own channels_last group norm on a CPU is off by 1000 at a mean of 1e4."""
    shape = (8, 6, 4, 4)
    layer = GroupNorm(6, groups=2)
    check_against_formula(
        layer, shape, sets_per_sample(shape, 2), torch.float32, layout, offset=offset
    )


def test_gradcheck_channels_last():
    torch.manual_seed(0)
    layer = GroupNorm(4, groups=2).double()
    x = lay_out(torch.randn(2, 4, 3, 2, dtype=torch.float64), "channels_last").requires_grad_()
    assert torch.autograd.gradcheck(layer, x)


def test_autocast_keeps_the_input_dtype():
    x = torch.randn(4, 6, 5, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert GroupNorm(6, groups=2)(x).dtype == torch.bfloat16
