"""Accumulations, and what becomes of several: the whole."""

import pytest
import torch
from oracles.population import mean_of_batches
from populations import assert_statistics, exact

from normlab.population.accumulate import Mean, Pooled


@pytest.mark.parametrize("kind", [Pooled, Mean])
def test_parts_of_unequal_size_merge_into_the_whole(kind):
    """P36: processes that each saw a part of the data end with the statistics of all of it."""
    x = 3 + torch.randn(64, 3, dtype=torch.float64) * torch.arange(1, 65).view(-1, 1)

    def add(accumulation, parts):
        for part in parts:
            mean, var = (torch.from_numpy(value)[None] for value in exact(part))
            counts = torch.full((1, 1), len(part), dtype=torch.float64)
            accumulation.add(mean, var, counts, len(part))
        return accumulation

    like = torch.zeros(3)
    parts = x.split([2, 30, 4, 8, 20])
    mean, var = exact(x)
    if kind is Mean:
        mean, var = mean_of_batches([part.numpy() for part in parts])
    ranks = [add(kind(like), parts[:1]), add(kind(like), []), add(kind(like), parts[1:])]
    merged, loaded = kind(like), add(kind(like), parts)
    for rank in ranks:
        merged.merge(rank)
    loaded.load(torch.stack([rank.state() for rank in ranks]))
    for result in (merged.result(), loaded.result()):
        assert_statistics(result, mean, var, rtol=1e-13)
        assert result.count == 64


@pytest.mark.parametrize("kind", [Pooled, Mean])
def test_nothing_and_nothing_is_nothing(kind):
    nothing = kind(torch.zeros(3))
    nothing.merge(kind(torch.zeros(3)))
    assert nothing.result() is None
