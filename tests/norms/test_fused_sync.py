"""Synchronized batch norm through the fused kernels, against float64 in one process."""

import pytest
import torch

from normlab import kernels

from .test_sync import SHAPES, check, in_one, on_rank, parts

pytestmark = pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())


def fused(rank, xs, dys, layout):
    forward = kernels._library.Kernels.forward
    calls = []
    with pytest.MonkeyPatch.context() as patch, kernels.use(True):
        patch.setattr(
            kernels._library.Kernels, "forward", lambda *a: (calls.append(1), forward(*a))
        )
        result = on_rank(rank, xs, dys, layout)
    return result | {"calls": len(calls)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", ["unequal", "positions", "empty", "2d", "5d"])
def test_is_the_batch_norm_of_all_elements(ranks, shapes, dtype, layout):
    """P19, P20: a rank without samples has no use for them, and takes part all the same."""
    xs, dys = parts(SHAPES[shapes], dtype)
    results = ranks.run(fused, xs, dys, layout)
    for result, x in zip(results, xs, strict=True):
        assert result.pop("calls") == (2 if len(x) else 0)
    tolerance = {torch.float32: 4e-5, torch.bfloat16: 4e-2}[dtype]
    check(results, in_one(xs, dys), tolerance, rtol=tolerance)
