"""The statistics that a population follows where they are not the ones that normalized."""

import torch
from torch import Tensor

from normlab.norms.base import BatchStatistics

__all__ = ["moments"]


@torch.no_grad()
def moments(x: Tensor, population: str = "") -> BatchStatistics:
    """Mean and biased variance of x (N, C, ...) over all but the channels, float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    over = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, over, correction=0)
    return BatchStatistics(mean[None], var[None], x.numel() // x.size(1), population)
