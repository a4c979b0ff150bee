"""Stored against precise statistics, layer by layer, in the units that tell how far is far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from normlab.diagnose.moments import Moments
from normlab.diagnose.thresholds import BATCHES, CONSTANT, DECAY, SIGNIFICANT
from normlab.population.ema import ema_noise

__all__ = ["Pair", "explained", "noise", "scatter"]


@dataclass(frozen=True)
class Pair:
    """One layer's stored statistics beside those of the data; (C,), float64.

    Channels of which either variance is no positive number are left out by `mask`.
    """

    name: str
    mean: Tensor
    var: Tensor
    moments: Moments
    eps: float

    @property
    def precise_mean(self) -> Tensor:
        return self.moments.statistics().mean

    @property
    def precise_var(self) -> Tensor:
        return self.moments.statistics().var

    @property
    def mask(self) -> Tensor:
        """Channels that can be compared: finite, varying ones."""
        alive = self.precise_var > 1e-6 * self.eps
        return torch.isfinite(self.mean) & torch.isfinite(self.var) & (self.var > 0) & alive

    def distance(self, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
        """Of the stored statistics from these (default: the precise ones), per channel in `mask`.

        dm^2 / max(v, v') + log^2(v / v') / 2 with eps in every variance, as a layer has it: the
        squared difference in standard deviations, and the term for the variance that the divergence
        of two normal laws has to second order. Dead channels, whose output eps decides, are near.
        """
        keep = self.mask
        mean = self.precise_mean if mean is None else mean
        var = self.precise_var if var is None else var
        mean, var, own = mean[keep], var[keep].clamp_min(0) + self.eps, self.var[keep] + self.eps
        shift = (self.mean[keep] - mean).square() / torch.maximum(var, own)
        return shift + (own / var).log().square() / 2

    def far(self) -> float:
        """Mean distance over the channels; 0 where there is none to compare."""
        found = self.distance()
        return float(found.mean()) if len(found) else 0.0

    def in_spreads(self) -> float:
        """Mean squared difference of the means, in units of a batch mean's variance.

        What the precise mean itself is off is taken out. NaN of fewer than BATCHES batches, and
        where these have one mean: behind a linear map of another norm's output.
        """
        groups = self.moments.groups
        if groups.count < BATCHES or not self.mask.any():
            return math.nan
        keep = self.mask
        var = self.precise_var[keep] + self.eps
        shift = ((self.mean - self.precise_mean)[keep].square() / var).mean()
        spread = (groups.var[keep] / var).mean()
        return float(shift / spread) - 1 / groups.count if spread > CONSTANT else math.nan

    def variances_in_spreads(self) -> float:
        """The same of the variances: from the mean of the batches' unbiased ones."""
        groups = self.moments.variances
        if groups.count < BATCHES or not self.mask.any():
            return math.nan
        keep = self.mask
        var = (self.precise_var[keep] + self.eps).square()
        shift = ((self.var - groups.mean)[keep].square() / var).mean()
        spread = (groups.var[keep] / var).mean()
        return float(shift / spread) - 1 / groups.count if spread > CONSTANT else math.nan

    def beyond_noise(self) -> bool:
        """Whether the statistics are further off than an average's noise leaves a layer.

        All channels may hang on one direction of the inputs, as the first layer's do on brightness:
        then their mean squared error is that of a single normal draw, whose variance is that of the
        average and of the precise statistics. True where too few batches tell.
        """
        off = [self.in_spreads(), self.variances_in_spreads()]
        band = SIGNIFICANT**2 * (noise() + 1 / max(self.moments.groups.count, 1))
        known = [value for value in off if not math.isnan(value)]
        return not known or max(known) > band

    def in_deviations(self) -> float:
        """Root of the mean squared difference of the means, in standard deviations."""
        keep = self.mask
        if not keep.any():
            return math.nan
        var = torch.maximum(self.precise_var, self.var)[keep]
        return float(((self.mean - self.precise_mean)[keep].square() / var).mean().sqrt())

    def log_ratio(self) -> Tensor:
        """log(stored / precise variance) of the channels in `mask`."""
        keep = self.mask
        return (self.var[keep] / self.precise_var[keep]).log()

    def ratio(self) -> float:
        """Geometric mean over the channels of stored / precise variance."""
        found = self.log_ratio()
        return float(found.mean().exp()) if len(found) else math.nan


def explained(pairs: Mapping[str, Pair], law: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Share of the distance of all layers that is gone once the stored statistics are set against
    what a cause predicts (`law`: mean and var by layer) in place of the precise ones.

    Every layer counts alike. 1: all of it; negative: the cause is further off than none.
    """
    before = after = 0.0
    for name, pair in pairs.items():
        before += float(pair.distance().mean())
        after += float(pair.distance(*law[name]).mean())
    return 1 - after / before if before > 0 else 0.0


def noise() -> float:
    """Squared error of what a healthy average holds, in units of a batch's variance."""
    return ema_noise(DECAY)


def scatter(pairs: Mapping[str, Pair]) -> tuple[Tensor, Tensor]:
    """Squared errors of the stored means and variances of all layers, in units of a batch's."""
    means = torch.tensor([pair.in_spreads() for pair in pairs.values()], dtype=torch.float64)
    variances = torch.tensor([p.variances_in_spreads() for p in pairs.values()]).double()
    return means, variances
