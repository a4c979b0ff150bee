"""Data from its name: image folders, Parquet, arrays, or a function of the user's."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from normlab.subject import code
from normlab.subject._arrays import Arrays
from normlab.subject._images import Folder, Pixels
from normlab.subject._parquet import Table
from normlab.subject.batches import Batches, samples_of

__all__ = ["load_batches"]

_END = object()
FORMS = "a folder of images, a .parquet file, a .npz or .npy file, or path/to/file.py:FUNCTION"


def load_batches(
    spec: str,
    *,
    batch_size: int,
    samples: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int = 0,
    seed: int = 0,
) -> Batches:
    """Batches of the data that `spec` names: random draws, the same ones in every pass.

        load_batches("photos/train", batch_size=64, samples=2000, size=224)

    Args:
        spec: one of
            - a folder of images: one sub-folder per class, in alphabetical order, or images without
              labels side by side; batches (x, y), y (N,) or None.
            - a .parquet file, or a quoted pattern of some ('train-*.parquet'): a column `img` or
              `image` of encoded images, as the Hugging Face Hub has them, and perhaps `label`.
              Rows are mixed within a buffer of 256 MiB, and a sample is drawn from 16 row groups
              at least.
            - a .npz file with an array `x` or `images` and perhaps `y` or `labels`, or a .npy file
              without labels (read through memory mapping). Arrays (N, ...) of any dimensions; 8-bit
              ones (N, H, W, C), (N, H, W) or (N, C, H, W) are images.
            - path/to/file.py:make_batches: a function that returns an iterable of batches of any
              kind. It is called anew for each pass and has to give the same batches each time; it
              is told batch_size=... if it takes that.
        batch_size: samples in a batch; the last one may have fewer.
        samples: at most so many, drawn at random; of a function's batches, the first. None: all.
        size: pixels a side; images of another size have their shorter side resized to 256/224 of
            it, and the centre is taken. None: as they are, all of one size.
        mean, std: of each channel, or one for all, on a scale where 8-bit values are 0 to 1:
            subtracted and divided by. None: ImageNet's, for images of three channels that come as
            8 bits; 0 and 1 for anything else.
        workers: threads that decode ahead.
        seed: of the order.

    Raises ValueError in one line for what there is not, cannot be read or does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"a batch has at least one sample, not {batch_size}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if code.is_code(spec):
        return _of_code(spec, batch_size, samples)
    pixels = Pixels(size, mean, std)
    path = Path(spec).expanduser()
    source: Folder | Table | Arrays
    if path.suffix == ".parquet":
        source = Table(path, samples, seed, pixels)
    elif path.suffix in (".npz", ".npy"):
        source = Arrays(path, samples, seed, pixels)
    elif path.is_dir():
        source = Folder(path, samples, seed, pixels)
    else:
        missing = "" if path.exists() or path.suffix else f"; there is no folder {path}"
        raise ValueError(f"data is {FORMS}, not '{spec}'{missing}")
    return Batches(
        name=spec,
        plan=partial(_batched, source.items, batch_size),
        load=source.load,
        batch_size=batch_size,
        samples=source.samples,
        labelled=source.labelled,
        number=-(-source.samples // batch_size),
        workers=workers,
    )


def _batched(items: Callable[[], Iterable[Any]], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items():
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _of_code(spec: str, batch_size: int, samples: int | None) -> Batches:
    function = code.named(spec)
    told = "batch_size" in signature(function).parameters
    options = {"batch_size": batch_size} if told else {}

    def plan() -> Iterator[Any]:
        left = samples
        made = code.call(iter, spec, code.call(function, spec, **options))
        while (batch := code.call(next, spec, made, _END)) is not _END:
            yield batch
            if left is not None and (left := left - samples_of(batch)) <= 0:
                return

    return Batches(
        name=spec,
        plan=plan,
        load=_same,
        batch_size=batch_size if told else None,
        samples=None,
        labelled=None,
        number=None,
    )


def _same(batch: Any) -> Any:
    return batch
