"""`data=digits`: 1,797 real 8x8 grey images of handwritten digits, bundled with scikit-learn.

The embedded default: offline and small. Source: E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI (1998); scikit-learn ships the copy of its test part. It comes from 13
writers and says little about effects on natural images.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from normlab.data import cache
from normlab.data.base import balanced, subset_of
from normlab.data.memory import InMemory, Split, cached_moments, check_augment
from normlab.data.streams import SPLIT_SEED, Stream, generator

CLASSES = 10
VAL, TEST = 300, 500


def load(root: str, *, seed: int, subset: int | None = None, augment: str = "none") -> InMemory:
    """Splits: a fixed, class-balanced 300 val and 500 test; the other 997 or a `subset` train.

    root     unused: the images come with scikit-learn
    augment  "none" or "crop" (one pixel of padding); a mirrored digit is not a digit
    """
    del root
    check_augment(augment, ("none", "crop"))
    table = cache.array("digits", _table)
    words, labels = table[:, :64].reshape(-1, 8, 8), np.array(table[:, 64], dtype=np.int64)
    digest = cache.shorten(hashlib.sha256(table.tobytes()).hexdigest())
    rng = generator(Stream.SPLIT, SPLIT_SEED)
    rest = np.arange(len(labels))
    test = balanced(labels, rest, TEST // CLASSES, rng)
    rest = np.setdiff1d(rest, test)
    val = balanced(labels, rest, VAL // CLASSES, rng)
    train = np.setdiff1d(rest, val)
    splits = {
        "train": Split(
            words, labels, subset_of(labels, train, subset, num_classes=CLASSES, seed=seed)
        ),
        "val": Split(words, labels, val),
        "test": Split(words, labels, test),
    }
    return InMemory(
        "digits",
        splits,
        num_classes=CLASSES,
        moments=cached_moments(f"digits-{digest}", words, train),
        augment=augment,
        digest=digest,
    )


def _table() -> npt.NDArray[np.uint8]:
    """(1797, 65): 64 pixels, scaled from 0 .. 16 to 0 .. 255, and the label."""
    from sklearn.datasets import load_digits  # 2 s to import: hence the cache

    bunch = load_digits()
    pixels = np.rint(bunch.data * (255 / 16))
    return np.concatenate([pixels, bunch.target[:, None]], axis=1).astype(np.uint8)
