"""A user's own model, its checkpoint and its batches, as a command line or a script names them.

`load_model` makes the model, `Checkpoint` reads and writes the file of its weights, `load_batches`
opens data for it, and `Scoring` says what its outputs are worth. `add_arguments` and
`from_arguments` are the same for a command. Importing this package alone does not import torch.
"""

from typing import TYPE_CHECKING, Any

from normlab import lazy

if TYPE_CHECKING:  # what __getattr__ finds, for tools that do not run it
    from normlab.subject.arguments import Subject as Subject
    from normlab.subject.arguments import add_arguments as add_arguments
    from normlab.subject.arguments import from_arguments as from_arguments
    from normlab.subject.batches import Batches as Batches
    from normlab.subject.checkpoint import Checkpoint as Checkpoint
    from normlab.subject.data import load_batches as load_batches
    from normlab.subject.model import load_model as load_model
    from normlab.subject.scoring import Score as Score
    from normlab.subject.scoring import Scoring as Scoring
    from normlab.subject.scoring import measure as measure

_MODULES = lazy.modules(__name__, __file__)


def __getattr__(name: str) -> Any:
    return lazy.exported(_MODULES) if name == "__all__" else lazy.find(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *lazy.exported(_MODULES)})
