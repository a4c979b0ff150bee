"""Normalizing with constants: frozen batch norm (N8), batch norm at test (N1, N10)."""

import numpy as np

from oracles.moments import per_channel, sum_per_channel


def forward_backward(x, dy, mean, var, weight, bias, eps):
    """N8: y = weight (x - mean) / sqrt(var + eps) + bias; dx = dy weight / sqrt(var + eps).

    Returns y, dx, dweight = sum dy (x - mean) / sqrt(var + eps) and dbias = sum dy. Statistics,
    weight and bias are (C,), or (N, C) of each sample, as separate batch norm (N9) has them;
    then dweight and dbias are of each sample too.
    """
    own = np.ndim(mean) == 2
    wide = (slice(None), slice(None), *[None] * (x.ndim - 2))
    mean, var, weight, bias = (
        np.asarray(values)[wide] if own else per_channel(values, x.ndim)
        for values in (mean, var, weight, bias)
    )
    rstd = 1 / np.sqrt(var + eps)
    h = (x - mean) * rstd
    positions = tuple(range(2, x.ndim))
    dweight, dbias = (
        values.sum(positions) if own else sum_per_channel(values) for values in (dy * h, dy)
    )
    return h * weight + bias, dy * weight * rstd, dweight, dbias
