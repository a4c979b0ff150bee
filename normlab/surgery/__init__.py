"""Operations on anyone's trained model: its norms exchanged, folded away, renamed.

`convert` and `revert` swap the norms of a module tree (`conversion`); `fuse` and `unfuse`, and for
single layers `fold` and `split`, move a norm into the layer before it and out again (`fusion`);
`read`, `write` and `translate` carry statistics between the conventions of torch, Keras and Caffe
(`conventions`). Importing this package alone does not import torch.
"""

from typing import TYPE_CHECKING, Any

from normlab import lazy

if TYPE_CHECKING:  # what __getattr__ finds, for tools that do not run it
    from normlab.surgery.conventions import CONVENTIONS as CONVENTIONS
    from normlab.surgery.conventions import Convention as Convention
    from normlab.surgery.conventions import NormState as NormState
    from normlab.surgery.conventions import read as read
    from normlab.surgery.conventions import translate as translate
    from normlab.surgery.conventions import with_eps as with_eps
    from normlab.surgery.conventions import write as write
    from normlab.surgery.conversion import convert as convert
    from normlab.surgery.conversion import revert as revert
    from normlab.surgery.fusion import FoldedNorm as FoldedNorm
    from normlab.surgery.fusion import Pair as Pair
    from normlab.surgery.fusion import fold as fold
    from normlab.surgery.fusion import fuse as fuse
    from normlab.surgery.fusion import fusible as fusible
    from normlab.surgery.fusion import neighbours as neighbours
    from normlab.surgery.fusion import split as split
    from normlab.surgery.fusion import unfuse as unfuse

_MODULES = lazy.modules(__name__, __file__)


def __getattr__(name: str) -> Any:
    return lazy.exported(_MODULES) if name == "__all__" else lazy.find(__name__, _MODULES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *lazy.exported(_MODULES)})
