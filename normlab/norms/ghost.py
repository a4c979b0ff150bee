"""Ghost batch normalization (Hoffer, Hubara & Soudry 2017): statistics over chunks of the batch."""

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from normlab.norms.base import (
    BatchStatistics,
    PopulationNorm,
    Source,
    check_nbs,
    complement,
    move_towards,
)

__all__ = ["GhostBatchNorm"]

Grouping = Literal["contiguous", "interleaved"]
Population = Literal["mean", "pooled", "first", "sequential"]


class GhostBatchNorm(PopulationNorm):
    """Batch norm of chunks of `nbs` samples, each normalized with its own mean and variance.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over the
    samples and positions of a chunk, per channel. Outputs and gradients are those of G = N / nbs
    separate batch norms with shared weight and bias, hence of G workers with per-worker BN, or of G
    accumulated micro-batches of nbs samples. At test, plain running statistics and any batch size.

    Population: libraries disagree about what it follows, so it is an argument. With a chunk's
    mean m_k, biased variance v_k, unbiased variance u_k, M elements per chunk and channel, and
    a = 1 - decay, one forward does

    ============  ====================================================  ==========================
    population    mean, variance                                        who
    ============  ====================================================  ==========================
    "mean"        r += a (avg m_k - r), r += a (avg u_k - r)            timm, mmengine over workers
    "pooled"      r += a (avg m_k - r),                                 BN of the whole batch
                  r += a (GM/(GM-1) (avg v_k + avg (m_k - m)^2) - r)
    "first"       r += a (m_1 - r), r += a (u_1 - r)                    tensorpack (stores v_1)
    "sequential"  for k = 1..G: r += a/G (m_k - r), r += a/G (u_k - r)  composer
    ============  ====================================================  ==========================

    "sequential" in closed form: r (1-b)^G + sum_k b (1-b)^(G-k) m_k with b = a/G, so that less than
    a of the old value is forgotten. "mean" leaves out the variance between chunk means; "pooled"
    has it (law of total variance). With one chunk all four are torch's rule.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        nbs: samples per chunk, at least 2; must divide every batch that its chunks normalize.
        grouping: which samples form chunk k of G: "contiguous" k*nbs .. (k+1)*nbs - 1, or
            "interleaved" k, k+G, k+2G, ... (cifar10-fast).
        population: what the running statistics follow, see above.
        eps: added to the variance.
        decay: share of the running statistics that stays at each forward (torch's 1 - momentum).
        affine: learn a weight and a bias per channel, shared by all chunks.
        statistics, update: choices of a batch norm, see PopulationNorm.

    Limits: with nbs == N it is BatchNorm; with one sample per chunk it would be InstanceNorm, and
    is refused. Errors: ValueError for the arguments above; in forward see PopulationNorm. Second
    derivatives exist for contiguous inputs only, forward-mode ones for small ones of those.

    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1. Peers: the table above; in composer a batch
    that nbs does not divide has chunks of another size, here it is an error, and the state_dict
    keys are BatchNorm2d's.
    """

    batch: ClassVar[str] = "ghost"

    def __init__(
        self,
        num_features: int,
        *,
        nbs: int,
        grouping: Grouping = "contiguous",
        population: Population = "mean",
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, decay=decay, affine=affine, statistics=statistics, update=update
        )
        check_nbs(nbs, "ghost batch norm")
        if grouping not in get_args(Grouping):
            raise ValueError(f"grouping is one of {get_args(Grouping)}, not {grouping!r}")
        if population not in get_args(Population):
            raise ValueError(f"population is one of {get_args(Population)}, not {population!r}")
        self.nbs = nbs
        self.grouping: Grouping = grouping
        self.population: Population = population

    def ema_step(self, mean: Tensor, var: Tensor, batch: BatchStatistics, decay: float) -> None:
        """Move `mean` and `var` (C,), in place, by this layer's population rule."""
        if self.population == "mean":
            super().ema_step(mean, var, batch, decay)
            return
        weight = complement(decay)
        groups = batch.mean.size(0)
        unbiased = batch.unbiased()
        if self.population == "pooled":
            total = batch.count * groups
            pooled = batch.var.mean(0) + batch.mean.var(0, correction=0)
            move_towards(mean, var, batch.mean.mean(0), pooled * (total / (total - 1)), weight)
        elif self.population == "first":
            move_towards(mean, var, batch.mean[0], unbiased[0], weight)
        else:
            # The G steps at once: what they keep, and the share of each chunk in what they add.
            kept = (1 - weight / groups) ** groups
            shares = (1 - weight / groups) ** torch.arange(
                groups - 1, -1, -1, dtype=batch.mean.dtype, device=batch.mean.device
            )
            shares /= shares.sum()
            move_towards(mean, var, shares @ batch.mean, shares @ unbiased, 1 - kept)

    def _form_groups(self) -> tuple[int | None, bool]:
        return self.nbs, self.grouping == "interleaved"

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, nbs={self.nbs}, grouping={self.grouping}, "
            f"population={self.population}"
        )
