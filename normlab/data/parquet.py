"""Image classification data as the Hugging Face Hub ships it: encoded images in Parquet files.

A column `img` or `image` holds a struct of `bytes` (a JPEG or PNG file) and `path`; a label column
holds class numbers.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

IMAGE_COLUMNS = ("img", "image")
JPEG_MAGIC = b"\xff\xd8"


def find(folder: Path) -> dict[str, list[Path]] | None:
    """The files of "train" and "test" in `folder` (`train.parquet` or shards `train-*.parquet`)."""
    found = {}
    for split in ("train", "test"):
        single = folder / f"{split}.parquet"
        found[split] = [single] if single.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
    return found if all(found.values()) else None


def _read(file: Path, columns: Sequence[str], *, rows: int | None = None) -> Any:
    """The first of `columns` that the file has, as a pyarrow array, or its first `rows` rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
        present = [c for c in columns if c in opened.schema_arrow.names]
        if present:
            if rows is None:
                return opened.read(columns=present[:1]).column(0)
            return next(opened.iter_batches(batch_size=rows, columns=present[:1])).column(0)
    except (pyarrow.ArrowException, OSError, StopIteration) as e:
        reason = (str(e) or "it holds no row").splitlines()[0]
        raise ValueError(f"{file} cannot be read as Parquet: {reason}") from e
    raise ValueError(f"{file} has no column {' or '.join(columns)}: {opened.schema_arrow.names}")


def is_jpeg(file: Path) -> bool:
    """Whether the file's first image is a JPEG, so that its pixels are not the original ones."""
    first = _read(file, IMAGE_COLUMNS, rows=1)[0]
    return _encoded(file, 0, first).startswith(JPEG_MAGIC)


def _encoded(file: Path, row: int, cell: Any) -> bytes:
    """The image file in a cell; other layouts keep bare bytes, or paths alone."""
    content = cell.as_py()
    found = content.get("bytes") if isinstance(content, dict) else None
    if not isinstance(found, bytes):
        raise ValueError(f"{file}, row {row}: no struct whose `bytes` are an encoded image")
    return found


def images(files: Sequence[Path], side: int) -> npt.NDArray[np.uint8]:
    """All images decoded, (N, side, side, 3). Raises ValueError naming the first bad one."""
    columns = [_read(file, IMAGE_COLUMNS) for file in files]
    decoded = np.empty((sum(map(len, columns)), side, side, 3), dtype=np.uint8)
    at = 0
    for file, column in zip(files, columns, strict=True):
        for row, cell in enumerate(column):
            try:
                image = Image.open(io.BytesIO(_encoded(file, row, cell))).convert("RGB")
            except (OSError, SyntaxError) as e:  # Pillow's words for a damaged PNG
                raise ValueError(f"{file}, row {row}: not an image that can be decoded") from e
            if image.size != (side, side):
                raise ValueError(
                    f"{file}, row {row}: image of {image.width}x{image.height}, not {side}x{side}"
                )
            decoded[at] = np.asarray(image)
            at += 1
    return decoded


def labels(
    files: Sequence[Path], columns: Sequence[str], num_classes: int
) -> npt.NDArray[np.int64]:
    """(N,) class numbers from the first of `columns` that is present."""
    parts = [_read(file, columns).to_numpy() for file in files]
    joined = np.concatenate(parts)
    if joined.dtype.kind not in "iu" or joined.min() < 0 or joined.max() >= num_classes:
        raise ValueError(f"{files[0]}: labels must be whole numbers 0 .. {num_classes - 1}")
    return joined.astype(np.int64)
