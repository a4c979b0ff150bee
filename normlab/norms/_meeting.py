"""How ranks make sure that they are in the same call of the same synchronized layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from normlab import dist

__all__ = ["Call", "Meeting", "Watch", "agree", "reserve"]

_used: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()
"""How many layers have numbers in each group: correct programs have equal orders on all ranks."""


def reserve(group: ProcessGroup, layers: int) -> int:
    """The first of so many numbers that no other layer of the group has."""
    first = _used.get(group, 0)
    _used[group] = first + layers
    return first


@dataclass
class Watch:
    """What the synchronized layers of one network and group know of each other."""

    names: dict[int, str]
    always: bool
    left: int = 0
    """How many calls are still to be checked before their exchange."""

    def add(self, number: int, name: str) -> None:
        self.names[number] = name
        self.left += 1

    def due(self) -> bool:
        self.left -= 1
        return self.always or self.left >= 0


class Call(NamedTuple):
    """One call of a layer on this rank."""

    layer: int
    number: int
    channels: int
    watch: Watch | None

    @property
    def names(self) -> dict[int, str]:
        return self.watch.names if self.watch else {}

    def check(self, device: torch.device, group: ProcessGroup | None) -> None:
        """Compare with the other ranks' calls, where this one is to be checked."""
        if self.watch is not None and self.watch.due():
            self._exchange(device, group, "forward")

    def check_again(self, device: torch.device, group: ProcessGroup | None) -> None:
        """The same in its backward pass, where all are checked."""
        if self.watch is not None and self.watch.always:
            self._exchange(device, group, "backward")

    def _exchange(self, device: torch.device, group: ProcessGroup | None, direction: str) -> None:
        with self.explained(direction):
            heads = dist.stack(torch.tensor(self[:3], device=device), group).tolist()
        self.compare(heads)

    def compare(self, heads: list[list[int]]) -> None:
        """Raise RuntimeError where ranks are in different calls: of each its layer, number and
        channels."""
        if all(head == heads[0] for head in heads):
            return
        told = ", ".join(
            f"rank {rank}: call {number} of {self.names.get(layer, f'layer {layer}')}"
            + f" ({channels} channels)" * (channels != self.channels)
            for rank, (layer, number, channels) in enumerate(heads)
        )
        order = "" if self.names else "; layers are numbered in the order of first use"
        raise RuntimeError(
            f"ranks are in different synchronized layers, or calls of one ({told}{order})"
        )

    @contextmanager
    def explained(self, direction: str) -> Iterator[None]:
        """A failed exchange, as with a rank that never came, says in which layer it was."""
        try:
            yield
        except RuntimeError as error:
            name = self.names.get(self.layer, f"layer {self.layer}")
            raise RuntimeError(
                f"{name}, a synchronized layer, has not got the other ranks' part of the "
                f"{direction} pass of its call {self.number}: {error}"
            ) from error


class Meeting(NamedTuple):
    """Where the ranks of a group meet in the backward pass of a call."""

    call: Call
    group: ProcessGroup | None

    def sum(self, own: Tensor) -> Tensor:
        """The sum of the ranks' numbers, in place."""
        self.call.check_again(own.device, self.group)
        with self.call.explained("backward"):
            distributed.all_reduce(own, group=self.group)
        return own


def agree(heads: list[list[int]], refusal: ValueError | None) -> None:
    """Raise, on every rank, where ranks are in different modes, or one has a refusal.

    heads: per rank whether the rank refuses the call, whether it updates, and whether it computes
    gradients.
    """
    if refusal is not None:
        raise refusal
    if refused := [rank for rank, head in enumerate(heads) if head[0]]:
        raise RuntimeError(f"ranks {refused} refuse what a synchronized layer is called with there")
    updates, learns = zip(*(head[1:] for head in heads), strict=True)
    for mode, of_ranks in (("update", updates), ("compute gradients", learns)):
        if len(set(of_ranks)) > 1:
            raise RuntimeError(
                f"some ranks {mode} in a synchronized layer, some do not: "
                f"{[bool(value) for value in of_ranks]}"
            )
