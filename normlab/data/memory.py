"""Data sets that fit in memory: uint8 pixels, cropped, mirrored and normalized a batch at a time.

A pixel is stored as one machine word (uint8 for one channel, int32 for three and a pad byte), so
that a random crop with mirroring is a single index_select over words instead of bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normlab.data import cache
from normlab.data.base import Augment, Batch, Dataset, Planned, numbers, unknown_split, upload
from normlab.data.corruptions import corrupt_each
from normlab.data.patterns import Indices

AUGMENTS = {  # name -> (random crop, random mirroring)
    "none": (False, False),
    "crop": (True, False),
    "flip": (False, True),
    "crop_flip": (True, True),
}


def pack(images: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """(N, H, W, C) bytes -> (N, H, W) words: uint8 for C = 1, int32 for C = 3."""
    n, h, w, c = images.shape
    if c == 1:
        return images[..., 0]
    if c != 3:
        raise ValueError(f"images of {c} channels: in-memory data has 1 or 3")
    words = np.zeros((n, h, w, 4), dtype=np.uint8)
    words[..., :3] = images
    return words.view(np.int32)[..., 0]


def unpack(words: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """(N, H, W) words -> (N, H, W, C) bytes; the inverse of `pack`."""
    if words.dtype == np.uint8:
        return words[..., None]
    return np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)[..., :3]


def average_pool(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """(N, H, W, C) -> (N, size, size, C): means of square windows, rounded (halves up)."""
    n, h, _, c = images.shape
    k = h // size
    windows = images.reshape(n, size, k, size, k, c)
    sums = windows.sum(axis=(2, 4), dtype=np.uint32)
    rounded: npt.NDArray[np.uint32] = (2 * sums + k * k) // (2 * k * k)
    return rounded.astype(np.uint8)


def moments(words: npt.NDArray[Any], indices: Indices) -> npt.NDArray[np.float64]:
    """(2, C): mean and standard deviation of each channel, in pixel units 0 .. 255, exact.

    Counted from histograms, a block of images at a time: no float copy of the data is made.
    """
    counts = None
    for first in range(0, len(indices), 4096):
        pixels = unpack(words[indices[first : first + 4096]])
        if counts is None:
            counts = np.zeros((pixels.shape[-1], 256), dtype=np.int64)
        for c, row in enumerate(counts):
            row += np.bincount(pixels[..., c].ravel(), minlength=256)
    assert counts is not None, "a data set without training images"
    levels = np.arange(256)
    mean = (counts * levels).sum(axis=1) / counts.sum(axis=1)
    squares = (counts * (levels - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1)
    return np.stack([mean, np.sqrt(squares)])


def check_augment(augment: str, allowed: Iterable[str] = AUGMENTS) -> None:
    """Raise ValueError unless `augment` is allowed; call it before anything costly."""
    if augment not in allowed:
        raise ValueError(f"data.augment={augment}: one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Split:
    """The images at `indices` of a file's arrays, which splits may share."""

    words: npt.NDArray[Any]  # (N, H, W)
    labels: npt.NDArray[Any]  # (N,)
    indices: Indices


class InMemory(Dataset):
    """A data set of packed uint8 images.

    moments  (2, C) mean and standard deviation that normalize the pixels: x = (pixel - mean) / std
    augment  "none", "crop" (zero padding of an eighth of the side: 4 pixels at 32, as is usual for
             CIFAR), "flip" or "crop_flip"; only training batches are augmented unless asked
    On an accelerator the pixels are uploaded once and the batches are made there.
    """

    corrupts = True

    def __init__(
        self,
        name: str,
        splits: dict[str, Split],
        *,
        num_classes: int,
        moments: npt.NDArray[np.float64],
        augment: str,
        digest: str,
        note: str = "",
    ) -> None:
        _, height, width = splits["train"].words.shape
        mean, std = moments
        std = np.where(std > 0, std, 1.0)  # a constant channel stays constant
        self.name = name
        self.num_classes = num_classes
        self.shape = (len(mean), height, width)
        self.digest = digest
        self.note = note
        self._splits = splits
        self._scale = torch.tensor(1 / std, dtype=torch.float32)
        self._shift = torch.tensor(-mean / std, dtype=torch.float32)
        self._crop, self._flip = AUGMENTS[augment]
        self._resident: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def size(self, split: str) -> int:
        return len(self._split(split).indices)

    def labels(self, split: str) -> Indices:
        source = self._split(split)
        labels: Indices = source.labels[source.indices].astype(np.int64)
        return labels

    def extremes(self) -> tuple[Tensor, Tensor]:
        black = self._shift.view(-1, 1, 1)
        return black, black + 255 * self._scale.view(-1, 1, 1)

    def _split(self, split: str) -> Split:
        if split not in self._splits:
            raise unknown_split(split)
        return self._splits[split]

    def _batches(
        self,
        split: str,
        plan: Sequence[Planned],
        *,
        augment: Augment | None,
        device: torch.device,
        channels_last: bool,
    ) -> Iterator[Batch]:
        finish = Normalize(self._scale.to(device), self._shift.to(device), self.shape)
        for part in plan:
            words, labels = self._take(split, part.images, device)
            if augment is not None and (self._crop or self._flip):
                words = self._augmented(words, part, augment.generator(part.step))
            if any(domain.corrupts for domain in part.domains):
                self._corrupt(words, split, part)
            yield finish(words, channels_last=channels_last), labels

    def _take(self, split: str, positions: Indices, device: torch.device) -> tuple[Tensor, Tensor]:
        """Words (B, H, W) and labels (B,) on the device."""
        source = self._split(split)
        if device.type == "cpu":
            indices = source.indices[positions]
            labels = source.labels[indices].astype(np.int64)
            return torch.from_numpy(source.words[indices]), torch.from_numpy(labels)
        if (split, device) not in self._resident:
            self._resident[split, device] = (
                torch.from_numpy(source.words[source.indices]).to(device),
                torch.from_numpy(self.labels(split)).to(device),
            )
        words, all_labels = self._resident[split, device]
        chosen = upload(torch.from_numpy(positions), device)
        return words.index_select(0, chosen), all_labels.index_select(0, chosen)

    def _corrupt(self, words: Tensor, split: str, part: Planned) -> None:
        """Make `words` (B, H, W), in place, those of the domains they are to be shown in."""
        pixels = words.view(torch.uint8).view(*words.shape, -1)[..., : self.shape[0]]
        made = corrupt_each(pixels.permute(0, 3, 1, 2), part.domains, numbers(split, part.images))
        pixels.copy_(made.permute(0, 2, 3, 1))

    def _augmented(self, words: Tensor, part: Planned, rng: np.random.Generator) -> Tensor:
        pad = words.size(1) // 8 if self._crop else 0
        # Both are drawn whether or not they are used, so that adding the mirror keeps the crops;
        # and for the whole batch, so that a part of it has the crops it has there.
        offsets = rng.integers(0, 2 * pad + 1, size=(2, part.size))
        mirrored = rng.integers(0, 2, size=(1, part.size)) * self._flip
        drawn = np.concatenate([offsets, mirrored]).astype(np.int32)[:, part.places]
        return crop_flip(words, upload(torch.from_numpy(drawn), words.device), pad)


def crop_flip(words: Tensor, draws: Tensor, pad: int) -> Tensor:
    """Crop each image of (B, H, W) out of itself with `pad` zeros around, and mirror some.

    draws  (3, B) int32: first row and first column of the crop in 0 .. 2*pad, and 1 to mirror
    """
    n, h, w = words.shape
    high, wide = h + 2 * pad, w + 2 * pad
    padded = words.new_zeros((n, high, wide))
    padded[:, pad : pad + h, pad : pad + w] = words
    top, left, mirrored = draws[0], draws[1], draws[2, :, None]

    def count(stop: int) -> Tensor:
        return torch.arange(stop, dtype=torch.int32, device=words.device)

    columns = torch.where(mirrored.bool(), w - 1 - count(w), count(w)) + left[:, None]  # (B, W)
    rows = (count(n) * high + top)[:, None] + count(h)  # (B, H), counted through the batch
    index = rows[:, :, None] * wide + columns[:, None, :]
    return padded.view(-1).index_select(0, index.view(-1)).view(n, h, w)


class Normalize:
    """Words (B, H, W) -> float32 (B, C, H, W): pixel * scale + shift, in either memory format."""

    def __init__(self, scale: Tensor, shift: Tensor, shape: tuple[int, int, int]) -> None:
        self.scale, self.shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
        # A row of channels-last pixels is W*C numbers: broadcasting over rows instead of over C = 3
        # keeps the arithmetic in vector registers.
        self.row_scale, self.row_shift = scale.repeat(shape[2]), shift.repeat(shape[2])

    def __call__(self, words: Tensor, *, channels_last: bool) -> Tensor:
        n, h, w = words.shape
        c = len(self.scale)
        pixels = words.view(torch.uint8).view(n, h, w, -1)[..., :c]
        if channels_last:
            rows = pixels.contiguous().view(n * h, w * c).float()
            rows = torch.addcmul(self.row_shift, rows, self.row_scale)
            return rows.view(n, h, w, c).permute(0, 3, 1, 2)
        planes = torch.empty((n, c, h, w), device=words.device)
        for k in range(c):  # strided reads, contiguous writes: 2x faster than one permuted copy
            planes[:, k] = pixels[..., k]
        return torch.addcmul(self.shift, planes, self.scale)


def cached_moments(key: str, words: npt.NDArray[Any], indices: Indices) -> npt.NDArray[np.float64]:
    return cache.array(f"{key}-moments", lambda: moments(words, indices))
