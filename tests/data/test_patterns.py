"""Orders that know the labels: the pattern itself, how much of an epoch it holds, what it is a
function of, and its use in anybody's loader."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from normlab import data
from normlab.data import PatternedBatches, epoch_batches
from normlab.data.base import Dataset
from normlab.data.patterns import usable
from normlab.orders import Order


def most_groups(counts: list[int], order: Order) -> int:
    """Oracle: take a pack of each of the L fullest classes for as long as there are L."""
    packs = [n // order.samples for n in counts]
    groups = 0
    while True:
        packs.sort(reverse=True)
        if packs[order.labels - 1] == 0:
            return groups
        packs = [p - (i < order.labels) for i, p in enumerate(packs)]
        groups += 1


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_group_has_the_pattern_and_an_epoch_as_many_as_there_can_be(draws: st.DataObject):
    pattern = Order.parse(f"{draws.draw(st.integers(2, 4))}x{draws.draw(st.integers(1, 3))}")
    counts = draws.draw(st.lists(st.integers(pattern.samples, 14), min_size=4, max_size=7))
    per_batch = draws.draw(st.integers(1, 2))
    seed, epoch = draws.draw(st.integers(0, 9)), draws.draw(st.integers(0, 9))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)) + 7, counts))

    most = most_groups(counts, pattern)
    assert usable(labels, pattern) == most * pattern.group
    assume(most >= per_batch)
    size = per_batch * pattern.group
    batches = epoch_batches(labels, pattern, batch_size=size, seed=seed, epoch=epoch)
    assert batches.shape == (most // per_batch, size)
    assert len(np.unique(batches)) == batches.size, "a sample comes twice"
    assert 0 <= batches.min() <= batches.max() < len(labels)
    for group in batches.reshape(-1, pattern.group):
        count = Counter(labels[group].tolist())
        assert len(count) == pattern.labels
        assert set(count.values()) == {pattern.samples}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(40, 90), st.integers(2, 9), st.integers(0, 9))
def test_sorted_batches_are_the_shuffled_ones_sorted(
    size: int, n: int, classes: int, seed: int
) -> None:
    labels = np.random.default_rng(1).integers(0, classes, n)
    mixed, ordered = (
        epoch_batches(labels, Order.parse(order), batch_size=size, seed=seed, epoch=4)
        for order in ("shuffled", "sorted")
    )
    assert len(mixed) == n // size
    assert np.array_equal(np.sort(mixed, axis=1), np.sort(ordered, axis=1))
    assert np.array_equal(np.sort(labels[mixed], axis=1), labels[ordered])


def test_a_patterned_epoch_ends_as_it_began() -> None:
    """Large classes are not saved up for the end, nor the same ones always put together."""
    labels = np.repeat(np.arange(6), [90, 90, 60, 60, 30, 30])
    shares, together = [], Counter()
    for epoch in range(40):
        order = epoch_batches(labels, Order.parse("3x2"), batch_size=6, seed=0, epoch=epoch)
        assert len(order) == 60
        drawn = labels[order]
        shares.append([np.bincount(half.ravel(), minlength=6) for half in (drawn[:30], drawn[30:])])
        together.update(tuple(np.unique(group)) for group in drawn)
    first, second = np.mean(shares, axis=0)
    assert np.abs(first - second).max() < 3, (first, second)  # of 15 to 45; its error is below 1
    assert len(together) == 20, "not all triples of 6 labels occur"


def test_what_a_pattern_leaves_out_differs_from_epoch_to_epoch() -> None:
    labels = np.repeat(np.arange(4), [9, 9, 9, 40])
    seen = [
        set(epoch_batches(labels, Order.parse("2x2"), batch_size=4, seed=0, epoch=e).ravel())
        for e in range(30)
    ]
    assert all(len(epoch) == 48 for epoch in seen)
    assert set.union(*seen) == set(range(67))
    # 10 packs, 8 of them used: the two that are not are of any class.
    labels = np.repeat(np.arange(5), 4)
    used = [
        np.bincount(labels[epoch_batches(labels, Order.parse("2x2"), batch_size=8, seed=0, epoch=e)
                           .ravel()], minlength=5)
        for e in range(60)
    ]  # fmt: skip
    assert np.ptp(np.sum(used, axis=0)) < 40, "of 192 each; the error of one is 5"


def test_the_orders_are_frozen() -> None:
    # Another order would silently change every run's data under an unchanged id.
    labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    drawn = {
        spec: epoch_batches(labels, Order.parse(spec), batch_size=4, seed=100, epoch=3).tolist()
        for spec in ("shuffled", "sorted", "2x2")
    }
    assert drawn == {
        "shuffled": [[0, 2, 6, 4], [11, 1, 3, 5], [7, 10, 9, 8]],
        "sorted": [[0, 2, 6, 4], [1, 3, 5, 11], [7, 10, 9, 8]],
        "2x2": [[7, 5, 2, 1], [10, 9, 3, 0], [8, 11, 6, 4]],
    }


@pytest.mark.parametrize("spec", ["sorted", "2x2"])
def test_a_data_sets_epoch_follows_the_order_and_resumes_at_any_step(
    dataset: Dataset, spec: str
) -> None:
    order = Order.parse(spec)
    options = {"batch_size": 8, "seed": 5, "order": order}
    whole = list(dataset.train_batches(epoch=1, **options))
    positions = epoch_batches(dataset.labels("train"), order, batch_size=8, seed=5, epoch=1)
    assert len(whole) == len(positions) == dataset.train_size(order) // 8
    for (_, y), batch in zip(whole, positions, strict=True):
        assert y.tolist() == dataset.labels("train")[batch].tolist()
    for start in (1, len(whole) - 1):
        rest = dataset.train_batches(epoch=1, start_step=start, **options)
        for (x, y), (v, w) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, v)
            assert torch.equal(y, w)
    other = [y.tolist() for _, y in dataset.train_batches(epoch=2, **options)]
    assert other != [y.tolist() for _, y in whole]


def test_the_labels_are_those_of_the_batches(dataset: Dataset) -> None:
    for split in ("train", "val", "test"):
        read = torch.cat([y for _, y in dataset.eval_batches(split, batch_size=64, order=None)])
        assert read.tolist() == dataset.labels(split).tolist()
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        dataset.labels("tset")


LABELS = np.repeat(np.arange(5), [40, 30, 20, 50, 10])


@pytest.mark.parametrize("spec", ["shuffled", "sorted", "4x2"])
def test_ranks_share_each_batch_and_epochs_differ(spec: str) -> None:
    ranks = [
        PatternedBatches(LABELS, spec, batch_size=48, seed=3, rank=r, world_size=3)
        for r in range(3)
    ]
    epochs = []
    for epoch in (0, 1):
        for rank in ranks:
            rank.set_epoch(epoch)
        shares = [list(rank) for rank in ranks]
        assert [len(rank) for rank in ranks] == [len(share) for share in shares]
        assert [len(b) for share in shares for b in share] == [16] * 3 * len(ranks[0])
        together = [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)]
        alone = epoch_batches(LABELS, Order.parse(spec), batch_size=48, seed=3, epoch=epoch)
        assert together == alone.tolist()
        assert shares == [list(rank) for rank in ranks]  # the same (seed, epoch, rank) again
        epochs.append(together)
    assert epochs[0] != epochs[1]
    assert ranks[0].dropped == len(LABELS) - 48 * len(ranks[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_a_batch_sampler_of_anybodys_loader(workers: int) -> None:
    batches = PatternedBatches(torch.from_numpy(LABELS), "2x4", batch_size=16, seed=1)
    samples = TensorDataset(torch.arange(len(LABELS)), torch.from_numpy(LABELS))
    loader = DataLoader(samples, batch_sampler=batches, num_workers=workers)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    read = [(x.tolist(), y.tolist()) for x, y in loader]
    if workers == 0:
        assert np.array_equal(np.random.get_state()[1], before[1])
    assert [x for x, _ in read] == list(batches)
    assert len(loader) == len(read) == len(batches)
    assert all(sorted(Counter(y[:8]).values()) == [4, 4] for _, y in read)


@pytest.mark.parametrize(
    ("labels", "order", "options", "says"),
    [
        (
            LABELS,
            "6x2",
            {"batch_size": 36},
            "groups of 6 labels, and there are 5 classes",
        ),
        (
            LABELS + 3,
            "2x12",
            {"batch_size": 72},
            "12 samples of a label, and class 7 has 10",
        ),
        (LABELS, "4x3", {}, "batch_size=48 over world_size=3 leaves a rank no whole number of"),
        (LABELS, "shuffled", {"batch_size": 40}, "batch_size=40 over world_size=3"),
        (LABELS, "5x8", {"batch_size": 120}, "batch_size=120: order=5x8 can use 40 samples"),
        (LABELS, "sorted", {"batch_size": 153}, "batch_size=153: order=sorted can use 150"),
        (LABELS, "sorted", {"batch_size": 0}, "batch_size=0"),
        (LABELS, "sorted", {"batch_size": -3}, "batch_size=-3"),
        (LABELS, "4x2", {"rank": 3}, "rank=3 of world_size=3"),
        (LABELS, "4x2", {"rank": -1}, "rank=-1 of world_size=3"),
        (LABELS, "4x2", {"rank": 0, "world_size": 0}, "rank=0 of world_size=0"),
        (LABELS, "4x2", {"seed": -1}, "seed=-1"),
        (LABELS, "4by2", {}, "order must be shuffled, sorted or <labels>x<samples of each>"),
        (LABELS[:, None], "sorted", {}, "labels must be a list"),
        ([], "sorted", {}, "labels must be a list"),
    ],
)
def test_what_cannot_be_formed_is_refused_at_construction(
    labels: object, order: str, options: dict[str, int], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        PatternedBatches(labels, order, **({"batch_size": 48, "world_size": 3} | options))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "size", "says"),
    [
        ("11x1", 22, "order=11x1: groups of 11 labels"),
        ("5x2", 16, "batch_size=16 is no whole number of groups of 10"),
        ("10x64", 640, "class 2 has 51"),
        ("2x2", 1000, "batch_size=1000: synthetic has 504 training images for order=2x2"),
    ],
)
def test_a_data_set_refuses_at_the_call(
    load: Callable[..., Dataset], spec: str, size: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        load("synthetic").train_batches(batch_size=size, seed=0, epoch=0, order=Order.parse(spec))


def test_the_room_offers_them() -> None:
    assert {"PatternedBatches", "epoch_batches"} <= set(data.__all__)
