"""Operations on anyone's trained model.

`convert` and `revert` swap the norms of a module tree. Importing this package alone does not import
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.surgery.conversion import convert as convert
    from normlab.surgery.conversion import revert as revert

_HOLDS = {"conversion": ("convert", "revert")}


def __getattr__(name: str) -> Any:
    for module, names in _HOLDS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
