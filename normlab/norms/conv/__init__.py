"""Convolutions that normalize their weights, one per file; beside any norm, or instead of one.

As with the norms, a name is a module's: `find("ws")` is the one class that `ws.py` names in
`__all__`. Importing this package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normlab.norms.conv.base import ReparametrizedConv2d


def names() -> list[str]:
    """Every convolution `find` knows, sorted."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(stem for stem in stems - {"base"} if not stem.startswith("_"))


def find(module: str) -> type[ReparametrizedConv2d]:
    """The class of the convolution called `module`.

    Raises ValueError, naming those that exist, if there is none of that name.
    """
    if module not in names():
        raise ValueError(f"no convolution {module!r}; there are: plain, {', '.join(names())}")
    source = import_module(f"{__name__}.{module}")
    (name,) = source.__all__
    found: type[ReparametrizedConv2d] = getattr(source, name)
    return found
