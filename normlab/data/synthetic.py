"""`data=synthetic`: seeded noise around one random picture per class; to test the machinery."""

import hashlib

import numpy as np

from normlab.data import cache
from normlab.data.memory import InMemory, Split, moments, pack
from normlab.data.streams import Stream, generator

NOISE = 40.0  # standard deviation, in pixel units


def load(
    root: str, *, seed: int, n: int = 512, classes: int = 10, size: int = 8, channels: int = 3
) -> InMemory:
    """`n` training images and a quarter of that in each of "val" and "test", classes in turn.

    root, seed  unused: nothing is read, and every run trains on the same images
    size        pixels a side; channels: 1 or 3
    Raises ValueError if a split would not hold every class.
    """
    del root, seed
    if channels not in (1, 3):
        raise ValueError(f"data.channels={channels}: 1 or 3")
    if size < 1 or classes < 2:
        raise ValueError(f"data.size={size}, data.classes={classes}: at least 1 and at least 2")
    held = n // 4
    if held < classes:
        raise ValueError(f"data.n={n}: at least 4 images for each of the {classes} classes")
    rng = generator(Stream.SYNTHETIC, 0)
    labels = np.arange(n + 2 * held) % classes
    pictures = rng.uniform(64, 192, size=(classes, size, size, channels))
    noisy = pictures[labels] + rng.normal(0, NOISE, size=(len(labels), size, size, channels))
    words = pack(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    train, val, test = np.split(np.arange(len(labels)), [n, n + held])
    return InMemory(
        "synthetic",
        {s: Split(words, labels, i) for s, i in (("train", train), ("val", val), ("test", test))},
        num_classes=classes,
        moments=moments(words, train),
        augment="none",
        digest=cache.shorten(hashlib.sha256(words.tobytes() + labels.tobytes()).hexdigest()),
    )
