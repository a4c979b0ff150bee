"""Whether the kernels are used: asked by every layer, decided once per process."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from normlab.kernels._build import Unavailable
from normlab.kernels._library import Kernels, dense, loaded

__all__ = ["available", "enabled", "kernels", "takes", "unavailable", "use"]

log = logging.getLogger("normlab.kernels")

_on = os.environ.get("NORMLAB_KERNELS", "1") != "0"
_ready: bool | None = None
_kernels: Kernels | None = None
_why = ""


def enabled() -> bool:
    """Whether layers may use the kernels: NORMLAB_KERNELS=0 says no, and `use` says either."""
    return _on


@contextmanager
def use(on: bool) -> Iterator[None]:
    """Within the context, layers use the kernels (where `available`), or the pure path.

    A backward pass goes the way of its forward. Raises RuntimeError, saying why, for on=True where
    there are no kernels.
    """
    global _on
    if on and not available():
        raise RuntimeError(f"there are no fused kernels: {_why}")
    before = _on
    _on = on
    try:
        yield
    finally:
        _on = before


def available() -> bool:
    """Whether the kernels can be used here; compiles them if that was not done yet."""
    return _decided() if _ready is None else _ready


def unavailable() -> str:
    """Why they are not `available`, in a line; '' where they are."""
    available()
    return _why


def kernels() -> Kernels:
    if _kernels is None and not available():
        raise RuntimeError(f"there are no fused kernels: {_why}")
    assert _kernels is not None
    return _kernels


def takes(x: Tensor) -> bool:
    """Whether a norm of x (N, C, ...) goes through the kernels now.

    They are for float32 and bfloat16 on a CPU, contiguous or with the channels last; transforms of
    torch.func need operators that have rules for them, and what is exported runs without normlab.
    """
    return (
        _on
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_exporting()
        and dense(x)
        and available()
    )


def _decided() -> bool:
    global _ready, _kernels, _why
    try:
        _kernels = loaded()
    except Unavailable as error:
        _why = str(error)
        log.warning("normalization layers run without the fused kernels: %s", _why)
    _ready = _kernels is not None
    return _ready


# Under torch.compile: called while the graph is made, and its answer is part of the graph.
_decided._dynamo_marked_constant = True  # type: ignore[attr-defined]
