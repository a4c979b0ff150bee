"""Population statistics of a trained model estimated anew, in place of those it was trained with.

`recalibrate` does it to a model, and says what it changes in loss and error; `average` makes the
weights of which statistics cannot be copied; `command` is `normlab recalibrate`, which does both to
files. Importing this package alone does not import torch.
"""

from typing import TYPE_CHECKING, Any

from normlab import lazy

if TYPE_CHECKING:  # what __getattr__ finds, for tools that do not run it
    from normlab.recalibrate.averaging import average as average
    from normlab.recalibrate.estimation import Recalibration as Recalibration
    from normlab.recalibrate.estimation import recalibrate as recalibrate

_MODULES = lazy.modules(__name__, __file__)


def __getattr__(name: str) -> Any:
    return lazy.exported(_MODULES) if name == "__all__" else lazy.find(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *lazy.exported(_MODULES)})
