"""Parts of batches, as ranks read them: pixel by pixel what one process has there (P34)."""

import numpy as np
import pytest
import torch

from normlab.data.base import Dataset
from normlab.orders import Order


@pytest.mark.parametrize("places", [[4, 5, 6, 7], [0, 1, 4, 5]])
def test_a_part_of_a_training_batch_is_cut_from_the_whole(
    dataset: Dataset, places: list[int]
) -> None:
    """Cropped and mirrored as there."""
    options = {"batch_size": 8, "seed": 5, "epoch": 1}
    whole = dataset.train_batches(**options)
    part = dataset.train_batches(**options, places=places)
    for (x, y), (v, w) in zip(whole, part, strict=True):
        assert torch.equal(v, x[places])
        assert torch.equal(w, y[places])


@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
@pytest.mark.parametrize(("block", "unit"), [(8, 8), (8, 3), (5, 10), (1000, 4)])
def test_shares_make_the_whole(dataset: Dataset, ranks: int, block: int, unit: int) -> None:
    """In order and augmented as by one process; groups stay whole, and a share may be empty."""
    options = {"batch_size": block, "order": 2, "augment": True}
    xs, ys = zip(*dataset.eval_batches("train", **options), strict=True)
    parts = [
        list(dataset.eval_batches("train", **options, share=(rank, ranks), unit=unit))
        for rank in range(ranks)
    ]
    assert torch.equal(torch.cat([x for part in parts for x, _ in part]), torch.cat(xs))
    assert torch.equal(torch.cat([y for part in parts for _, y in part]), torch.cat(ys))
    sizes = np.array([sum(len(y) for _, y in part) for part in parts])
    assert (sizes.cumsum()[:-1] % unit == 0)[sizes.cumsum()[:-1] < len(torch.cat(ys))].all()
    units = -(-sizes // unit)
    assert units.max() - units.min() <= 1


def test_shares_of_the_first_samples_of_a_pattern(dataset: Dataset) -> None:
    options = {"batch_size": 6, "order": 1, "pattern": Order.parse("1x2"), "within": 2}
    whole = torch.cat([y for _, y in dataset.eval_batches("train", **options, samples=8)])
    shares = [
        [y for _, y in dataset.eval_batches("train", **options, samples=8, share=(r, 2), unit=2)]
        for r in range(2)
    ]
    assert torch.equal(torch.cat([y for share in shares for y in share]), whole)
