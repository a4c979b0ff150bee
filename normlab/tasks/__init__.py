"""Tasks by name: the experiments that are not a classifier's training. A task is a module of this
room, or an entry point of `normlab.tasks`, that offers `run(*, seed, device, <keys>, <options>)`,
an iterator of rows, and `KEYS`; see `normlab.tasks.base`. Importing this package alone does not
import torch.
"""

import ast
from typing import Any

from normlab import plugins

__all__ = ["CLASSIFIER", "KNOWN", "beside", "find", "keys", "names", "needs"]

CLASSIFIER = "classifier"
"""The training of a network that classifies: no task of this room, but what runs otherwise are."""

KNOWN = ("norm", "model", "data", "nbs", "lr", "epochs", "batch_size", "precision")
"""Keys of a run that a task may ask for."""

_ROOM = plugins.Room(__name__, "run", "task")
names = _ROOM.names
find = _ROOM.find
beside = _ROOM.beside


def keys(name: str) -> tuple[str, ...]:
    """What a task asks for of the run's keys, besides seed and device; read without importing it.

    Raises ValueError for an unknown task, and for keys that no task is given.
    """
    if name in (own := _ROOM.own()):
        asked = _literal(own[name].read_text(encoding="utf-8"), "KEYS")
    else:
        asked = beside(name, "KEYS", ())
    if unknown := set(asked) - set(KNOWN):
        raise ValueError(
            f"task '{name}' asks for {', '.join(sorted(unknown))}; there are {', '.join(KNOWN)}"
        )
    return tuple(asked)


def _literal(source: str, name: str) -> Any:
    """The value of an annotated literal at the top of a module; () where there is none."""
    for node in ast.parse(source).body:
        if (
            isinstance(node, ast.AnnAssign)
            and node.value
            and getattr(node.target, "id", "") == name
        ):
            return ast.literal_eval(node.value)
    return ()


def needs(group: dict[str, Any]) -> tuple[str, ...]:
    """Of `KNOWN`, what the numbers of a run's task depend on; a model is made with a norm for data.

    group: the option of the run's config.
    """
    name = group.get("module") or group["name"]
    if name == CLASSIFIER:
        return KNOWN
    asked = set(keys(name))
    return tuple(key for key in KNOWN if key in asked or ("model" in asked and key in KNOWN[:3]))
