"""Arrays and digests that are costly to make, kept on disk and shared by runs side by side.

Each file is written under a temporary name and moved into place, so that a reader sees all of it
or none, whoever else is writing. Of the processes of a machine that find it missing, such as the
ranks of a run, one makes it and the others wait. Arrays are opened as read-only memory maps:
processes share the pages.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

DIGEST_LENGTH = 16


def directory() -> Path:
    """$NORMLAB_CACHE, else $XDG_CACHE_HOME/normlab, else ~/.cache/normlab."""
    if own := os.environ.get("NORMLAB_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "normlab"
    return Path.home() / ".cache" / "normlab"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within, no other process of this machine makes that file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / f".{path.name}.lock").open("w")
    except OSError as e:
        raise OSError(
            f"cannot write the data cache {path.parent}: {e.strerror}; NORMLAB_CACHE names another"
        ) from e
    with lock:
        with suppress(OSError):  # a network disk that knows no locks: several make the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        Path(temporary).chmod(0o644)  # mkstemp's 0600 would lock out others who share the cache
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def array(key: str, make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The cached array of that name as a read-only memory map; made and written if missing.

    `key` must determine the content.
    """
    path = directory() / f"{key}.npy"
    if (found := _mapped(path)) is not None:
        return found
    with _alone(path):
        if (found := _mapped(path)) is not None:
            return found
        made = make()
        _write(path, lambda file: np.save(file, made))
    return np.asarray(np.load(path, mmap_mode="r"))


def _mapped(path: Path) -> npt.NDArray[Any] | None:
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, EOFError, ValueError):  # missing, empty or damaged
        return None


def text(key: str, make: Callable[[], str]) -> str:
    """The cached line of text of that name; made and written if missing."""
    path = directory() / f"{key}.txt"
    if path.is_file() and (found := path.read_text()):
        return found
    with _alone(path):
        if path.is_file() and (found := path.read_text()):
            return found
        made = make()
        _write(path, lambda file: file.write(made.encode()))
    return made


def shorten(digest: str) -> str:
    return digest[:DIGEST_LENGTH]


def content_digest(files: Iterable[Path]) -> str:
    """16 hex digits of the SHA-256 over the files' contents, in the given order, names left out.

    Reading gigabytes at every start would be slow: the result is kept under the files' paths, sizes
    and modification times.
    """
    files = list(files)
    stamp = hashlib.sha256()
    for file in files:
        stat = file.stat()
        stamp.update(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())

    def compute() -> str:
        total = hashlib.sha256()
        for file in files:
            with file.open("rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        return shorten(total.hexdigest())

    return text(f"digest-{shorten(stamp.hexdigest())}", compute)
