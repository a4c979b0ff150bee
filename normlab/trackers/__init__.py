"""Trackers by name: where a run's numbers are shown besides its own files. A tracker is a module of
this room, or an entry point of `normlab.trackers`, that offers `start(run, config) -> Tracker`; see
`normlab.trackers.base`. Importing this package alone imports no tracker's package.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

from normlab import plugins

__all__ = ["asked", "beside", "check", "find", "names"]

_ROOM = plugins.Room(__name__, "start", "tracker")
names = _ROOM.names
find = _ROOM.find
beside = _ROOM.beside


def asked(config: Mapping[str, Any]) -> list[str]:
    """The trackers of a config: its key ``tracker`` is null, a name, or a list of names."""
    given = config["tracker"]
    return [given] if isinstance(given, str) else list(given or ())


def check(config: Mapping[str, Any]) -> None:
    """Refuse a tracker of this room whose package is not installed. Its module, its package and
    normlab's extra that brings it have one name. Raises ValueError naming the extra."""
    for name in asked(config):
        if name in _ROOM.own() and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"tracker={name} needs the package {name}, which is not installed:"
                f" pip install 'normlab[{name}]'"
            )
