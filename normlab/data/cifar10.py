"""`data=cifar10`: 60,000 colour images of 32x32 pixels in 10 classes (Krizhevsky, 2009)."""

from normlab.data import cifar
from normlab.data.memory import InMemory


def load(
    root: str,
    *,
    seed: int,
    size: int = 32,
    subset: int | None = None,
    augment: str = "crop_flip",
) -> InMemory:
    """Splits: of the training images a fixed, class-balanced tenth (5,000) is "val", the others are
    "train" or, with `subset`, that many of them, class-balanced and drawn per seed; "test" is test.

    root     folder that holds `cifar10/`; where in it and what else is tried: `normlab.data.cifar`
    size     pixels a side; a divisor of 32, e.g. 16 or 8: images are average-pooled once and
             rounded to uint8
    augment  "none", "crop", "flip" or "crop_flip"
    Raises ValueError if the data is neither found nor downloadable, or an option does not fit.
    """
    return cifar.assemble(cifar.CIFAR10, root, seed=seed, size=size, subset=subset, augment=augment)
