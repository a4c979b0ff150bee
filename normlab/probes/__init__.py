"""Probes by name: what a run measures besides its errors. A probe is a module of this room, or an
entry point of `normlab.probes`, that offers `measure(context) -> dict[str, float]`, a number for
each quantity; see `normlab.probes.base`. Importing this package alone does not import torch.
"""

from normlab import plugins

__all__ = ["beside", "find", "names", "own"]

_ROOM = plugins.Room(__name__, "measure", "probe")
names = _ROOM.names
find = _ROOM.find
beside = _ROOM.beside
own = _ROOM.own
