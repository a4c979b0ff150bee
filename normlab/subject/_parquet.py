"""Encoded images in Parquet files, row group by row group."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from normlab.data.parquet import IMAGE_COLUMNS
from normlab.subject._images import Pixels

LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
GROUPS = 16
"""Row groups, at least, from which a part of the rows is drawn: neighbours may be alike."""
BUFFER = 256 * 2**20
"""Bytes of encoded images that wait to be drawn."""


class Row(NamedTuple):
    where: str
    content: bytes
    label: int


class Group(NamedTuple):
    file: Path
    number: int
    rows: int


class Table:
    """The rows of one or more Parquet files."""

    def __init__(self, pattern: Path, samples: int | None, seed: int, pixels: Pixels) -> None:
        files = sorted(pattern.parent.glob(pattern.name))
        if not files:
            raise ValueError(f"there is no file {pattern}")
        self._pixels, self._seed = pixels, seed
        self._image, label = _columns(files[0])
        self._label = label
        self.labelled = label is not None
        groups = [group for file in files for group in _groups(file)]
        rng = np.random.default_rng(seed)
        self._groups: list[Group] = []
        rows = 0
        for place in rng.permutation(len(groups)).tolist():
            if samples is not None and rows >= samples and len(self._groups) >= GROUPS:
                break
            self._groups.append(groups[place])
            rows += groups[place].rows
        if rows == 0:
            raise ValueError(f"{pattern} holds no row")
        taken = rng.permutation(rows)[: samples or rows]
        self._taken = np.zeros(rows, dtype=bool)
        self._taken[taken] = True
        self.samples = len(taken)

    def items(self) -> Iterator[Row]:
        """The rows, each drawn from those that wait."""
        rng = np.random.default_rng((self._seed, 1))
        waiting: list[Row] = []
        held = 0
        for row in self._rows():
            waiting.append(row)
            held += len(row.content)
            while held > BUFFER:
                place = int(rng.integers(len(waiting)))
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                out = waiting.pop()
                held -= len(out.content)
                yield out
        for place in rng.permutation(len(waiting)).tolist():
            yield waiting[place]

    def _rows(self) -> Iterator[Row]:
        first = 0
        for group in self._groups:
            taken = np.flatnonzero(self._taken[first : first + group.rows]).tolist()
            first += group.rows
            if taken:
                yield from self._read(group, taken)

    def _read(self, group: Group, taken: list[int]) -> Iterator[Row]:
        columns = [self._image, *([self._label] if self._label else [])]
        table = _opened(group.file).read_row_group(group.number, columns=columns).take(taken)
        images = table.column(self._image)
        labels = table.column(self._label).to_pylist() if self._label else [0] * len(taken)
        for row, cell, label in zip(taken, images, labels, strict=True):
            where = f"{group.file}, row {row} of group {group.number}"
            content = cell.as_py()
            found = content.get("bytes") if isinstance(content, dict) else content
            if not isinstance(found, bytes):
                raise ValueError(f"{where}: no encoded image in column '{self._image}'")
            if not isinstance(label, int):
                raise ValueError(f"{where}: column '{self._label}' holds no number of a class")
            yield Row(where, found, label)

    def load(self, items: Sequence[Row]) -> tuple[Tensor, Tensor | None]:
        images = []
        for row in items:
            try:
                image = Image.open(io.BytesIO(row.content))
                images.append(self._pixels.fitted(image))
            except (OSError, SyntaxError) as error:  # Pillow's words for a damaged PNG
                raise ValueError(f"{row.where}: not an image that can be decoded") from error
        x = self._pixels.stacked(images, [row.where for row in items])
        return x, torch.tensor([row.label for row in items]) if self.labelled else None


def _opened(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error) or "?").splitlines()[0]
        raise ValueError(f"{file} cannot be read as Parquet: {reason}") from None


def _columns(file: Path) -> tuple[str, str | None]:
    names = _opened(file).schema_arrow.names
    image, label = (
        next((name for name in among if name in names), None)
        for among in (IMAGE_COLUMNS, LABEL_COLUMNS)
    )
    if image is None:
        raise ValueError(f"{file} has no column {' or '.join(IMAGE_COLUMNS)}: {names}")
    return image, label


def _groups(file: Path) -> list[Group]:
    metadata = _opened(file).metadata
    return [Group(file, n, metadata.row_group(n).num_rows) for n in range(metadata.num_row_groups)]
