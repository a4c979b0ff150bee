"""Batch norm of groups of samples in float64, from the definition, with autograd's derivatives."""

import torch
from torch import Tensor


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    *,
    groups: int,
    interleaved: bool = False,
    span: int = 1,
    eps: float,
) -> dict[str, Tensor]:
    """y, dx, dweight, dbias, mean and var, each computed one group and span of channels at a time.

    weight and bias are (C,).
    """
    x, dy, weight, bias = (
        v.detach().double().contiguous().requires_grad_() for v in (x, dy, weight, bias)
    )
    samples, channels = x.shape[:2]
    size = samples // groups
    y = torch.zeros_like(x)
    means, variances = [], []
    for g in range(groups):
        of = [i for i in range(samples) if (i % groups if interleaved else i // size) == g]
        for first in range(0, channels, span):
            chosen = slice(first, first + span)
            part = x[of][:, chosen]
            mean = part.sum() / part.numel()
            var = ((part - mean) ** 2).sum() / part.numel()
            at = (-1, *[1] * (x.dim() - 2))
            h = (part - mean) / torch.sqrt(var + eps)
            made = h * weight[chosen].view(at) + bias[chosen].view(at)
            rows = torch.zeros_like(x).index_put(
                (torch.tensor(of)[:, None], torch.arange(first, first + span)[None]), made
            )
            y = y + rows
            means.append(mean.detach())
            variances.append(var.detach())
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    found = {"y": y.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}
    statistics = {"mean": means, "var": variances}
    return found | {k: torch.stack(v).view(groups, -1) for k, v in statistics.items()}
