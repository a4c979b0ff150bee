"""What an estimate of this model's statistics needs: samples, and samples in a batch.

Tables 1 and 2 of Wu & Johnson (2021) on a user's own model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normlab.diagnose.case import costs
from normlab.diagnose.forwards import Forwards, Losses
from normlab.diagnose.moments import Moments
from normlab.population import Population

__all__ = ["Curve", "Snapshots", "by_batch", "by_samples"]


@dataclass(frozen=True)
class Curve:
    """Loss and error of one set of samples with estimates of growing cost.

    xs: what they cost; needed: the least of them that does as well as the last, or None.
    """

    xs: list[int]
    losses: list[float]
    errors: list[float]
    needed: int | None


class Snapshots:
    """The estimates of a pass after 1, 2, 4, ... batches."""

    def __init__(self) -> None:
        self.taken: dict[int, Population] = {}
        self._next = 1

    def look(self, batches: int, samples: int, moments: dict[str, Moments]) -> None:
        """Called after every batch with the samples so far."""
        if batches == self._next:
            self._next *= 2
            self.taken[samples] = {name: one.statistics() for name, one in moments.items()}


def _curve(points: dict[int, Losses]) -> Curve:
    best = points[max(points)]
    enough = [x for x in sorted(points) if not costs(points[x], best)]
    needed = next((x for x in enough if all(y in enough for y in points if y > x)), None)
    xs = sorted(points)
    return Curve(xs, [points[x].loss for x in xs], [points[x].error for x in xs], needed)


def by_samples(
    forwards: Forwards, held: list[Any], snapshots: Snapshots, whole: tuple[int, Population]
) -> Curve:
    """Estimates of the first samples, and of all of them (`whole`), each scored on `held`."""
    populations = dict(snapshots.taken)
    populations[whole[0]] = whole[1]
    populations = dict(sorted(populations.items())[-6:])
    forwards.expect(len(populations) * len(held))
    names = forwards.estimated.keys()
    points = {
        samples: forwards.run(held, statistics={n: s for n, s in found.items() if n in names})
        for samples, found in populations.items()
    }
    return _curve(points)


def by_batch(forwards: Forwards, some: list[Any], held: Iterable[Any], sizes: list[int]) -> Curve:
    """Estimates of the samples in `some`, in batches of each size, each scored on `held`."""
    held = list(held)
    forwards.expect(len(sizes) * (len(some) + len(held)))
    points = {}
    for size in sizes:
        moments: dict[str, Moments] = {}

        def look(
            name: str, x: Tensor, size: int = size, moments: dict[str, Moments] = moments
        ) -> None:
            moments.setdefault(name, Moments(x.size(1), x.device)).add(x, min(size, x.size(0)))

        forwards.run(some, batch=True, group_size=size, watch=look)
        found = {n: moments[n].statistics() for n in forwards.estimated if n in moments}
        points[size] = forwards.run(held, statistics=found)
    return _curve(points)
