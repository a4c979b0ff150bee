"""`data=imagenet`: ILSVRC 2012, 1.28 million images, as `train/<wnid>/` and `val/<wnid>/`."""

from normlab.data.imagefolder import Folder, from_directories

VAL_PER_CLASS = 50  # as many as the official validation set has


def load(root: str, *, seed: int, size: int = 224, workers: int = 8) -> Folder:
    """In `<root>/imagenet` or `<root>`. "test" is the official validation set, the one that papers
    report; "val" is a fixed 50 training images of each class, so that nothing is chosen on "test".

    Arguments and errors as for `normlab.data.imagefolder.load`.
    """
    del seed
    return from_directories(
        "imagenet", root, size=size, workers=workers, val_per_class=VAL_PER_CLASS
    )
