"""Normalization layers, one per file.

A layer's name is its module's: `find("ghost")` is the one class that `normlab/norms/ghost.py`
names in `__all__`, beside functions for its use, so a new layer needs no list. Installed packages
add layers as entry points of the group `normlab.norms`. What `__all__` names can also be imported
from here (`from normlab.norms import GroupNorm`), that of `normlab.norms.conv` too; importing this
package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab.norms import conv

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "normlab.norms"


def _own() -> list[str]:
    """The public modules of this package: the layers, and what they share (`base`)."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(stem for stem in stems if not stem.startswith("_"))


def names() -> list[str]:
    """Every layer `find` knows, sorted."""
    own = {name for name in _own() if name != "base"}
    return sorted(own | {point.name for point in entry_points(group=ENTRY_POINTS)})


def find(module: str) -> type[nn.Module]:
    """The class of the layer called `module`.

    Raises ValueError, naming the layers that exist, if there is none of that name.
    """
    if module not in names():
        raise ValueError(f"no norm {module!r}; there are: {', '.join(names())}")
    if module in _own():
        source = import_module(f"{__name__}.{module}")
        exported = [getattr(source, name) for name in source.__all__]
        (found,) = (value for value in exported if isinstance(value, type))
    else:
        (point,) = entry_points(group=ENTRY_POINTS, name=module)
        found = point.load()
    if not isinstance(found, type):
        raise ValueError(f"norm {module!r} is {found!r}; a class is needed")
    return found


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for stem in [*_own(), *(f"conv.{stem}" for stem in conv.names())]:
            module = import_module(f"{__name__}.{stem}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
