import pytest
import torch
from oracles.moments import sets_per_sample
from torch import nn

from normlab.norms import LayerNorm

from .checks import check_against_formula
from .inputs import cases


@cases()
def test_formula(shape, dtype, layout):
    check_against_formula(LayerNorm(6), shape, sets_per_sample(shape, 1), dtype, layout)


def test_statistics_over_chw_and_affine_per_channel():
    """torch.nn.LayerNorm([C, H, W]) with its per-element affine constant in a channel."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 6)
    ours, theirs = LayerNorm(3), nn.LayerNorm([3, 5, 6])
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        ours.bias.copy_(torch.tensor([-1.0, 0.0, 4.0]))
        theirs.weight.copy_(ours.weight[:, None, None].expand(3, 5, 6))
        theirs.bias.copy_(ours.bias[:, None, None].expand(3, 5, 6))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    ours(torch.randn(2, 3, 9, 9))  # any size: the affine part is per channel


@pytest.mark.parametrize("samples", [1, 2])
def test_one_element_is_refused(samples):
    with pytest.raises(ValueError, match="more than one element per group"):
        LayerNorm(1)(torch.randn(samples, 1))
    LayerNorm(2)(torch.randn(samples, 2))
