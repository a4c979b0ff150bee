"""The contract of a data set, on every kind of it, and the random streams."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from normlab import data
from normlab.data.base import (
    SPLITS,
    Batch,
    Dataset,
    balanced,
    subset_of,
)
from normlab.data.streams import Stream, generator


def assert_same(one: Iterable[Batch], other: Iterable[Batch]) -> None:
    for (x, y), (v, w) in zip(one, other, strict=True):
        assert torch.equal(x, v)
        assert torch.equal(y, w)


def fingerprints(x: Tensor) -> list[bytes]:
    return [image.contiguous().numpy().tobytes() for image in x]


def epoch(dataset: Dataset, *, seed: int = 5, epoch: int = 1, start_step: int = 0) -> list[Batch]:
    return list(dataset.train_batches(batch_size=8, seed=seed, epoch=epoch, start_step=start_step))


def test_every_split_has_the_promised_shape_and_types(dataset: Dataset) -> None:
    for split in SPLITS:
        x, y = next(dataset.eval_batches(split, batch_size=2, order=None))
        assert x.shape == (2, *dataset.shape)
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert 0 <= int(y.min()) <= int(y.max()) < dataset.num_classes
    assert len(dataset.digest) == 16
    assert int(dataset.digest, 16) >= 0


def test_an_epoch_resumes_at_any_step_with_the_same_bits(dataset: Dataset) -> None:
    whole = epoch(dataset)
    assert len(whole) == dataset.size("train") // 8
    for start in (0, 1, len(whole) - 1, len(whole)):
        assert_same(epoch(dataset, start_step=start), whole[start:])


def test_order_depends_on_seed_and_epoch(dataset: Dataset) -> None:
    labels = [
        torch.cat([y for _, y in epoch(dataset, seed=s, epoch=e)]).tolist()
        for s, e in ((5, 1), (5, 2), (6, 1))
    ]
    assert labels[0] != labels[1] != labels[2] != labels[0]


def test_no_global_generator_is_touched_and_evaluation_changes_no_training(
    dataset: Dataset,
) -> None:
    alone = epoch(dataset)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    interleaved = []
    for batch in dataset.train_batches(batch_size=8, seed=5, epoch=1):
        interleaved.append(batch)
        next(dataset.eval_batches("train", batch_size=4, order=5, augment=True))
        next(dataset.eval_batches("val", batch_size=2, order=None))
    assert_same(interleaved, alone)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("order", [None, 4])
def test_evaluation_counts_every_image_once(
    dataset: Dataset, batch_size: int, order: int | None
) -> None:
    """P34: whatever the batch size and order; none twice to fill a batch."""
    stored = list(dataset.eval_batches("val", batch_size=7, order=None))
    seen = list(dataset.eval_batches("val", batch_size=batch_size, order=order))
    assert Counter(f for x, _ in seen for f in fingerprints(x)) == Counter(
        f for x, _ in stored for f in fingerprints(x)
    )
    labels = [torch.cat([y for _, y in batches]).tolist() for batches in (seen, stored)]
    assert len(labels[0]) == dataset.size("val")
    assert (labels[0] == labels[1]) is (order is None)


def test_drop_last_leaves_only_full_batches_of_the_first_samples(dataset: Dataset) -> None:
    n = dataset.size("train")
    sizes = [
        len(y)
        for _, y in dataset.eval_batches(
            "train", batch_size=4, order=0, samples=n - 1, drop_last=True
        )
    ]
    assert sizes == [4] * ((n - 1) // 4)
    first = list(dataset.eval_batches("train", batch_size=5, order=0, samples=5))
    assert_same(first, [next(dataset.eval_batches("train", batch_size=5, order=0))])


def test_memory_formats_hold_the_same_numbers(dataset: Dataset) -> None:
    for augment in (False, True):
        batches = [
            next(
                dataset.eval_batches(
                    "train", batch_size=6, order=1, augment=augment, channels_last=layout
                )
            )[0]
            for layout in (False, True)
        ]
        assert batches[0].is_contiguous()
        assert batches[1].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(*batches)


def test_splits_do_not_overlap_and_do_not_depend_on_the_seed(
    load: Callable[..., Dataset],
) -> None:
    for name in ("digits", "cifar10", "imagefolder"):
        images = {}
        for split in SPLITS:
            one, other = (
                [f for x, _ in d.eval_batches(split, batch_size=50, order=None)
                 for f in fingerprints(x)]
                for d in (load(name, seed=0), load(name, seed=1))
            )  # fmt: skip
            assert one == other
            images[split] = set(one)
        assert not images["train"] & images["val"]
        assert not images["train"] & images["test"]
        assert not images["val"] & images["test"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 10**6}, "training images"),
        ({"batch_size": 0}, "training images"),
        ({"batch_size": 8, "start_step": 10**6}, "an epoch has"),
        ({"batch_size": 8, "start_step": -1}, "an epoch has"),
        ({"batch_size": 8, "seed": -1}, "a seed is"),
    ],
)
def test_training_refuses_at_the_call(
    dataset: Dataset, wrong: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataset.train_batches(**({"seed": 0, "epoch": 0} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "wrong", "message"),
    [
        ("valid", {}, "one of train, val, test"),
        ("val", {"samples": 10**6}, "has"),
        ("val", {"samples": 0}, "has"),
        ("val", {"batch_size": 0}, "offers"),
        ("val", {"batch_size": 3, "samples": 2, "drop_last": True}, "offers 2 images"),
    ],
)
def test_evaluation_refuses_at_the_call(
    dataset: Dataset, split: str, wrong: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataset.eval_batches(split, **({"batch_size": 2, "order": None} | wrong))  # type: ignore[arg-type]


def test_the_streams_are_frozen() -> None:
    # Another number or generator would silently change every run's data under an unchanged id.
    assert [s.value for s in Stream] == list(range(9))
    assert generator(Stream.TRAIN_ORDER, 100, 3).permutation(8).tolist() == [3, 2, 4, 7, 5, 1, 0, 6]


def test_streams_are_independent() -> None:
    keys = [(s, seed, *key) for s in Stream for seed in (0, 7) for key in ((), (0,), (0, 0), (1,))]
    draws = {tuple(generator(*k).integers(0, 2**32, 4).tolist()) for k in keys}
    assert len(draws) == len(keys)


def test_balanced_draws_are_nested_and_even() -> None:
    labels = np.repeat(np.arange(5), [9, 10, 11, 12, 13])
    among = np.arange(1, 55)
    few, many = (balanced(labels, among, k, generator(Stream.SUBSET, 2)) for k in (3, 8))
    assert set(few) < set(many) <= set(among)
    assert np.bincount(labels[many]).tolist() == [8] * 5
    assert few.tolist() == sorted(few)
    with pytest.raises(ValueError, match="class 0 has 8"):
        balanced(labels, among, 9, generator(Stream.SUBSET, 2))


def test_subsets_are_drawn_per_seed_and_refused_unless_balanced() -> None:
    labels = np.arange(100) % 10
    draw = [subset_of(labels, np.arange(100), 50, num_classes=10, seed=s) for s in (1, 1, 2)]
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])
    for wrong in (0, -10, 55, 110):
        with pytest.raises(ValueError, match=f"data.subset={wrong}: .* at most 100"):
            subset_of(labels, np.arange(100), wrong, num_classes=10, seed=1)


def test_data_sets_are_found_by_name() -> None:
    assert data.names() == [
        "cifar10", "cifar100", "digits", "imagefolder", "imagenet", "imagenet_val", "synthetic",
    ]  # fmt: skip
    assert all(callable(data.find(name)) for name in data.names())
    with pytest.raises(ValueError, match="unknown data set 'memory': one of cifar10, "):
        data.find("memory")
