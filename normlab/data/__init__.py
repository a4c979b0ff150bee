"""Data sets by name. A data set is a module of this room, or an entry point of `normlab.data`, that
offers `load(root, *, seed, <options>) -> Dataset`.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

from normlab import plugins
from normlab.data.base import Dataset
from normlab.data.patterns import PatternedBatches, epoch_batches

__all__ = ["Dataset", "PatternedBatches", "epoch_batches", "find", "names"]

_LOADS = re.compile(r"^def load\(", re.MULTILINE)


def _own() -> set[str]:
    """Modules here that define `load`, found without importing them."""
    files = Path(__file__).parent.glob("*.py")
    return {f.stem for f in files if _LOADS.search(f.read_text(encoding="utf-8"))}


def names() -> list[str]:
    """Names that `find` knows: this room's own and those of installed packages."""
    return sorted(_own() | plugins.entry_points("data").keys())


def find(module: str) -> Callable[..., Dataset]:
    """The `load` function of that name. Raises ValueError naming what exists."""
    if module in _own():
        found = importlib.import_module(f"{__name__}.{module}").load
    elif module in (installed := plugins.entry_points("data")):
        found = installed[module].load()
    else:
        raise ValueError(f"unknown data set '{module}': one of {', '.join(names())}")
    return cast("Callable[..., Dataset]", found)
