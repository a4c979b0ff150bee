"""The ranks that make an estimate together, and what each has to learn from the others."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from normlab import dist
from normlab.norms.base import PopulationNorm
from normlab.population.accumulate import Accumulation

__all__ = ["Attempt", "Group", "Together", "without_broadcasts"]

Group = ProcessGroup | Literal["alone"] | None
"""Which ranks estimate together: those of a process group, all (None), or this process alone."""


@dataclass
class Attempt:
    """Something that a rank tried, and the others have to know the end of."""

    failure: Exception | None = None


class Together:
    """The ranks that make an estimate together; with a single one nothing is exchanged.

    A rank that fails must not leave the others waiting. So what may fail is an `attempt`, which
    every rank ends with an `exchange`: it raises on all ranks if one has failed.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        if isinstance(group, str) and group != "alone":
            raise ValueError(
                f"group is a process group, None (all ranks) or 'alone', not {group!r}"
            )
        self._group = None if isinstance(group, str) else group
        self.rank, self.size = (0, 1) if group == "alone" else dist.place(self._group)
        self._device = dist.home(model, self._group) if self.size > 1 else torch.device("cpu")

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """Keep an exception for the `exchange` that follows; with a single rank, just raise it."""
        made = Attempt()
        try:
            yield made
        except Exception as failure:
            if self.size == 1:
                raise
            made.failure = failure

    def exchange(self, own: Sequence[float] | Tensor, made: Attempt) -> Tensor:
        """`own` (n,) of all ranks in their order, (ranks, n) float64; all have the same n.

        Raises this rank's failure, or RuntimeError for another's.
        """
        values = torch.as_tensor(own, dtype=torch.float64, device=self._device)
        if self.size == 1:
            return values[None]
        head = values.new_tensor([made.failure is not None])
        parts = dist.stack(torch.cat([head, values]), self._group)
        if made.failure is not None:
            raise made.failure
        failed = parts[:, 0].nonzero().flatten().tolist()
        if failed:
            raise RuntimeError(f"the estimate failed on ranks {failed}: their own errors say why")
        return parts[:, 1:]

    def merge(
        self, parts: Sequence[Accumulation], numbers: Sequence[float], made: Attempt
    ) -> Tensor:
        """This rank's `parts` become those of all ranks; returns their `numbers` (ranks, n)."""
        if self.size == 1:
            return self.exchange(numbers, made)
        told = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        vectors = [told, *(part.state().to(self._device) for part in parts)]
        everything = self.exchange(torch.cat(vectors), made)
        of_ranks: tuple[Tensor, ...] = everything.split([len(v) for v in vectors], dim=1)
        for part, states in zip(parts, of_ranks[1:], strict=True):
            part.load(states)
        return of_ranks[0]

    def in_step(self, batches: Iterable[Any]) -> Iterator[Any]:
        """`batches`, for forwards in which the ranks wait for each other.

        Raises ValueError, on all ranks, where only some have another one.
        """
        rest: Iterator[Any] | None = None
        end = object()
        while True:
            batch: Any = end
            with self.attempt() as made:
                rest = iter(batches) if rest is None else rest
                batch = next(rest, end)
            have = self.exchange([batch is not end], made)[:, 0].tolist()
            if not any(have):
                return
            if not all(have):
                raise ValueError(
                    "layers that are synchronized over ranks need as many batches on each of them, "
                    "and some have one more: even them out, or give group_size, or take 'layerwise'"
                )
            yield batch

    def synchronized(self, layers: dict[str, PopulationNorm]) -> dict[str, bool]:
        """Layers that exchange in every forward: whether this rank speaks for what they see.

        Their statistics are those of a group of ranks, of which one has to count them. Raises
        ValueError for a group with ranks that do not take part here.
        """
        found = {}
        here = None
        for name, layer in layers.items():
            group = getattr(layer, "group", None)
            if layer.batch != "sync" or layer.group_size is not None or dist.place(group)[1] == 1:
                continue
            if here is None:
                everyone = distributed.get_process_group_ranks(dist.members(self._group))
                here = set(everyone) if self.size > 1 else {distributed.get_rank()}
            if not here.issuperset(distributed.get_process_group_ranks(dist.members(group))):
                raise ValueError(
                    f"{name or 'the model'} exchanges its statistics with ranks that take no part "
                    "in this estimate: let them, or give group_size, or take 'layerwise'"
                )
            found[name] = dist.place(group)[0] == 0
        return found


@contextmanager
def without_broadcasts(model: nn.Module) -> Iterator[None]:
    """Within the context, no DistributedDataParallel of `model` broadcasts buffers in a forward.

    It would before its first one, also in eval(): ranks without batches would not join, and the
    others' buffers would be overwritten in the middle of an estimate.
    """
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, own in zip(wrappers, before, strict=True):
            wrapper.require_forward_param_sync = own
