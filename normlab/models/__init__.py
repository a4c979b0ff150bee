"""Networks by name. A model is a module of this room, or an entry point of `normlab.models`, that
offers `build(norm, *, num_classes, shape, <options>) -> nn.Module`, where `norm(channels)` makes
one normalization layer: no network knows which.
"""

from normlab import plugins

__all__ = ["find", "names"]

_ROOM = plugins.Room(__name__, "build", "model")
names = _ROOM.names
find = _ROOM.find
