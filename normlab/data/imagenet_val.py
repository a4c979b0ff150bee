"""`data=imagenet_val`: ImageNet's validation images, to measure trained networks with.

"test" is the official validation set, at evaluation size as everywhere. "train" only estimates
population statistics: it is all of the training images or, where there are none, one half of the
validation images, and "test" is the other half. ImageNet-C (Hendrycks and Dietterich 2019), where
it lies beside them, shows the domains that it has; the others are made (`normlab.domains`).
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from normlab.data import cache
from normlab.data.base import half
from normlab.data.imagefolder import (
    Folder,
    Samples,
    check_classes,
    check_options,
    digest_of,
    digest_of_files,
    listing,
)
from normlab.domains import LEVELS, Domain

STORED = {
    "contrast": "contrast",
    "gaussian_noise": "gaussian_noise",
    "jpeg": "jpeg_compression",
    "brightness": "brightness",
    "blur": "gaussian_blur",
}
"""Kinds of domains -> the corruption of ImageNet-C that each is."""

_CORRUPTED = ("imagenet-c", "imagenet_c", "imagenetc")
"""How a directory of ImageNet-C may be called, in any case of letters."""

HALVES = "no training images: one half of the validation images estimates, the other is tested"


def load(root: str, *, seed: int, size: int = 224, workers: int = 8) -> Folder:
    """`val/<wnid>/`, and `train/<wnid>/` if there is one, in `<root>/imagenet` or `<root>`;
    `<corruption>/<severity>/<wnid>/` in `imagenet-c/`, there or beside it.

    seed     unused: the images are the same for all draws
    size     pixels a side; the shorter side is first resized to 256/224 of it, but for images of
             ImageNet-C, which are stored as they are shown
    workers  processes that decode; 0: this one
    Raises ValueError if there are no validation images, or directories lack classes that they hold.
    """
    del seed
    check_options(size, workers)
    top = Path(root).expanduser()
    parent = next((one for one in (top / "imagenet", top) if (one / "val").is_dir()), None)
    if parent is None:
        raise ValueError(
            f"imagenet_val is not there: looked for val/<class>/ in {top / 'imagenet'} and {top};"
            " set NORMLAB_DATA or data_root="
        )
    tested = listing(parent / "val")
    samples: dict[str, Samples] = {"test": tested.samples}
    read, note = [tested], []
    if (parent / "train").is_dir():
        train = listing(parent / "train")
        check_classes(tested, train)
        samples["train"] = train.samples
        read.append(train)
    else:
        for split, which in (("train", 0), ("test", 1)):
            samples[split] = [tested.samples[i] for i in half(len(tested), which)]
        note.append(HALVES)
    digest = digest_of(parent, *read)
    corrupted = dict(_stored({parent, top}, tested.classes))
    if corrupted:
        kinds = dict.fromkeys(domain.kind for domain in corrupted)
        note.append(f"of ImageNet-C: {', '.join(kinds)}")
        digest = cache.shorten(
            hashlib.sha256((digest + _digest_of(corrupted, tested.classes)).encode()).hexdigest()
        )
    return Folder(
        "imagenet_val",
        samples,
        num_classes=len(tested.classes),
        digest=digest,
        size=size,
        workers=workers,
        note="; ".join(note),
        corrupted=corrupted,
    )


def _stored(beside: set[Path], classes: list[str]) -> Iterator[tuple[Domain, Path]]:
    """The domains that ImageNet-C shows, with the directory of each. As it is published, its
    corruptions lie in folders of their kind (`noise/gaussian_noise`), or as they were unpacked.

    Raises ValueError for a directory that lacks a class.
    """
    within = [
        one for parent in sorted(beside) for one in sorted(parent.iterdir())
        if one.name.lower() in _CORRUPTED and one.is_dir()
    ]  # fmt: skip
    for kind, name in STORED.items():
        for level in LEVELS[kind]:
            found = (
                path for one in within
                for path in (one / name / str(level), *sorted(one.glob(f"*/{name}/{level}")))
                if path.is_dir()
            )  # fmt: skip
            if (path := next(found, None)) is None:
                continue
            if lacking := [one for one in classes if not (path / one).is_dir()]:
                raise ValueError(f"{path} lacks the class {lacking[0]}, which val/ holds")
            yield Domain(kind, level), path


def _digest_of(corrupted: dict[Domain, Path], classes: list[str]) -> str:
    directories = [path / one for path in corrupted.values() for one in classes]
    return digest_of_files(
        Path(os.path.commonpath(directories)),
        directories,
        lambda: [file for directory in directories for file in directory.iterdir()],
    )
