"""Large means under the many elements of a real batch, where careless sums lose what is small."""

import pytest
import torch

from normlab import norms
from normlab.norms._moments import group_statistics
from normlab.population import estimate

IMAGES, FEATURES = (64, 16, 32, 32), (65536, 16)
EPS32 = torch.finfo(torch.float32).eps


def about(mean, shape, last):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean
    return x.contiguous(memory_format=torch.channels_last) if last else x


def moments(x):
    """Mean and biased variance per channel in float64."""
    others = [d for d in range(x.dim()) if d != 1]
    x = x.double()
    return x.mean(others), x.var(others, correction=0)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize(("shape", "last"), [(IMAGES, False), (IMAGES, True), (FEATURES, False)])
def test_estimates_know_the_spread_about_a_large_mean(shape, last, mean):
    """P41, P64: torch's batch norm has 9 to 1e5 for 1, in channels_last and (N, C) on a CPU."""
    x = about(mean, shape, last)
    expected_mean, expected_var = moments(x)
    for name, options in (("bn", {}), ("ghost", {"nbs": 8}), ("virtual", {})):
        layer = norms.find(name)(16, **options)
        found = estimate(layer, [x], estimator="pooled")[""]
        assert (found.mean - expected_mean).abs().max() < 4 * EPS32 * mean, name
        assert (found.var - expected_var).abs().max() < 0.02, name
    found_mean, found_var = group_statistics(x, 1)
    assert (found_mean[0] - expected_mean).abs().max() < 4 * EPS32 * mean
    assert (found_var[0] - expected_var).abs().max() < 0.02


@pytest.mark.parametrize("name", ["ghost", "renorm"])
@pytest.mark.parametrize("last", [False, True])
def test_chunks_are_normalized_about_a_large_mean(name, last):
    """P64: within the last places of the mean."""
    x = about(1e6, (16, *IMAGES[1:]), last)
    chunks = x.double().unflatten(0, (2, 8))
    others = (1, 3, 4)
    centered = chunks - chunks.mean(others, keepdim=True)
    expected = (centered / centered.square().mean(others, keepdim=True).sqrt()).flatten(0, 1)
    layer = norms.find(name)(
        16, nbs=8, **({"r_max": 1.0, "d_max": 0.0} if name == "renorm" else {})
    )
    assert (layer(x).double() - expected).abs().max() < 1e6 * EPS32


@pytest.mark.parametrize("mean", [0.0, 9.0])
def test_torch_s_error_about_ordinary_means_is_small(mean):
    """Up to ten spreads an estimate in channels_last keeps torch's sums, as its docstring says."""
    x = about(mean, (256, *IMAGES[1:]), last=True)
    expected_mean, expected_var = moments(x)
    found = estimate(norms.find("bn")(16), [x], estimator="pooled")[""]
    assert (found.mean - expected_mean).abs().max() < 1e-4 * max(1, mean)
    assert (found.var - expected_var).abs().max() < 1e-4
