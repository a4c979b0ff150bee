"""The embedded default."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from normlab import data
from normlab.data.memory import InMemory


def load(**options: object) -> InMemory:
    loaded = data.find("digits")("", **({"seed": 0} | options))
    assert isinstance(loaded, InMemory)
    return loaded


def test_all_images_of_scikit_learn_arrive_each_once() -> None:
    digits, bunch = load(), load_digits()
    assert [digits.size(s) for s in ("train", "val", "test")] == [997, 300, 500]
    parts = [digits._splits[s] for s in ("train", "val", "test")]
    assert np.array_equal(np.sort(np.concatenate([p.indices for p in parts])), np.arange(1797))
    words = parts[0].words
    assert words.max() == 255
    assert np.array_equal(np.rint(words / 255 * 16), bunch.images)
    assert np.array_equal(parts[0].labels, bunch.target)


def test_held_apart_splits_are_balanced() -> None:
    digits = load()
    for split, per_class in (("val", 30), ("test", 50)):
        labels = torch.cat([y for _, y in digits.eval_batches(split, batch_size=64, order=None)])
        assert torch.bincount(labels).tolist() == [per_class] * 10


def test_training_images_are_normalized() -> None:
    batches = load().eval_batches("train", batch_size=997, order=None)
    x = next(batches)[0].double()
    assert abs(x.mean()) < 1e-6
    assert abs(x.std(correction=0) - 1) < 1e-6
