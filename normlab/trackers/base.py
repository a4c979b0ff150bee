"""The contract of a tracker: what shows a run's numbers elsewhere than in the run's own files.

A module of this room has

    def start(run: RunDir, config: dict[str, Any]) -> Tracker

which begins to show a run, or goes on where an earlier start of the same run has stopped; and
`LEAVES`, the pattern of what it leaves in the run's directory. It is called by one process at a
time, which holds the run. Whatever it raises, here or later, ends the tracker and not the run.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from normlab.runs import RunDir

__all__ = ["Tracker", "hyperparameters", "key", "plain"]


class Tracker(Protocol):
    """A run as one tracker shows it.

    durable     whether what it is told is kept once `log` returns; where only `end` keeps it, the
                start after a kill tells it again
    """

    durable: bool

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Show numbers of an epoch (0: before training); epochs may come in any order."""

    def end(self, status: str) -> None:
        """No more numbers come from this process. status: the run's, or unfinished."""


def key(run: RunDir) -> str:
    """What tells this run from an earlier one with the same id, which was begun anew."""
    began = "".join(filter(str.isalnum, run.env()["started"]))
    return f"{run.id}-{began}"


def plain(name: str) -> str:
    """A protocol or a quantity as every tracker can show it: ``val_precise_batch_2``."""
    return re.sub(r"[^\w.-]", "_", name)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The resolved config with dotted keys; lists and null as text."""
    return dict(_flat(config, ""))


def _flat(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{path}{name}", value
        else:
            yield f"{path}{name}", "null" if value is None else str(value)
