"""Batch normalization (Ioffe & Szegedy 2015), as torch.nn.BatchNorm1d/2d/3d."""

import torch
from torch import Tensor

from normlab.norms._grouped import grouped_batch_norm
from normlab.norms.base import BatchStatistics, PopulationNorm, Source, complement, move_towards

__all__ = ["BatchNorm"]


class BatchNorm(PopulationNorm):
    """Batch norm whose group is the whole forward batch (the micro-batch of one rank).

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over samples
    and positions, per channel.

    Population: r += (1 - decay) (b - r) at every forward in train(), for the mean and the
    *unbiased* variance. Accumulating k micro-batches per optimizer step moves it k times.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the variance.
        decay: share of the running statistics that stays at each update (torch's 1 - momentum).
        affine: learn a weight and a bias per channel.
        statistics, update: choices of a batch norm, see PopulationNorm.
        cumulative: the running statistics are the plain averages of all batches' (torch's
            momentum=None), r += (b - r) / t at the t-th update, t kept in num_batches_tracked;
            `decay` is not used then. Setting that buffer to 0 starts the average anew.

    Where the fused kernels are used (`normlab.kernels`), results are torch's up to rounding, and
    small spreads about large means are kept in every memory layout. On the pure path, in every
    forward that updates or computes gradients, and with population statistics, outputs, gradients
    and buffers are bitwise those of torch's layer with momentum round(1 - decay, 12), its
    rounding included: on a CPU torch accumulates float32 statistics in double for NCHW but in
    float32 for channels_last and (N, C), where a spread of 1 about a mean of 1e4 is lost in 65,536
    elements. Batch statistics that only normalize (update=False under no_grad, as in
    `population.estimate`) equal torch's up to rounding, for contiguous inputs on a CPU, where
    another route takes half the time; elsewhere they are bitwise torch's, unless it would lose the
    spread. Compiled, a cumulative average equals the eager one up to rounding: a graph cannot read
    t as a number.

    Limits: of one sample, InstanceNorm; with population statistics an affine map per channel, which
    `normlab.surgery` folds into the convolution before it. Errors: see PopulationNorm.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2. Peers: torch and cuDNN keep the unbiased
    variance too; detectron2's NaiveSyncBatchNorm and tensorpack's Sync and Ghost BN the biased one,
    and Keras' `momentum` is what `decay` is here.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
        cumulative: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps=eps, decay=decay, affine=affine, statistics=statistics, update=update
        )
        self.cumulative = cumulative

    @property
    def momentum(self) -> float:
        """The weight of the newest batch; of the next one in a cumulative average."""
        if not self.cumulative:
            return complement(self.decay)
        return 1.0 / float(self.num_batches_tracked + 1)

    def _normalize(
        self, x: Tensor, groups: int, interleaved: bool, count: int
    ) -> tuple[Tensor, BatchStatistics | None]:
        one = groups == 1 and not torch.compiler.is_compiling()
        if one or not (self.cumulative and self.updates):
            return super()._normalize(x, groups, interleaved, count)
        y, mean, var = grouped_batch_norm(
            x, groups, interleaved=interleaved, weight=self.weight, bias=self.bias, eps=self.eps
        )
        batch = BatchStatistics(mean, var, count)
        newest = 1 / (self.num_batches_tracked + 1).to(self.running_mean.dtype)
        move_towards(
            self.running_mean, self.running_var, mean.mean(0), batch.unbiased().mean(0), newest
        )
        return y, batch

    def extra_repr(self) -> str:
        return super().extra_repr() + ", cumulative=True" * self.cumulative
