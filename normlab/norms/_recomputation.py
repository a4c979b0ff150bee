"""Activation checkpointing: a forward that is run again in backward must not update again.

torch.nn.BatchNorm2d moves its running statistics in both runs. Outputs and gradients are right all
the same, so nothing but the buffers shows it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["leaving_no_trace", "recomputing"]


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as the second run of a checkpoint does.

    Not in a compiled graph, which cannot ask: torch.compile itself takes the updates out of what a
    checkpoint inside it repeats, but a checkpoint around a compiled module runs all of it twice.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def leaving_no_trace(layer: nn.Module) -> Iterator[None]:
    """Within the context the layer works on copies of its buffers, and its observers see nothing.

    A recomputation has to save the same tensors for backward as the run that it repeats, so it
    updates as that did, and what it updates is thrown away: also where it is stopped half way, as
    torch does once it has what it needs.
    """
    buffers = dict(layer._buffers)
    observers = vars(layer).get("observers")
    try:
        layer._buffers.update({k: v.clone() for k, v in buffers.items() if v is not None})
        if observers:
            vars(layer)["observers"] = [_ignore]
        yield
    finally:
        layer._buffers.update(buffers)
        if observers:
            vars(layer)["observers"] = observers


def _ignore(_batch: Any) -> None:
    pass
