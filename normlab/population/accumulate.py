"""What a layer saw, added up in float64: mergeable, so that any split of the data gives the same.

An accumulation takes groups of elements (`add`) and other accumulations (`merge`), in any order:
several processes that each saw a part of the data merge theirs into that of the whole, weighted by
elements (`state` is what they exchange, `load` what they make of it). A merge leaves nothing out;
only rounding depends on the order, so merge in a fixed one.
"""

from collections.abc import Iterator
from typing import Protocol, Self

import torch
from torch import Tensor

from normlab.norms.base import BatchStatistics
from normlab.population.values import Statistics

__all__ = ["Accumulation", "Collector", "Mean", "Pooled", "Watcher", "split"]


class Accumulation(Protocol):
    """What the statistics of one population come from, on this rank or on several."""

    def state(self) -> Tensor:
        """All that was seen as one float64 vector, whose length depends on the channels only."""

    def load(self, states: Tensor) -> None:
        """Hold what these states (ranks, length) hold together, merged in their order."""

    def result(self) -> Statistics | None:
        """What was seen, or None if it was nothing."""


class Watcher(Accumulation, Protocol):
    """An accumulation of what a layer's forwards tell."""

    def observe(self, batch: BatchStatistics) -> None:
        """Include the statistics of one forward."""


def split(states: Tensor, numbers: int, like: Tensor) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Of each state: the `numbers` at its beginning, and its two vectors, beside `like` (C,)."""
    for state in states.to(like.device):
        first, second = state[numbers:].chunk(2)
        yield [int(number) for number in state[:numbers].tolist()], first, second


class Pooled:
    """Mean and biased variance of all elements seen, merged as Chan et al. (1979) in float64.

    The same for any split of the data into batches and groups, up to rounding: no difference of
    large squares is ever taken.

    State: `count` elements a channel, their `mean` and their `squares` about it, (C,) each.
    """

    def __init__(self, like: Tensor) -> None:
        """Nothing seen yet, of as many channels as `like` (C,) has and on its device."""
        self._begin(like)

    def _begin(self, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)

    def add(self, means: Tensor, variances: Tensor, counts: Tensor, count: int) -> None:
        """Merge groups: means and biased variances (G, C), elements (G, 1), and their sum."""
        mean = (counts * means).sum(0) / count
        squares = (counts * (variances + (means - mean).square())).sum(0)
        self._include(mean, squares, count)

    def merge(self, other: Self) -> None:
        """Include all that `other` saw."""
        self._include(other.mean, other.squares, other.count)

    def state(self) -> Tensor:
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.squares])

    def load(self, states: Tensor) -> None:
        self._begin(self.mean)
        for (count,), mean, squares in split(states, 1, self.mean):
            self._include(mean, squares, count)

    def _include(self, mean: Tensor, squares: Tensor, count: int) -> None:
        if count == 0:
            return
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total

    def result(self) -> Statistics | None:
        """What was seen, or None if it was nothing."""
        if self.count == 0:
            return None
        return Statistics(self.mean, self.squares / self.count, self.count)


class Mean:
    """Means of the groups' means and of their unbiased variances, weighted by their elements.

    State: `count` elements a channel, and the averages `mean` and `var`, (C,) each.
    """

    def __init__(self, like: Tensor) -> None:
        """Nothing seen yet, of as many channels as `like` (C,) has and on its device."""
        self._begin(like)

    def _begin(self, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        self.var = torch.zeros_like(self.mean)

    def add(self, means: Tensor, variances: Tensor, counts: Tensor, count: int) -> None:
        """Merge groups: means and biased variances (G, C), elements (G, 1), and their sum."""
        mean = (counts * means).sum(0) / count
        var = (counts * (variances * (counts / (counts - 1)))).sum(0) / count
        self._include(mean, var, count)

    def merge(self, other: Self) -> None:
        """Include all that `other` saw."""
        self._include(other.mean, other.var, other.count)

    def state(self) -> Tensor:
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.var])

    def load(self, states: Tensor) -> None:
        self._begin(self.mean)
        for (count,), mean, var in split(states, 1, self.mean):
            self._include(mean, var, count)

    def _include(self, mean: Tensor, var: Tensor, count: int) -> None:
        if count == 0:
            return
        self.count += count
        self.mean = self.mean + (mean - self.mean) * (count / self.count)
        self.var = self.var + (var - self.var) * (count / self.count)

    def result(self) -> Statistics | None:
        """What was seen, or None if it was nothing."""
        if self.count == 0:
            return None
        return Statistics(self.mean, self.var, self.count)


class Collector:
    """Hands what a layer observed to an accumulation, many groups at a time and in float64.

    Merging every batch as it comes would cost a small network a percent of its forward. What waits
    is copied to a place made beforehand: small tensors that stay among the activations scatter the
    memory that those reuse.
    """

    rows = 64  # groups that wait, at least

    def __init__(self, accumulation: Pooled | Mean) -> None:
        self._accumulation = accumulation
        self.counts: list[int] = []
        self._make_room(accumulation.mean, self.rows)

    def _make_room(self, like: Tensor, rows: int) -> None:
        self.means = like.new_empty((rows, like.size(-1)))
        self.variances = torch.empty_like(self.means)

    def observe(self, batch: BatchStatistics) -> None:
        groups = batch.mean.size(0)
        if len(self.counts) + groups > self.means.size(0):
            self._flush()
            if groups > self.means.size(0):
                self._make_room(self.means, groups)
        place = slice(len(self.counts), len(self.counts) + groups)
        self.means[place].copy_(batch.mean)
        self.variances[place].copy_(batch.var)
        self.counts += [batch.count] * groups

    def _flush(self) -> None:
        if not self.counts:
            return
        rows = len(self.counts)
        counts = self.means.new_tensor(self.counts)[:, None]
        self._accumulation.add(self.means[:rows], self.variances[:rows], counts, sum(self.counts))
        self.counts = []

    def state(self) -> Tensor:
        self._flush()
        return self._accumulation.state()

    def load(self, states: Tensor) -> None:
        self._accumulation.load(states)

    def result(self) -> Statistics | None:
        self._flush()
        return self._accumulation.result()
