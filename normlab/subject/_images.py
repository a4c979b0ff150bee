"""Images as tensors, and folders of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from normlab.data.imagefolder import MEAN, STD

Item = tuple[Path, int]

ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Pixels:
    """What becomes of an image: its size, and the mean and std of its channels."""

    size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"an image has at least one pixel a side, not {self.size}")
        if self.std is not None and any(value <= 0 for value in self.std):
            raise ValueError(f"std must be above 0, not {list(self.std)}")

    def fitted(self, image: Image.Image) -> Tensor:
        """(3, H, W) uint8."""
        image = image.convert("RGB")
        if self.size is not None and image.size != (self.size, self.size):
            image = _centre(image, self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def stacked(self, images: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """(N, C, H, W) float32, normalized."""
        for image, name in zip(images, names, strict=True):
            if image.shape != images[0].shape:
                sizes = [f"{x.size(-1)}x{x.size(-2)}" for x in (image, images[0])]
                raise ValueError(
                    f"{name} has {sizes[0]} pixels and {names[0]} {sizes[1]}: --image-size makes "
                    "them alike"
                )
        return self.normalized(torch.stack(list(images)))

    def normalized(self, x: Tensor) -> Tensor:
        """x (N, C, ...) as float32, 8-bit values on a scale of 0 to 1, less mean, over std."""
        coloured = x.dtype == torch.uint8 and x.size(1) == 3
        scaled = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
        mean = self._channels(self.mean, MEAN if coloured else (0.0,), x, "mean")
        std = self._channels(self.std, STD if coloured else (1.0,), x, "std")
        return (scaled - mean) / std

    @staticmethod
    def _channels(
        given: Sequence[float] | None, default: Sequence[float], x: Tensor, what: str
    ) -> Tensor:
        values = default if given is None else given
        if len(values) not in (1, x.size(1)):
            raise ValueError(
                f"{what} has {len(values)} values, and the data {x.size(1)} channels: give one, or "
                "one for each"
            )
        return torch.tensor(values).view(-1, *[1] * (x.dim() - 2))


def _centre(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to 256/224 of `size`, and the centre of that."""
    from torchvision.transforms.v2 import functional as V

    resized = V.resize(image, [size * 256 // 224])
    cropped: Image.Image = V.center_crop(resized, [size, size])
    return cropped


def drawn(available: int, samples: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Which of so many, in which order."""
    order = np.random.default_rng(seed).permutation(available)
    return order if samples is None else order[:samples]


class Folder:
    """A folder of images, in sub-folders by class or side by side."""

    def __init__(self, path: Path, samples: int | None, seed: int, pixels: Pixels) -> None:
        self._pixels = pixels
        self._files, self.labelled = _listed(path)
        self._chosen = drawn(len(self._files), samples, seed)
        self.samples = len(self._chosen)

    def items(self) -> Iterator[Item]:
        return (self._files[index] for index in self._chosen)

    def load(self, items: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        images = []
        for file, _ in items:
            try:
                with Image.open(file) as image:
                    images.append(self._pixels.fitted(image))
            except OSError as error:
                raise ValueError(f"{file} is not an image that can be decoded") from error
        x = self._pixels.stacked(images, [str(file) for file, _ in items])
        return x, torch.tensor([label for _, label in items]) if self.labelled else None


def _listed(path: Path) -> tuple[list[Item], bool]:
    """Images with their class's number, and whether there are classes."""
    flat = _images(path)
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if flat and any(_images(folder) for folder in folders):
        raise ValueError(f"{path} has images side by side and in sub-folders: it must be one")
    if flat:
        return [(file, 0) for file in flat], False
    files = []
    for number, folder in enumerate(folders):
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
        if not found:
            raise ValueError(f"{folder} holds no images: a sub-folder is a class")
        files += [(file, number) for file in found]
    if not files:
        parquet = sorted(path.glob("*.parquet"))
        instead = f"; name its files, as in {parquet[0]}" if parquet else ""
        raise ValueError(f"{path} holds no images{instead}")
    return files, True


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS)
