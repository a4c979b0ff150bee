"""normlab: normalization experiments that end in a verdict, and its layers for anyone's model.

`normlab.convert(model, "ghost", nbs=32)` and `normlab.revert(model)` are `normlab.surgery`'s.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.surgery import convert as convert
    from normlab.surgery import revert as revert

__version__ = "0.1.0"

__all__ = ["convert", "revert"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("normlab.surgery"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
