"""L1 batch normalization: the mean absolute deviation in place of the standard deviation."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.norms.base import BatchStatistics, PopulationNorm

__all__ = ["L1BatchNorm"]

NORMAL = math.sqrt(math.pi / 2)
"""Standard deviation over mean absolute deviation, of normal values."""


class L1BatchNorm(PopulationNorm):
    """Batch norm with s = sqrt(pi/2) * mean|x - mean| in place of the standard deviation.

    y = weight * (x - mean) / (s + eps) + bias, mean and s over samples and positions, per channel.
    sqrt(pi/2) makes s the standard deviation of normal values, and only of those: a bell with
    heavier tails has a smaller s. s scales as x does. eps is added to s, not to its square. Where x
    equals its mean, |.| has the derivative 0.

    Population: the buffers are BatchNorm2d's; `running_var` holds the square of the scale, so that
    a checkpoint means the same to either layer on normal data, and tests use sqrt(running_var). It
    follows s^2 n/(n-1) of n elements, where BatchNorm follows its unbiased variance: of n normal
    values the mean of s is sigma sqrt((n-1)/n). Observers get s^2 as the biased variance.

    Estimated statistics (`normlab.population`), from the s_B and mean_B of batches B: "mean"
    averages s_B^2 n/(n-1), as the buffers do; "pooled" is E[s_B^2] + E[mean_B^2] - E[mean_B]^2: s^2
    exactly for a single batch, and up to the order of s^2/n for i.i.d. batches of n elements. The s
    of all elements is no function of the batches' s: where batches differ in their means for a
    reason, as with one class each, "pooled" is right for a variance and only near for s; estimate
    from shuffled data. "layerwise", which would have to be exact, refuses this layer.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to s.
        decay: share of the running statistics that stays at each update (torch's 1 - momentum).
        affine: learn a weight and a bias per channel.
        statistics, update: choices of a batch norm, see PopulationNorm.

    Limits: BatchNorm on normal data of many elements; values of +-a have s = sqrt(pi/2) a, where
    BatchNorm has a. Errors: see PopulationNorm.

    Source: Hoffer, Banner, Golan & Soudry 2018 ("Norm matters"). Peers: the authors' code averages
    1/s for the tests, and gives the newest batch the weight 0.9.
    """

    pools: ClassVar[bool] = False

    def _normalize(
        self, x: Tensor, groups: int, interleaved: bool, count: int
    ) -> tuple[Tensor, BatchStatistics | None]:
        assert not interleaved, "this layer forms no groups of its own"
        z = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (groups, -1))
        others = [1, *range(3, z.dim())]
        mean = z.mean(others, keepdim=True)
        centered = z - mean
        scale = NORMAL * centered.abs().mean(others, keepdim=True)
        per_channel = (1, 1, -1, *[1] * (x.dim() - 2))
        slope = 1 / (scale + self.eps)
        if self.weight is not None:
            slope = slope * self.weight.view(per_channel)
        y = centered * slope
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        square = scale.detach().square()
        statistics = BatchStatistics(mean.detach().view(groups, -1), square.view(groups, -1), count)
        if self.updates:
            self.ema_step(self.running_mean, self.running_var, statistics, self.decay)
        return y.flatten(0, 1).to(x.dtype), statistics

    def _apply_population(self, x: Tensor) -> Tensor:
        # 1 / sqrt((s + eps)^2 + 0) is what the operator of batch norm makes of these.
        square = (self.running_var.sqrt() + self.eps).square()
        return F.batch_norm(x, self.running_mean, square, self.weight, self.bias, False, eps=0.0)
