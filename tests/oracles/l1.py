"""L1 batch norm (N16): Hoffer et al. 2018, the mean absolute deviation in place of the root."""

import numpy as np

from oracles.moments import per_channel

K = np.sqrt(np.pi / 2)
"""N16: what makes K E|x - mean| the standard deviation of normal x."""


def forward_backward(x, weight, bias, dy, eps, groups=1):
    """N16: y, dx, dweight, dbias, mean (G, C) and s (G, C), one channel of a group at a time.

    s = K mean|x - mean|, y = weight (x - mean) / (s + eps) + bias. With h = x - mean, q = s + eps
    and g = dy weight: ds/dh_i = K sign(h_i) / n, so
    v_i = g_i / q - sum(g h) / q^2 * K sign(h_i) / n, and dx = v - mean(v).
    """
    y, dx = np.empty_like(x), np.empty_like(x)
    dweight, dbias = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    mean, scale = np.empty((groups, x.shape[1])), np.empty((groups, x.shape[1]))
    size = len(x) // groups
    for group in range(groups):
        for c in range(x.shape[1]):
            at = (slice(group * size, (group + 1) * size), c)
            n = x[at].size
            mean[group, c] = x[at].sum() / n
            h = x[at] - mean[group, c]
            scale[group, c] = K * np.abs(h).sum() / n
            q = scale[group, c] + eps
            y[at] = weight[c] * h / q + bias[c]
            g = dy[at] * weight[c]
            v = g / q - (g * h).sum() / q**2 * K * np.sign(h) / n
            dx[at] = v - v.mean()
            dweight[c] += (dy[at] * h / q).sum()
            dbias[c] += dy[at].sum()
    return y, dx, dweight, dbias, mean, scale


def at_test(x, mean, var, weight, bias, eps):
    """N16 with the running statistic: the root of `var` in place of s, eps beside it."""
    mean, var, weight, bias = (per_channel(v, x.ndim) for v in (mean, var, weight, bias))
    return (x - mean) / (np.sqrt(var) + eps) * weight + bias


def as_variance(var, eps):
    """N16: (sqrt(var) + eps)^2, which a batch norm without eps divides alike by the root of."""
    return (np.sqrt(var) + eps) ** 2


def squares(scale, n):
    """N16: what stands in the place of the unbiased variance: s^2 n / (n - 1)."""
    return scale**2 * n / (n - 1)
