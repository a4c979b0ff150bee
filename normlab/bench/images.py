"""Random images in CIFAR's shape: their content does not matter to speed."""

import numpy as np

from normlab.data.memory import InMemory, Split, pack

CLASSES = 10
SHAPE = (3, 32, 32)


def pixels(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, 32, 32, 3) uint8 and (n,) int64 labels, always the same ones."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(n, 32, 32, 3), dtype=np.uint8)
    return images, rng.integers(0, CLASSES, size=n)


def dataset(n: int) -> InMemory:
    """``n`` training images, cropped and mirrored as CIFAR's are."""
    images, labels = pixels(n)
    split = Split(pack(images), labels, np.arange(n))
    return InMemory(
        "random",
        {"train": split, "val": split, "test": split},
        num_classes=CLASSES,
        moments=np.array([[127.5] * 3, [73.6] * 3]),
        augment="crop_flip",
        digest="",
    )
