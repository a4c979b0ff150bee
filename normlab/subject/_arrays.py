"""Arrays in .npy and .npz files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from normlab.subject._images import Pixels, drawn

INPUTS, LABELS = ("x", "images"), ("y", "labels")


class Arrays:
    """Samples (N, ...) and perhaps labels of a file."""

    def __init__(self, path: Path, samples: int | None, seed: int, pixels: Pixels) -> None:
        x, self._y = _read(path)
        self._x = _channels_first(x) if x.dtype == np.uint8 else x
        self._pixels = pixels
        self.labelled = self._y is not None
        if x.ndim < 2 or x.dtype.kind not in "fiub":
            raise ValueError(f"{path} holds {x.dtype} of shape {x.shape}, not numbers (N, ...)")
        if self._y is not None and len(self._y) != len(x):
            raise ValueError(f"{path} holds {len(x)} samples and {len(self._y)} labels")
        size = pixels.size
        if size is not None and self._x.shape[2:] != (size, size):
            told = "x".join(map(str, self._x.shape[2:]))
            raise ValueError(f"{path} holds samples of {told}, which are not resized to {size}")
        self._chosen = drawn(len(x), samples, seed)
        self.samples = len(self._chosen)
        if self.samples == 0:
            raise ValueError(f"{path} holds no sample")

    def items(self) -> Iterator[int]:
        return iter(self._chosen.tolist())

    def load(self, items: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        rows = np.asarray(items)
        x = self._pixels.normalized(torch.from_numpy(np.ascontiguousarray(self._x[rows])))
        if self._y is None:
            return x, None
        y = self._y[rows]
        return x, torch.from_numpy(y.astype(np.float32 if y.dtype.kind == "f" else np.int64))


def _read(path: Path) -> tuple[Any, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        with np.load(path, allow_pickle=False) as file:
            names = [next((n for n in among if n in file), None) for among in (INPUTS, LABELS)]
            if names[0] is None:
                raise ValueError(f"it has no array {' or '.join(INPUTS)}, but {file.files}")
            return file[names[0]], None if names[1] is None else file[names[1]]
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as arrays: {error}") from None


def _channels_first(x: Any) -> Any:
    """8-bit images as (N, C, H, W), whichever way they are."""
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        return x.transpose(0, 3, 1, 2)
    return x
