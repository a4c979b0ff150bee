"""Images of several domains, as every kind of data set delivers them (2 s)."""

import numpy as np
import pytest
import torch

from normlab.data.base import Dataset, half, in_turn, numbers
from normlab.data.corruptions import corrupt
from normlab.data.synthetic import load
from normlab.domains import CLEAN, Domain
from normlab.orders import Order

DARK, NOISY = Domain("invert", 5), Domain("gaussian_noise", 5)


def everything(dataset: Dataset, split: str = "train", **options):
    batches = dataset.eval_batches(split, batch_size=7, order=None, **options)
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


def pixels(dataset: Dataset, x):
    """Normalized images back on a scale of 0 to 255, by what black and white have become."""
    low, high = (everything_of(dataset, value) for value in (0, 255))
    return (255 * (x - low) / (high - low)).round()


def everything_of(dataset, value):
    finish = dataset._scale, dataset._shift
    return (value * finish[0] + finish[1]).view(-1, 1, 1)


def test_a_domain_shows_the_corrupted_pixels_of_the_same_images():
    dataset = load("", seed=0, n=40)
    x, y = everything(dataset, "val")
    before = pixels(dataset, x).to(torch.uint8)
    for domain in (DARK, NOISY):
        shown, labels = everything(dataset, "val", domains=[domain])
        assert torch.equal(labels, y)
        expected = corrupt(before, domain, numbers("val", np.arange(10)))
        assert torch.equal(pixels(dataset, shown), expected.float())


def test_every_kind_of_data_set_corrupts(dataset: Dataset):
    """As one process and in parts, and the same whenever it is asked."""
    x, _ = everything(dataset)
    noisy, _ = everything(dataset, domains=[NOISY])
    assert torch.equal(everything(dataset, domains=[NOISY])[0], noisy)
    assert not torch.equal(noisy, x)
    assert torch.equal(everything(dataset, domains=[CLEAN])[0], x)
    inverted, _ = everything(dataset, domains=[Domain("invert", 1)])
    flat = torch.stack([x.flatten(), inverted.flatten()])
    assert torch.corrcoef(flat)[0, 1] < -0.5


def test_a_training_batch_has_its_domains_in_turn(dataset: Dataset):
    """Each image in its own, always the same one; a part of a batch as in the whole."""
    options = {"batch_size": 6, "seed": 1, "domains": [CLEAN, DARK, NOISY]}
    n = dataset.size("train")
    seen: dict[int, set[int]] = {}
    for epoch in range(2):
        batches = list(dataset.train_batches(**options, epoch=epoch))
        assert len(batches) == n // 3 * 3 // 6
        parts = list(dataset.train_batches(**options, epoch=epoch, places=[4, 1]))
        for (x, _), (part, _) in zip(batches, parts, strict=True):
            assert torch.equal(part, x[[4, 1]])
    plan = _planned(dataset, **options, epoch=0)
    for part in plan:
        assert part.domains == (CLEAN, DARK, NOISY) * 2
        for place, image in enumerate(part.images):
            seen.setdefault(int(image), set()).add(place % 3)
    assert all(domains == {image % 3} for image, domains in seen.items())


def _planned(dataset, **options):
    kept = []
    dataset._batches = lambda _, plan, **__: kept.extend(plan) or iter(())
    try:
        dataset.train_batches(**options)
    finally:
        del dataset._batches
    return kept


def test_with_one_domain_the_batches_are_those_without_any(dataset: Dataset):
    options = {"batch_size": 6, "seed": 1, "epoch": 0}
    for (x, y), (v, w) in zip(
        dataset.train_batches(**options),
        dataset.train_batches(**options, domains=[CLEAN]),
        strict=True,
    ):
        assert torch.equal(x, v)
        assert torch.equal(y, w)


def test_several_domains_of_an_evaluation_are_in_turn_whatever_the_blocks(dataset: Dataset):
    options = {"order": 3, "domains": [CLEAN, DARK, NOISY], "drop_last": False}
    small = torch.cat([x for x, _ in dataset.eval_batches("train", batch_size=4, **options)])
    large = torch.cat([x for x, _ in dataset.eval_batches("train", batch_size=64, **options)])
    assert torch.equal(small, large)
    assert len(small) == dataset.size("train") // 3 * 3


@pytest.mark.parametrize("size", [1, 2, 9, 300])
def test_halves_part_a_split(size):
    first, second = half(size, 0), half(size, 1)
    assert sorted([*first, *second]) == list(range(size))
    assert len(second) - len(first) == size % 2
    assert (np.diff(first) > 0).all()


def test_halves_do_not_know_the_classes():
    """Stored by class, each half still has about half of every class."""
    labels = np.repeat(np.arange(10), 100)
    counts = np.bincount(labels[half(1000, 0)])
    assert counts.min() > 30
    assert counts.max() < 70


def test_a_part_of_a_split_is_read_alone(dataset: Dataset):
    n = dataset.size("test")
    x, y = everything(dataset, "test")
    for which in (0, 1):
        part, labels = everything(dataset, "test", part=which)
        where = half(n, which)
        assert torch.equal(labels, y[where])
        assert torch.allclose(part, x[where])


def test_images_that_do_not_fit_are_left_over():
    assert in_turn(np.array([4, 1, 0, 2, 3]), 2).tolist() == [4, 1, 0, 3]
    assert in_turn(np.array([4, 1, 0]), 1).tolist() == [4, 1, 0]


def test_what_cannot_be_shown_is_refused():
    dataset = load("", seed=0, n=40)
    options = {"batch_size": 4, "seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match="order=sorted does not go with 2 domains"):
        dataset.train_batches(**options, domains=[CLEAN, DARK], order=Order("sorted"))
    dataset.corrupts = False
    dataset.train_batches(**options, domains=[CLEAN])
    for batches in (
        lambda: dataset.train_batches(**options, domains=[CLEAN, DARK]),
        lambda: dataset.eval_batches("val", batch_size=2, order=None, domains=[DARK]),
    ):
        with pytest.raises(ValueError, match=r"images as they are stored, not as invert-5"):
            batches()
