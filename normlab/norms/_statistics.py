"""The statistics that a forward used, and how running ones follow them."""

from dataclasses import dataclass, replace

from torch import Tensor

from normlab import kernels

__all__ = ["BatchStatistics", "complement", "follow", "move_towards"]


@dataclass(frozen=True)
class BatchStatistics:
    """The statistics that one forward normalized with, a row per group of samples.

    mean and var (biased) are (G, C), detached, float32 (float64 for a float64 input); count is the
    number of elements behind each; population, of `PopulationNorm.populations`, follows them.
    """

    mean: Tensor
    var: Tensor
    count: int
    population: str = ""

    def rounded(self) -> "BatchStatistics":  # to float32
        return replace(self, mean=self.mean.float(), var=self.var.float())

    def unbiased(self) -> Tensor:
        return self.var * (self.count / (self.count - 1))


def complement(share: float) -> float:
    """1 - share without its last places: decay of a momentum and back, 0.1 of 0.9 exactly."""
    return round(1 - share, 12)


def follow(mean: Tensor, var: Tensor, batch: BatchStatistics, weight: float) -> None:
    """Move mean and var (C,) in place by `weight` of the way to the averages of the groups'."""
    means, vars = batch.mean, batch.var
    if not kernels.move_towards(mean, var, means, vars, count=batch.count, weight=weight):
        move_towards(mean, var, batch.mean.mean(0), batch.unbiased().mean(0), weight)


def move_towards(
    mean: Tensor, var: Tensor, to_mean: Tensor, to_var: Tensor, weight: float | Tensor
) -> None:
    """Move `mean` and `var` in place by `weight` of the way to `to_mean` and `to_var`.

    weight is a number or a tensor of one, in the precision of `mean`.
    """
    mean.lerp_(to_mean.to(mean.dtype), weight)
    var.lerp_(to_var.to(var.dtype), weight)
