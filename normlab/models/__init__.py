"""Networks by name. A model is a module of this room, or an entry point of `normlab.models`, that
offers `build(norm, *, num_classes, shape, <options>) -> nn.Module`, where `norm(channels)` makes
one normalization layer: no network knows which.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from normlab import plugins

if TYPE_CHECKING:
    from torch import nn

__all__ = ["find", "names"]

_BUILDS = re.compile(r"^def build\(", re.MULTILINE)


def _own() -> set[str]:
    """Modules here that define `build`, found without importing them."""
    files = Path(__file__).parent.glob("*.py")
    return {f.stem for f in files if _BUILDS.search(f.read_text(encoding="utf-8"))}


def names() -> list[str]:
    """Names that `find` knows: this room's own and those of installed packages."""
    return sorted(_own() | plugins.entry_points("models").keys())


def find(module: str) -> "Callable[..., nn.Module]":
    """The `build` function of that name. Raises ValueError naming what exists."""
    if module in _own():
        found = importlib.import_module(f"{__name__}.{module}").build
    elif module in (installed := plugins.entry_points("models")):
        found = installed[module].load()
    else:
        raise ValueError(f"unknown model '{module}': one of {', '.join(names())}")
    return cast("Callable[..., nn.Module]", found)
