"""Fused kernels for the CPU behind the batch-norm family: C++, compiled once on this machine.

`available` says whether they can be used, and compiles them if need be; NORMLAB_KERNELS=0 in the
environment turns them off, and so does `with use(False):`. Without a C++ compiler the layers take
their pure PyTorch path, which stays the reference. `docs/kernels.md` has the details.
"""

from normlab.kernels._operators import (
    batch_norm,
    batch_norm_backward,
    gradient,
    gradient_sums,
    kept,
    moments,
    move_towards,
    normalize,
    renorm,
    renorm_backward,
)
from normlab.kernels._switch import available, enabled, takes, unavailable, use

__all__ = [
    "available",
    "batch_norm",
    "batch_norm_backward",
    "enabled",
    "gradient",
    "gradient_sums",
    "kept",
    "moments",
    "move_towards",
    "normalize",
    "renorm",
    "renorm_backward",
    "takes",
    "unavailable",
    "use",
]
