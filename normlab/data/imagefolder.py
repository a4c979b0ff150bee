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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from normlab.data import cache
from normlab.data.base import Augment, Batch, Dataset, Planned, numbers, unknown_split
from normlab.data.corruptions import corrupt
from normlab.data.patterns import Indices
from normlab.data.streams import SPLIT_SEED, Stream, generator
from normlab.domains import CLEAN, Domain

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, on a scale of 0 .. 1
STD = (0.229, 0.224, 0.225)
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10

Token = tuple[int, int, int, Domain]  # step, place in the batch, image, how it is to look


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
    return Folder("imagefolder", root, size=size, workers=workers)


class Folder(Dataset):
    """Image directories as a data set; if there is no third directory, `val_per_class` training
    images of each class (None: a tenth) become "val"."""

    corrupts = True

    def __init__(
        self, name: str, root: str, *, size: int, workers: int, val_per_class: int | None = None
    ) -> None:
        if size < 1:
            raise ValueError(f"data.size={size}: it must be at least 1")
        if workers < 0:
            raise ValueError(f"data.workers={workers}: it must be at least 0")
        folder = _folder(name, Path(root).expanduser())
        listed = {split: _listing(directory) for split, directory in folder.items()}
        train = listed["train"]
        for split, images in listed.items():
            if images.classes != train.classes:
                odd = sorted(set(images.classes) ^ set(train.classes))
                raise ValueError(
                    f"{folder[split]} and {folder['train']} do not hold the same classes: {odd[0]}"
                )
        self._samples: dict[str, list[tuple[str, int]]] = {s: x.samples for s, x in listed.items()}
        if "val" not in listed:
            held = _held_apart(np.array(train.targets), val_per_class, train.classes)
            kept = np.setdiff1d(np.arange(len(train)), held)
            self._samples["val"] = [train.samples[i] for i in held]
            self._samples["train"] = [train.samples[i] for i in kept]
        self.name = name
        self.num_classes = len(train.classes)
        self.shape = (3, size, size)
        self.digest = _digest(folder["train"].parent, listed)
        self.note = ""
        self._workers = workers

    def size(self, split: str) -> int:
        return len(self._of(split))

    def labels(self, split: str) -> Indices:
        return np.array([label for _, label in self._of(split)], dtype=np.int64)

    def extremes(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return -mean / std, (1 - mean) / std

    def _of(self, split: str) -> list[tuple[str, int]]:
        if split not in self._samples:
            raise unknown_split(split)
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
            Decoder(self._of(split), self.shape[1], augment, split),
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
        self, samples: list[tuple[str, int]], size: int, augment: Augment | None, split: str
    ) -> None:
        self.samples, self.size, self.augment, self.split = samples, size, augment, split
        self.centre = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])

    def __getitem__(self, token: Token) -> tuple[Tensor, int]:
        step, place, index, domain = token
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as e:
            raise ValueError(f"{path} is not an image that can be decoded") from e
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


def _listing(directory: Path) -> ImageFolder:
    try:
        return ImageFolder(directory)
    except FileNotFoundError as e:  # no class, or one without images
        raise ValueError(f"{directory}: {str(e).splitlines()[0]}") from e


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


def _digest(parent: Path, listed: dict[str, ImageFolder]) -> str:
    """16 hex digits of the SHA-256 over sorted relative paths and file sizes.

    Asking a network disk for a million sizes takes minutes: the result is kept under the class
    directories' modification times, which change when a file is added, removed or renamed.
    """
    stamp = hashlib.sha256(str(parent.resolve()).encode())
    for images in listed.values():
        for c in images.classes:
            directory = Path(images.root) / c
            stamp.update(f"{directory}|{directory.stat().st_mtime_ns}\n".encode())

    def compute() -> str:
        files = sorted(Path(path) for images in listed.values() for path, _ in images.samples)
        total = hashlib.sha256()
        for file in files:
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
