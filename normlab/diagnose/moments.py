"""What one layer sees in a pass over the data, from the moments of every sample.

The mean and variance of each sample over its positions, (N, C), hold all that a diagnosis asks for:
merged they are the moments of any batch and of the population, and their own spread says how far
the statistics of a batch scatter.
"""

import torch
from torch import Tensor

from normlab.population import Statistics
from normlab.population.accumulate import Pooled

__all__ = ["Moments", "Spread", "of_samples"]


def of_samples(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of every sample and channel of x (N, C, ...) over its positions.

    (N, C) each, in float64 of sums that were taken in the precision of x; and the positions.
    """
    flat = x.detach().reshape(x.size(0), x.size(1), -1)
    if flat.size(2) == 1:
        mean = flat[:, :, 0].double()
        return mean, torch.zeros_like(mean), 1
    var, mean = torch.var_mean(flat.float() if flat.itemsize < 4 else flat, dim=2, correction=0)
    return mean.double(), var.double(), flat.size(2)


class Spread:
    """Mean and variance of rows (C,), merged as Chan et al. (1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Include rows (R, C)."""
        count = rows.size(0)
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if self.count == 0:
            self.count, self.mean, self._squares = count, mean, squares
            return
        total = self.count + count
        difference = mean - self.mean
        self._squares = self._squares + squares + difference**2 * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """Unbiased variance (C,) of the rows; NaN of fewer than two."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return self._squares / (self.count - 1)


class Moments:
    """One layer's: `samples` (their means), `within` (their variances), and of its batches.

    groups: the means of the batches; variances: their unbiased variances, as running averages take
    them. The population is `pooled`: the mean and biased variance of all elements.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        like = torch.zeros(channels, dtype=torch.float64, device=device)
        self.pooled = Pooled(like)
        self.samples, self.within = Spread(), Spread()
        self.groups, self.variances = Spread(), Spread()
        self.positions = 0
        self.group_size = 0

    def add(self, x: Tensor, group_size: int | None) -> None:
        """Include an input x (N, C, ...), normalized over groups of `group_size` samples."""
        self.include(*of_samples(x), group_size)

    def include(
        self, means: Tensor, variances: Tensor, positions: int, group_size: int | None
    ) -> None:
        """Include an input of which `of_samples` has told this."""
        samples, channels = means.shape
        size = group_size or samples
        self.positions, self.group_size = positions, max(self.group_size, size)
        self.samples.add(means)
        self.within.add(variances)
        by_group = means.reshape(-1, size, channels)
        mean = by_group.mean(1)
        var = variances.reshape(-1, size, channels).mean(1) + by_group.var(1, correction=0)
        count = size * positions
        counts = mean.new_full((mean.size(0), 1), count)
        self.pooled.add(mean, var, counts, samples * positions)
        if size == self.group_size:  # a short last batch scatters more than the others
            self.groups.add(mean)
            self.variances.add(var * (count / max(count - 1, 1)))

    def statistics(self) -> Statistics:
        """The population's; raises ValueError where nothing was seen."""
        found = self.pooled.result()
        if found is None:
            raise ValueError("no sample was seen")
        return found

    def expected_variance(self, nbs: float) -> Tensor:
        """The mean unbiased variance (C,) of batches of `nbs` samples drawn at random.

        n / (n - 1) (W + B (1 - 1 / nbs)) for W within samples, B between their means and n = nbs
        times positions elements: not the population's W + B where positions are alike.
        """
        between = self.samples.var * ((self.samples.count - 1) / self.samples.count)
        biased = self.within.mean + between * (1 - 1 / nbs)
        elements = nbs * self.positions
        return biased * (elements / (elements - 1))
