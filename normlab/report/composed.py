"""What the cells of a grid are once composed, remembered from one report to the next.

A report needs of each cell its key and the epochs it is evaluated after, and composing takes a
hundredth of a second a cell: half of the time of a report over all experiments. What they depend on
is in a digest beside them; where it differs, or nothing can be kept, cells are composed again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from normlab import plugins, runs

__all__ = ["Cell", "directory", "remembered"]

Cell = tuple[str, frozenset[int]]
"""A cell's key, and the epochs after which its runs are evaluated."""


def directory() -> Path:
    """What reports remember: $XDG_CACHE_HOME/normlab/report, else ~/.cache/normlab/report."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "normlab" / "report"


def remembered(
    name: str, cells: Iterable[Sequence[str]], compose: Callable[[Sequence[str]], Cell]
) -> list[Cell]:
    """`compose` of each cell's overrides (no two are the same), asked only of those that the last
    call with `name` did not have."""
    path = directory() / f"{name}.json"
    digest = _digest()
    known = _read(path, digest)
    wanted = {"\0".join(overrides): overrides for overrides in cells}
    found = {
        words: known[words] if words in known else compose(overrides)
        for words, overrides in wanted.items()
    }
    if found.keys() != known.keys():
        _write(path, digest, found)
    return list(found.values())


def _digest() -> str:
    """Of all that a composed cell depends on besides its overrides."""
    digest = hashlib.sha256(runs.source_digest().encode())
    for package in ("hydra-core", "omegaconf"):
        digest.update(version(package).encode())
    for directory in plugins.conf_dirs():
        for path in sorted(directory.rglob("*.yaml")):
            digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path, digest: str) -> dict[str, Cell]:
    """What was kept under this digest; nothing where the file is missing, or not one of ours."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["digest"] == digest:
            return {
                str(words): (str(key), frozenset(map(int, epochs)))
                for words, (key, epochs) in kept["cells"].items()
            }
    return {}


def _write(path: Path, digest: str, cells: Mapping[str, Cell]) -> None:
    kept = {words: [key, sorted(epochs)] for words, (key, epochs) in cells.items()}
    with suppress(OSError):  # a home that cannot be written to: the next report is as slow
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(path, json.dumps({"digest": digest, "cells": kept}))
