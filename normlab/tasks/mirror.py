"""A process group of any number of ranks in one process, for counting what ranks exchange.

All ranks but this one are mirrored: they hold what this one holds. A gather is copies, a sum is a
multiple, and nothing travels; what would is counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import Backend, HashStore, ProcessGroup, Store  # type: ignore[attr-defined]

__all__ = ["Traffic", "mirrored"]

NAME = "mirror"


class Traffic(ProcessGroup):
    """The ranks, with what this one has handed to its collectives so far.

    collectives: how many. volume: bytes of the tensors that it handed over, whatever an algorithm
    makes of them on the way.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.ranks = size
        self.collectives = 0
        self.volume = 0

    def getBackendName(self) -> str:
        return NAME

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], _: Any = None) -> Any:  # type: ignore[override]
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self._done(inputs, outputs)

    def allreduce(self, tensors: list[Tensor], _: Any = None) -> Any:  # type: ignore[override]
        tensors[0].mul_(self.ranks)
        return self._done(tensors, tensors)

    def broadcast(self, tensors: list[Tensor], _: Any = None) -> Any:  # type: ignore[override]
        return self._done(tensors, tensors)

    def _done(self, handed: list[Tensor], result: Any) -> Any:
        self.collectives += 1
        self.volume += sum(tensor.numel() * tensor.element_size() for tensor in handed)
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(result)
        return torch._C._distributed_c10d._create_work_from_future(future)


@contextmanager
def mirrored(ranks: int) -> Iterator[Traffic]:
    """Within the context this process is the first of so many ranks, which hold what it holds.

    Raises RuntimeError in a process that is a rank already.
    """
    if distributed.is_initialized():
        raise RuntimeError("this process is a rank already: it cannot be one of mirrored ranks")
    made: list[Traffic] = []

    def create(_: Store, rank: int, size: int, _timeout: timedelta) -> Traffic:
        made.append(Traffic(rank, size))
        return made[-1]

    Backend.register_backend(NAME, create, devices=["cpu"])
    distributed.init_process_group(NAME, rank=0, world_size=ranks, store=HashStore())
    try:
        yield made[0]
    finally:
        distributed.destroy_process_group()
