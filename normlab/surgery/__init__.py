"""Operations on anyone's trained model: its norms exchanged, folded away, renamed.

`convert` and `revert` swap the norms of a module tree (`conversion`); `fuse` and `unfuse`, and for
single layers `fold` and `split`, move a norm into the layer before it and out again (`fusion`);
`read`, `write` and `translate` carry statistics between the conventions of torch, Keras and Caffe
(`conventions`). Importing this package alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.surgery.conventions import NormState as NormState
    from normlab.surgery.conventions import read as read
    from normlab.surgery.conventions import translate as translate
    from normlab.surgery.conventions import with_eps as with_eps
    from normlab.surgery.conventions import write as write
    from normlab.surgery.conversion import convert as convert
    from normlab.surgery.conversion import revert as revert
    from normlab.surgery.fusion import fold as fold
    from normlab.surgery.fusion import fuse as fuse
    from normlab.surgery.fusion import fusible as fusible
    from normlab.surgery.fusion import neighbours as neighbours
    from normlab.surgery.fusion import split as split
    from normlab.surgery.fusion import unfuse as unfuse

_HOLDS = {
    "conventions": ("NormState", "read", "translate", "with_eps", "write"),
    "conversion": ("convert", "revert"),
    "fusion": ("fold", "fuse", "fusible", "neighbours", "split", "unfuse"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOLDS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
