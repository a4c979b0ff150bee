"""Norms of moments: batch (N1), group (N11), layer (N12) and instance norm (N13), in numpy.

Such a norm is a partition: `sets` gives each element of x the number of the set that it is
normalized in.
"""

import numpy as np


def sets_per_channel(shape, group_of_sample):
    """N1, N4: one set per (group of samples, channel), over the group's samples and positions."""
    sample, channel = np.indices(shape)[:2]
    return np.asarray(group_of_sample)[sample] * shape[1] + channel


def sets_per_sample(shape, groups):
    """N11: one set per (sample, group of consecutive channels); N12 is one group, N13 C groups."""
    sample, channel = np.indices(shape)[:2]
    return sample * groups + channel // (shape[1] // groups)


def sets_per_position(shape):
    """N12, ConvNeXt's layer norm: one set per (sample, position), over the channels."""
    sample = np.indices(shape)[0]
    positions = int(np.prod(shape[2:], dtype=int))
    return sample * positions + np.arange(positions).reshape(1, 1, *shape[2:])


def statistics(x, sets):
    """mu = sum x / m and var_b = sum (x - mu)^2 / m of each set of m elements."""
    flat, sizes = sets.ravel(), np.bincount(sets.ravel())
    mean = np.bincount(flat, x.ravel()) / sizes
    return mean, np.bincount(flat, ((x - mean[sets]) ** 2).ravel()) / sizes


def normalized(x, sets, eps):
    """N1: h = (x - mu) / sqrt(var_b + eps) and rstd = 1 / sqrt(var_b + eps), element by element."""
    mean, var = statistics(x, sets)
    rstd = 1 / np.sqrt(var[sets] + eps)
    return (x - mean[sets]) * rstd, rstd


def through(g, h, rstd, sets):
    """N1's backward: dx = rstd (g - E[g] - h E[g h]), where g is the gradient of h."""
    return rstd * (g - statistics(g, sets)[0][sets] - h * statistics(g * h, sets)[0][sets])


def forward_backward(x, sets, weight, bias, dy, eps=1e-5):
    """N1, N4, N11-N13: y = weight h + bias per channel; returns y, dx, dweight, dbias."""
    weight, bias = (per_channel(values, x.ndim) for values in (weight, bias))
    h, rstd = normalized(x, sets, eps)
    dx = through(dy * weight, h, rstd, sets)
    return h * weight + bias, dx, sum_per_channel(dy * h), sum_per_channel(dy)


def elementwise_forward_backward(x, sets, weight, bias, dy, eps=1e-5):
    """N12 as torch.nn.LayerNorm([C, H, W]) has it: a weight and a bias per element of a sample."""
    h, rstd = normalized(x, sets, eps)
    dx = through(dy * weight, h, rstd, sets)
    return h * weight + bias, dx, (dy * h).sum(0), dy.sum(0)


def per_channel(values, dims):
    """Values (C,) shaped to broadcast along axis 1 of `dims`."""
    return np.asarray(values).reshape(1, -1, *[1] * (dims - 2))


def sum_per_channel(x):
    """The sum over all axes but the channels'."""
    return x.sum(tuple(axis for axis in range(x.ndim) if axis != 1))


def of_channels(x, ddof=0):
    """N1: mean and variance per channel of x (N, C, ...): biased, or unbiased with ddof=1."""
    rows = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
    return rows.mean(0), rows.var(0, ddof=ddof)
