"""Normalization layers, one per file.

A layer's name is its module's: `find("ghost")` is the one class that `normlab/norms/ghost.py`
names in `__all__`, beside functions for its use, so a new layer needs no list. Installed packages
add layers as entry points of the group `normlab.norms`. What `__all__` names can also be imported
from here (`from normlab.norms import GroupNorm`), that of `normlab.norms.conv` too; importing this
package alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from normlab import lazy
from normlab.norms import conv

if TYPE_CHECKING:  # what __getattr__ finds, for tools that do not run it
    from torch import nn

    from normlab.norms.base import BatchStatistics as BatchStatistics
    from normlab.norms.base import PopulationNorm as PopulationNorm
    from normlab.norms.base import SampleNorm as SampleNorm
    from normlab.norms.base import Source as Source
    from normlab.norms.base import check_nbs as check_nbs
    from normlab.norms.base import check_update as check_update
    from normlab.norms.base import complement as complement
    from normlab.norms.base import move_towards as move_towards
    from normlab.norms.base import normalization as normalization
    from normlab.norms.base import own_choices as own_choices
    from normlab.norms.base import population_layers as population_layers
    from normlab.norms.base import recomputing as recomputing
    from normlab.norms.base import refuse_strangers as refuse_strangers
    from normlab.norms.bn import BatchNorm as BatchNorm
    from normlab.norms.conv.cwn import CenteredWeightNormConv2d as CenteredWeightNormConv2d
    from normlab.norms.conv.wn import WeightNormConv2d as WeightNormConv2d
    from normlab.norms.conv.ws import WeightStandardizedConv2d as WeightStandardizedConv2d
    from normlab.norms.frozen import FrozenBatchNorm as FrozenBatchNorm
    from normlab.norms.ghost import GhostBatchNorm as GhostBatchNorm
    from normlab.norms.gn import GroupNorm as GroupNorm
    from normlab.norms.instance import InstanceNorm as InstanceNorm
    from normlab.norms.l1 import L1BatchNorm as L1BatchNorm
    from normlab.norms.ln import LayerNorm as LayerNorm
    from normlab.norms.ln_channels import ChannelsLayerNorm as ChannelsLayerNorm
    from normlab.norms.ln_elementwise import ElementwiseLayerNorm as ElementwiseLayerNorm
    from normlab.norms.lrn import LocalResponseNorm as LocalResponseNorm
    from normlab.norms.none import NoNorm as NoNorm
    from normlab.norms.renorm import BatchRenorm as BatchRenorm
    from normlab.norms.separate import SeparateBatchNorm as SeparateBatchNorm
    from normlab.norms.separate import domains as domains
    from normlab.norms.sync import SyncBatchNorm as SyncBatchNorm
    from normlab.norms.sync import name_layers as name_layers
    from normlab.norms.virtual import VirtualBatchNorm as VirtualBatchNorm
    from normlab.norms.virtual import forward_only as forward_only
    from normlab.norms.virtual import forward_with as forward_with

ENTRY_POINTS = "normlab.norms"


def _own() -> list[str]:
    """The public modules of this package: the layers, and what they share (`base`)."""
    return [module.rpartition(".")[2] for module in lazy.modules(__name__, __file__)]


def names() -> list[str]:
    """Every layer `find` knows, sorted."""
    own = {name for name in _own() if name != "base"}
    return sorted(own | {point.name for point in entry_points(group=ENTRY_POINTS)})


def find(module: str) -> type[nn.Module]:
    """The class of the layer called `module`.

    Raises ValueError, naming the layers that exist, if there is none of that name.
    """
    if module not in names():
        raise ValueError(f"no norm {module!r}; there are: {', '.join(names())}")
    if module in _own():
        source = import_module(f"{__name__}.{module}")
        exported = [getattr(source, name) for name in source.__all__]
        (found,) = (value for value in exported if isinstance(value, type))
    else:
        (point,) = entry_points(group=ENTRY_POINTS, name=module)
        found = point.load()
    if not isinstance(found, type):
        raise ValueError(f"norm {module!r} is {found!r}; a class is needed")
    return found


def _modules() -> list[str]:
    """Where the names of this package are."""
    return [f"{__name__}.{stem}" for stem in [*_own(), *(f"conv.{stem}" for stem in conv.names())]]


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted([*lazy.exported(_modules()), "ENTRY_POINTS", "find", "names"])
    return lazy.find(__name__, _modules(), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *lazy.exported(_modules())})
