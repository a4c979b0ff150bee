"""Batches that can be passed over again and again, the same each time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batches", "moved", "samples_of"]


@dataclass(frozen=True)
class Batches:
    """Batches of a user's data: each pass gives the same ones in the same order.

    A pass makes one after the other: memory does not grow with their number.

    name: what was asked for, as reports call it.
    batch_size: samples in each but perhaps the last; None where the user's function decides.
    samples: samples of a pass, None where it has to end to tell.
    labelled: whether batches are (x, y) with labels; False: (x, None); None: it is not known.
    """

    name: str
    plan: Callable[[], Iterable[Any]]
    """What there is to load in a pass, a piece for each batch."""
    load: Callable[[Any], Any]
    """A batch from its piece."""
    batch_size: int | None
    samples: int | None
    labelled: bool | None
    number: int | None
    """Batches of a pass, of all ranks together."""
    workers: int = 0
    """Threads that load ahead; 0: none."""
    device: torch.device | None = None
    share: tuple[int, int] = (0, 1)

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = self.share
        for batch in self._loaded(islice(self.plan(), rank, None, ranks)):
            yield batch if self.device is None else moved(batch, self.device)

    def __len__(self) -> int:
        """Batches of a pass; TypeError where that is not known."""
        if self.number is None:
            raise TypeError(f"how many batches {self.name} has is known at the end of a pass")
        rank, ranks = self.share
        return len(range(rank, self.number, ranks))

    def on(self, device: torch.device) -> "Batches":
        """The same, on the device."""
        return replace(self, device=device)

    def of_rank(self, rank: int, ranks: int) -> "Batches":
        """A rank's share: every `ranks`-th batch, beginning with the `rank`-th."""
        return replace(self, share=(rank, ranks))

    def whole(self) -> "Batches":
        """Without a shorter last batch, where the size is known: statistics of a batch of one or
        two samples are those of no batch that a model meets."""
        if not self.batch_size or self.samples is None or self.samples % self.batch_size == 0:
            return self
        full = self.samples // self.batch_size
        return replace(
            self,
            plan=lambda: islice(self.plan(), full),
            samples=full * self.batch_size,
            number=full,
        )

    def _loaded(self, pieces: Iterator[Any]) -> Iterator[Any]:
        if not self.workers:
            yield from map(self.load, pieces)
            return
        waiting: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for piece in pieces:
                    waiting.append(pool.submit(self.load, piece))
                    if len(waiting) > self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def samples_of(batch: Any) -> int:
    """The samples of a batch: the rows of the first tensor in it, or the entries of a list of
    tensors (images of several sizes).

    Raises ValueError for a batch without a tensor.
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list) and batch:
        first = batch[0]
        if isinstance(first, list) and first and isinstance(first[0], Tensor):
            return len(first)
        return samples_of(first)
    if isinstance(held := getattr(batch, "x", None), Tensor):
        return len(held)
    raise ValueError(f"a batch of type {type(batch).__name__} holds no tensor to count samples by")


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device, in containers of the same kinds."""
    if isinstance(batch, dict):
        return {name: moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    return batch
