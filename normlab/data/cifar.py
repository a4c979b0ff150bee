"""Where CIFAR-10 and CIFAR-100 come from, and their splits.

Looked for in `<root>/<name>` and `<root>`: the folder of torchvision's own class; else, in
`<root>/<name>`, Parquet files in the Hugging Face layout; else torchvision downloads the original.
"""

import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normlab.data import cache, parquet
from normlab.data.base import balanced, subset_of
from normlab.data.memory import (
    InMemory,
    Split,
    average_pool,
    cached_moments,
    check_augment,
    pack,
    unpack,
)
from normlab.data.streams import SPLIT_SEED, Stream, generator

SIDE = 32
VAL_SHARE = 10  # one in ten training images is held apart: 5,000 of 50,000
PROBE_SECONDS = 8.0


@dataclass(frozen=True)
class Kind:
    """What differs between the two sets."""

    name: str
    title: str
    num_classes: int
    folder: str  # of torchvision's class
    torchvision: str  # name of that class
    label_columns: tuple[str, ...]


CIFAR10 = Kind("cifar10", "CIFAR-10", 10, "cifar-10-batches-py", "CIFAR10", ("label",))
CIFAR100 = Kind(
    "cifar100", "CIFAR-100", 100, "cifar-100-python", "CIFAR100", ("fine_label", "label")
)


@dataclass(frozen=True)
class Source:
    """Files on disk and how to read a split ("train" or "test") of them."""

    files: list[Path]
    note: str
    images: Callable[[str], npt.NDArray[np.uint8]]  # (N, 32, 32, 3)
    labels: Callable[[str], npt.NDArray[np.int64]]  # (N,)


def assemble(
    kind: Kind, root: str, *, seed: int, size: int, subset: int | None, augment: str
) -> InMemory:
    """The data set; arguments as in `normlab.data.cifar10.load`."""
    if size < 1 or SIDE % size:
        raise ValueError(f"data.size={size}: it must divide {SIDE}, e.g. 32, 16 or 8")
    check_augment(augment)
    home = Path(root).expanduser()
    source = _find(kind, home) or _download(kind, home)
    digest = cache.content_digest(source.files)
    key = f"{kind.name}-{digest}"

    def words(split: str, side: int) -> npt.NDArray[Any]:
        def make() -> npt.NDArray[Any]:
            if side == SIDE:
                return pack(source.images(split))
            return pack(average_pool(unpack(words(split, SIDE)), side))

        return cache.array(f"{key}-{split}-{side}", make)

    def labels(split: str) -> npt.NDArray[np.int64]:
        return cache.array(f"{key}-{split}-labels", lambda: source.labels(split))

    of_train, of_test = labels("train"), labels("test")
    everything = np.arange(len(of_train))
    per_class = len(everything) // VAL_SHARE // kind.num_classes
    # The files are sorted by class: splits are drawn class by class, never cut from an end.
    val = balanced(of_train, everything, per_class, generator(Stream.SPLIT, SPLIT_SEED))
    train = np.setdiff1d(everything, val)
    chosen = subset_of(of_train, train, subset, num_classes=kind.num_classes, seed=seed)
    train_words, test_words = words("train", size), words("test", size)
    return InMemory(
        kind.name,
        {
            "train": Split(train_words, of_train, chosen),
            "val": Split(train_words, of_train, val),
            "test": Split(test_words, of_test, np.arange(len(of_test))),
        },
        num_classes=kind.num_classes,
        moments=cached_moments(f"{key}-{size}", train_words, train),
        augment=augment,
        digest=digest,
        note=source.note,
    )


def _find(kind: Kind, root: Path) -> Source | None:
    for parent in (root / kind.name, root):
        if (parent / kind.folder).is_dir():
            return _from_torchvision(kind, parent)
    files = parquet.find(root / kind.name)
    if files is None:
        return None
    jpeg = parquet.is_jpeg(files["test"][0])
    return Source(
        files["train"] + files["test"],
        f"JPEG copy of {kind.title} (lossy)" if jpeg else "",
        lambda split: parquet.images(files[split], SIDE),
        lambda split: parquet.labels(files[split], kind.label_columns, kind.num_classes),
    )


def _from_torchvision(kind: Kind, parent: Path) -> Source:
    def read(split: str) -> Any:
        import torchvision.datasets

        try:
            return getattr(torchvision.datasets, kind.torchvision)(parent, train=split == "train")
        except RuntimeError as e:
            raise ValueError(
                f"{kind.name}: {parent / kind.folder} is incomplete or damaged; remove it to"
                " download it again"
            ) from e

    files = (f for f in (parent / kind.folder).iterdir() if f.is_file())
    return Source(
        sorted(f for f in files if not f.name.startswith(".")),  # a file manager's notes
        "",
        lambda split: np.asarray(read(split).data, dtype=np.uint8),
        lambda split: np.asarray(read(split).targets, dtype=np.int64),
    )


def _download(kind: Kind, root: Path) -> Source:
    """Let torchvision fetch the original into `<root>/<name>`; a failure leaves nothing behind."""
    import torchvision.datasets

    target = root / kind.name
    made = [p for p in (target, *target.parents) if not p.exists()]
    fetch = getattr(torchvision.datasets, kind.torchvision)
    try:
        _probe(fetch.url)
        target.mkdir(parents=True, exist_ok=True)
        # Fetched aside and moved, so that a process beside this one never sees half of it.
        with tempfile.TemporaryDirectory(dir=target, prefix=".download-") as aside:
            fetch(aside, train=True, download=True)
            if not (target / kind.folder).exists():
                shutil.move(Path(aside) / kind.folder, target / kind.folder)
    except (OSError, RuntimeError, ValueError) as e:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(
            f"{kind.name} is not there: looked for {kind.folder}/ in {target} and {root}, and for"
            f" train.parquet and test.parquet (or train-*, test-*) in {target}; torchvision's"
            f" download failed ({reason}); set NORMLAB_DATA or data_root= to the folder that holds"
            f" {kind.name}/"
        ) from e
    return _from_torchvision(kind, target)


def _probe(url: str) -> None:
    """Raise OSError within seconds if the server cannot be reached.

    torchvision opens its URLs without a timeout, and resolving a name has none at all: without a
    network that may hang for minutes. Hence a thread that is abandoned when it does not answer.
    """
    outcome: list[Exception] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "normlab"})
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # somebody answers: what comes of it is the download's business
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if thread.is_alive():
        raise OSError(f"no answer within {PROBE_SECONDS:g} s")
    if outcome:
        raise OSError(str(outcome[0]))
