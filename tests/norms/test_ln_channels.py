import pytest
import torch
from oracles.moments import sets_per_position
from torch import nn

from normlab.norms import ChannelsLayerNorm, LayerNorm

from .checks import check_against_formula
from .inputs import cases, lay_out


@cases()
def test_formula(shape, dtype, layout):
    layer = ChannelsLayerNorm(6, eps=1e-2)
    y = check_against_formula(layer, shape, sets_per_position(shape), dtype, layout)
    if layout == "channels_last":
        assert y.movedim(1, -1).is_contiguous()
    if layout == "contiguous":
        assert y.is_contiguous()


def test_torch_layer_norm_of_the_channels():
    x = torch.randn(4, 6, 5, 3)
    theirs = nn.LayerNorm(6)
    ours = ChannelsLayerNorm(6)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x.movedim(1, -1)).movedim(-1, 1))


def test_positions_do_not_see_each_other():
    """P68: unlike `ln`, which it is where there is one position."""
    x = torch.randn(2, 6, 3, 3)
    other = x.clone()
    other[:, :, 1:] = torch.randn(2, 6, 2, 3)
    for layer, independent in ((ChannelsLayerNorm(6), True), (LayerNorm(6), False)):
        assert torch.equal(layer(x)[:, :, 0], layer(other)[:, :, 0]) is independent
    torch.testing.assert_close(ChannelsLayerNorm(6)(x[..., :1, :1]), LayerNorm(6)(x[..., :1, :1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_half_inputs_of_300(dtype, affine):
    x = (300 * torch.randn(4, 8, 3, 3)).to(dtype)
    y = ChannelsLayerNorm(8, affine=affine)(x)
    assert y.dtype == dtype
    expected = nn.functional.layer_norm(x.double().movedim(1, -1), (8,)).movedim(-1, 1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5])
def test_large_means_keep_precision(layout, offset):
    shape = (4, 32, 3, 3)
    layer = ChannelsLayerNorm(32)
    sets = sets_per_position(shape)
    check_against_formula(layer, shape, sets, torch.float32, layout, offset=offset)


def test_one_channel_and_wrong_channels_are_refused():
    """P8: at one channel every value would become the bias."""
    with pytest.raises(ValueError, match="at least 2 channels"):
        ChannelsLayerNorm(1)
    with pytest.raises(ValueError, match="got 3 channels"):
        ChannelsLayerNorm(4)(lay_out(torch.randn(2, 3, 4, 4), "contiguous"))
