"""Virtual batch norm (N5) in both its definitions."""

import numpy as np
import torch

from oracles.moments import of_channels, per_channel


def own_samples(z, own, definition, gradient, weight, bias, eps):
    """N5: y of the first `own` samples of z (N, C, ...), sample by sample, differentiable.

    extra (the talk): all own samples are normalized with the statistics of all of z. reference
    (Salimans et al. 2016): each x_i with those of the forward-only samples and x_i. The
    forward-only samples are constants where the gradient is the own samples' alone.
    """
    assert z.dtype == torch.float64
    constant = z[own:].detach() if gradient == "own" else z[own:]
    channels = (-1, *[1] * (z.dim() - 2))
    rows = []
    for i in range(own):
        among = z[:own] if definition == "extra" else z[i : i + 1]
        together = torch.cat([among, constant]).movedim(1, 0).flatten(1)
        mean = together.mean(1)
        var = (together - mean[:, None]).square().mean(1)
        h = (z[i] - mean.view(channels)) / (var + eps).sqrt().view(channels)
        rows.append(h * weight.view(channels) + bias.view(channels))
    return torch.stack(rows)


def forward_only_samples(z, own, definition, weight, bias, eps):
    """N5: y of the others: extra ones by the statistics of all, a reference by its own (numpy)."""
    mean, var = of_channels(z if definition == "extra" else z[own:])
    mean, var, weight, bias = (per_channel(v, z.ndim) for v in (mean, var, weight, bias))
    return (z[own:] - mean) / np.sqrt(var + eps) * weight + bias


def followed(z, own, population):
    """N5, N1: what the running statistics follow: mean and var_u of all, or of the own samples."""
    return of_channels(z if population == "all" else z[:own], ddof=1)


def two_streams(x, v, weight, bias, eps):
    """N5, the talk's: x and v, both normalized with the statistics of [x ; v] (N, C, H, W)."""
    assert x.dtype == torch.float64
    together = torch.cat([x, v])
    mean = together.mean((0, 2, 3))
    var = (together - mean[:, None, None]).square().mean((0, 2, 3))
    rstd = (var + eps).rsqrt()
    scale, shift = (weight * rstd)[:, None, None], bias[:, None, None]
    return tuple((z - mean[:, None, None]) * scale + shift for z in (x, v))
