import pytest
import torch
from oracles.moments import sets_per_sample
from torch import nn

from normlab.norms import BatchNorm, InstanceNorm

from .checks import check_against_formula
from .inputs import LAYOUTS, SHAPES, cases, lay_out


@cases(shapes=SHAPES[1:])
def test_formula(shape, dtype, layout):
    layer = InstanceNorm(6, eps=1e-3)
    check_against_formula(layer, shape, sets_per_sample(shape, 6), dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch(layout):
    x = lay_out(torch.randn(4, 6, 5, 5, dtype=torch.float64), layout)
    theirs = nn.InstanceNorm2d(6, affine=True).double()
    torch.testing.assert_close(InstanceNorm(6).double()(x), theirs(x), rtol=0, atol=1e-12)


def test_is_batch_norm_of_one_sample():
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    expected = BatchNorm(6).double()(x)
    torch.testing.assert_close(InstanceNorm(6).double()(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1)])
def test_one_position_is_refused(samples, shape):
    with pytest.raises(ValueError, match="more than one element per group"):
        InstanceNorm(3)(torch.randn(samples, *shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5])
def test_large_means_keep_precision(layout, offset):
    shape = (4, 6, 8, 8)
    layer = InstanceNorm(6)
    check_against_formula(
        layer, shape, sets_per_sample(shape, 6), torch.float32, layout, offset=offset
    )
