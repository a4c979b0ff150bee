"""Which layers are norms that the operations of this room know."""

from torch import nn
from torch.nn.utils import parametrize

from normlab.norms.base import PopulationNorm, SampleNorm
from normlab.norms.none import NoNorm

__all__ = ["BATCH", "FROZEN", "WITH_ACTIVATION", "base_type", "features", "is_own", "path"]

BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# By name: these packages need not be there.
FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"
WITH_ACTIVATION = {
    f"timm.layers.norm_act.{name}"
    for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
}


def base_type(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, or the one under its parametrizations."""
    cls: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return cls


def path(module: nn.Module) -> str:
    cls = base_type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def is_own(module: nn.Module) -> bool:
    """Whether this is a norm of normlab, with what a norm of the family promises."""
    own = isinstance(module, (PopulationNorm, SampleNorm, NoNorm))
    return own and path(module).startswith("normlab.norms.")


def features(module: nn.Module) -> int:
    """The number of channels of a norm."""
    for name in ("num_features", "num_channels"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return int(module._buffers["running_mean"].numel())  # type: ignore[union-attr]
