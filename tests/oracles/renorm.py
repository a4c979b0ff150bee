"""Batch renorm (N7): Ioffe 2017, Algorithm 1, element by element."""

import numpy as np

from oracles.moments import per_channel, sets_per_channel, statistics, sum_per_channel, through


def forward_backward(x, dy, weight, bias, running_mean, running_var, *, eps, nbs, r_limit, d_limit):
    """N7: y, dx, dweight, dbias of x (N, C, ...), each nbs consecutive samples a batch.

    s = sqrt(var_b + eps), sigma = sqrt(running_var + eps), both from before the update;
    r = clip(s / sigma, 1 / r_limit, r_limit), d = clip((mean - running_mean) / sigma, +-d_limit);
    y = weight (z r + d) + bias with z = (x - mean) / s. With r and d constant, dx is batch norm's
    with weight * r, dweight = sum dy (z r + d) and dbias = sum dy.
    """
    sets = sets_per_channel(x.shape, np.arange(len(x)) // nbs)
    mean, var = statistics(x, sets)
    channel = np.arange(len(mean)) % x.shape[1]
    mu, sigma = running_mean[channel], np.sqrt(running_var[channel] + eps)
    s = np.sqrt(var + eps)
    r = np.clip(s / sigma, 1 / r_limit, r_limit)[sets]
    d = np.clip((mean - mu) / sigma, -d_limit, d_limit)[sets]
    z = (x - mean[sets]) / s[sets]
    hat = z * r + d
    w, b = (per_channel(values, x.ndim) for values in (weight, bias))
    dx = through(dy * w * r, z, 1 / s[sets], sets)
    return hat * w + b, dx, sum_per_channel(dy * hat), sum_per_channel(dy)
