"""Data sets by name. A data set is a module of this room, or an entry point of `normlab.data`, that
offers `load(root, *, seed, <options>) -> Dataset`.
"""

from normlab import plugins
from normlab.data.base import Dataset
from normlab.data.patterns import PatternedBatches, epoch_batches

__all__ = ["Dataset", "PatternedBatches", "epoch_batches", "find", "names"]

_ROOM = plugins.Room(__name__, "load", "data set")
names = _ROOM.names
find = _ROOM.find
