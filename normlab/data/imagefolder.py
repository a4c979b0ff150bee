"""`data=imagefolder`: a directory of images, one sub-directory per class, decoded as it is read.

Training takes a random resized crop and mirrors; evaluation resizes and crops the centre: the
protocol of torchvision's reference training, whose geometry `random_box` restates. Each image's
crop comes from a generator of its own, so that the number of workers changes nothing.
"""

import hashlib
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from normlab.data import cache
from normlab.data.base import (
    SPLITS,
    Augment,
    Batch,
    Dataset,
    Planned,
    numbers,
    unknown_split,
)
from normlab.data.corruptions import corrupt
from normlab.data.patterns import Indices
from normlab.data.streams import SPLIT_SEED, Stream, generator
from normlab.domains import CLEAN, Domain

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, on a scale of 0 .. 1
STD = (0.229, 0.224, 0.225)
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

Token = tuple[int, int, int, Domain]  # step, place in the batch, image, how it is to look
Samples = list[tuple[str, int]]  # path and label of each image


def load(root: str, *, seed: int, size: int = 224, workers: int = 8) -> "Folder":
    """`train/<class>/` and `test/<class>/` or `val/<class>/` in `<root>/imagefolder` or `<root>`.

    With both `val` and `test` each is what it says. With one of them it is "test", and a fixed
    tenth of each class's training images is held apart as "val".
    seed     unused: every run trains on the same images
    size     pixels a side; evaluation first resizes the shorter side to 256/224 of it
    workers  processes that decode; 0: this one
    Raises ValueError if directories are missing or do not hold the same classes.
    """
    del seed
    return from_directories("imagefolder", root, size=size, workers=workers)


def from_directories(
    name: str, root: str, *, size: int, workers: int, val_per_class: int | None = None
) -> "Folder":
    """A data set of training images and others; if there is no third directory, `val_per_class`
    training images of each class (None: a tenth) become "val"."""
    check_options(size, workers)
    folder = _folder(name, Path(root).expanduser())
    listed = {split: listing(directory) for split, directory in folder.items()}
    train = listed["train"]
    check_classes(train, *listed.values())
    samples = {split: images.samples for split, images in listed.items()}
    if "val" not in listed:
        held = _held_apart(np.array(train.targets), val_per_class, train.classes)
        kept = np.setdiff1d(np.arange(len(train)), held)
        samples["val"] = [train.samples[i] for i in held]
        samples["train"] = [train.samples[i] for i in kept]
    return Folder(
        name,
        samples,
        num_classes=len(train.classes),
        digest=digest_of(folder["train"].parent, *listed.values()),
        size=size,
        workers=workers,
    )


def check_options(size: int, workers: int) -> None:
    """Raise ValueError for images without pixels, and for fewer processes than none."""
    if size < 1:
        raise ValueError(f"data.size={size}: it must be at least 1")
    if workers < 0:
        raise ValueError(f"data.workers={workers}: it must be at least 0")


class Folder(Dataset):
    """Image files as a data set.

    samples    split -> (path, label) of each image, in stored order
    corrupted  domains whose test images are stored, of their final size or about that: domain ->
               the directory that has <class>/<file> for each test image
    """

    corrupts = True

    def __init__(
        self,
        name: str,
        samples: Mapping[str, Samples],
        *,
        num_classes: int,
        digest: str,
        size: int,
        workers: int,
        note: str = "",
        corrupted: Mapping[Domain, Path] | None = None,
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.shape = (3, size, size)
        self.digest = digest
        self.note = note
        self._samples = samples
        self._corrupted = corrupted or {}
        self._workers = workers

    def size(self, split: str) -> int:
        return len(self._of(split))

    def labels(self, split: str) -> Indices:
        return np.array([label for _, label in self._of(split)], dtype=np.int64)

    def extremes(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return -mean / std, (1 - mean) / std

    def _of(self, split: str) -> Samples:
        if split not in SPLITS:
            raise unknown_split(split)
        if split not in self._samples:
            raise ValueError(f"data={self.name} has no {split} (it has {', '.join(self._samples)})")
        return self._samples[split]

    def _batches(
        self,
        split: str,
        plan: Sequence[Planned],
        *,
        augment: Augment | None,
        device: torch.device,
        channels_last: bool,
    ) -> Iterator[Batch]:
        loader = DataLoader(
            Decoder(
                self._of(split),
                self.shape[1],
                augment,
                split,
                self._corrupted if split == "test" else {},
            ),
            batch_sampler=Tokens(plan),
            num_workers=self._workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # without one, each iteration draws from the global one
            worker_init_fn=_leave_signals_to_the_parent,
        )
        scale = 1 / (255 * torch.tensor(STD, device=device).view(3, 1, 1))
        shift = -torch.tensor(MEAN, device=device).view(3, 1, 1) * 255 * scale
        layout = torch.channels_last if channels_last else torch.contiguous_format
        # Bytes travel to the device and become numbers there: a quarter of the traffic.
        try:
            for pixels, y in loader:
                x = pixels.to(device, non_blocking=True).contiguous(memory_format=layout).float()
                yield torch.addcmul(shift, x, scale), y.to(device, non_blocking=True)
        except ValueError as e:  # a worker's comes with its traceback for a message
            raise ValueError(str(e).strip().splitlines()[-1].removeprefix("ValueError: ")) from e


class Tokens:
    """The batches of a plan as lists of tokens, which is all that workers need to know."""

    def __init__(self, plan: Sequence[Planned]) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[Token]]:
        for part in self.plan:
            shown = part.domains or [CLEAN] * len(part.images)
            together = zip(part.places, part.images, shown, strict=True)
            yield [(part.step, int(place), int(image), domain) for place, image, domain in together]


class Decoder(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Token -> (pixels uint8 (3, size, size), label)."""

    def __init__(
        self,
        samples: Samples,
        size: int,
        augment: Augment | None,
        split: str,
        corrupted: Mapping[Domain, Path],
    ) -> None:
        self.samples, self.size, self.augment, self.split = samples, size, augment, split
        self.corrupted = corrupted
        self.centre = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])
        self.whole = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])

    def __getitem__(self, token: Token) -> tuple[Tensor, int]:
        step, place, index, domain = token
        path, label = self.samples[index]
        stored = self.corrupted.get(domain)
        if stored is not None:
            path = str(stored.joinpath(*Path(path).parts[-2:]))
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as e:
            raise ValueError(f"{path} is not an image that can be decoded") from e
        if stored is not None:
            return v2.functional.pil_to_tensor(self.whole(image)), label
        if self.augment is None:
            image = self.centre(image)
        else:
            rng = self.augment.generator(step, place)
            box = random_box(image.height, image.width, rng)
            image = v2.functional.resized_crop(image, *box, size=[self.size, self.size])
            if rng.integers(2):
                image = v2.functional.horizontal_flip(image)
        pixels = v2.functional.pil_to_tensor(image)
        return corrupt(pixels[None], domain, numbers(self.split, np.array([index])))[0], label


def random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with 8-100 % of the area and a ratio of 3/4 to 4/3.

    The distribution of torchvision's RandomResizedCrop: area uniform, ratio log-uniform; after ten
    boxes that do not fit, the largest centred one whose ratio is allowed.
    """
    for _ in range(TRIES):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    h = min(height, round(width / RATIO[0]))
    w = min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _folder(name: str, root: Path) -> dict[str, Path]:
    """The directories of "train", "test" and, if there is a third, "val"."""
    for parent in (root / name, root):
        train, val, test = parent / "train", parent / "val", parent / "test"
        if train.is_dir() and test.is_dir() and val.is_dir():
            return {"train": train, "val": val, "test": test}
        if train.is_dir() and (test.is_dir() or val.is_dir()):
            return {"train": train, "test": test if test.is_dir() else val}
    raise ValueError(
        f"{name} is not there: looked for train/<class>/ and test/<class>/ or val/<class>/ in"
        f" {root / name} and {root}; set NORMLAB_DATA or data_root="
    )


def listing(directory: Path) -> ImageFolder:
    """The images of a directory by class. Raises ValueError for one without any."""
    try:
        return ImageFolder(directory)
    except FileNotFoundError as e:  # no class, or one without images
        raise ValueError(f"{directory}: {str(e).splitlines()[0]}") from e


def check_classes(one: ImageFolder, *others: ImageFolder) -> None:
    """Raise ValueError where directories do not hold the same classes."""
    for other in others:
        if odd := sorted(set(one.classes) ^ set(other.classes)):
            raise ValueError(f"{other.root} and {one.root} do not hold the same classes: {odd[0]}")


def _held_apart(labels: Indices, per_class: int | None, classes: Sequence[str]) -> Indices:
    """Sorted indices of the training images that form "val": fixed for all seeds."""
    rng = generator(Stream.SPLIT, SPLIT_SEED)
    held = []
    for c, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == c))
        count = max(1, len(members) // 10) if per_class is None else per_class
        if len(members) <= count:
            raise ValueError(
                f"class '{name}' has {len(members)} training images: {count} are held apart as val,"
                " none would be left"
            )
        held.append(members[:count])
    return np.sort(np.concatenate(held))


def digest_of(parent: Path, *listed: ImageFolder) -> str:
    """Of images that are listed already, below `parent`: see `digest_of_files`."""
    classes = [Path(images.root) / c for images in listed for c in images.classes]
    return digest_of_files(parent, classes, lambda: [p for one in listed for p, _ in one.samples])


def digest_of_files(
    parent: Path, directories: Sequence[Path], files: Callable[[], Iterable[str | Path]]
) -> str:
    """16 hex digits of the SHA-256 over sorted relative paths and sizes of the files in these.

    Asking a network disk for a million sizes takes minutes: the result is kept under the
    directories' modification times, which change when a file is added, removed or renamed.
    """
    stamp = hashlib.sha256(str(parent.resolve()).encode())
    for directory in directories:
        stamp.update(f"{directory}|{directory.stat().st_mtime_ns}\n".encode())

    def compute() -> str:
        total = hashlib.sha256()
        for file in sorted(map(Path, files())):
            total.update(f"{file.relative_to(parent).as_posix()}|{file.stat().st_size}\n".encode())
        return cache.shorten(total.hexdigest())

    return cache.text(f"digest-{cache.shorten(stamp.hexdigest())}", compute)


def _leave_signals_to_the_parent(_: int) -> None:
    """A signal to the whole process group must not look like a worker's failure: the run is to save
    and stop, and its workers end with it. Only what the parent itself sends ends a worker: it
    waits for those that are left, as after an exception, when it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
