"""Separate batch norm (N9): Rethinking "Batch" in BatchNorm, section 5 and table 5."""

import numpy as np

from oracles.frozen import forward_backward as with_constants
from oracles.moments import normalized, of_channels, sets_per_channel, through


def per_domain(values, number):
    """(D, C): a row per domain, where all share one (C,) too."""
    return values if values.ndim == 2 else np.tile(values, (number, 1))


def forward_backward(x, dy, labels, weight, bias, eps, shared_statistics):
    """N9: y, dx, dweight, dbias of x whose sample i is of domain labels[i].

    Statistics are those of the domain's samples, or of all where shared; weight and bias are
    (D, C), or (C,) where shared, and so are their gradients.
    """
    number = len(weight) if weight.ndim == 2 else max(labels) + 1
    wide = (slice(None), slice(None), *[None] * (x.ndim - 2))
    w, b = (per_domain(values, number)[labels][wide] for values in (weight, bias))
    sets = sets_per_channel(x.shape, [0] * len(labels) if shared_statistics else labels)
    sets = np.unique(sets, return_inverse=True)[1].reshape(x.shape)
    h, rstd = normalized(x, sets, eps)
    dx = through(dy * w, h, rstd, sets)
    dweight, dbias = (by_domain(v, labels, weight) for v in (dy * h, dy))
    return h * w + b, dx, dweight, dbias


def by_domain(terms, labels, like):
    """The sum of the terms over each domain's samples and positions; of all where `like` is."""
    sums = terms.sum(tuple(range(2, terms.ndim)))
    if like.ndim == 1:
        return sums.sum(0)
    found = np.zeros_like(like)
    np.add.at(found, labels, sums)
    return found


def buffers(x, labels, mean, var, decay, shared_statistics):
    """N9: running mean, variance (var_u) and counter after one update, from (C,) or (D, C).

    A population that domains share takes one step for each domain present, in order; where the
    statistics are shared too, one for the batch. Own populations move where their domain is.
    """
    mean, var, labels = mean.copy(), var.copy(), np.asarray(labels)
    present = np.unique(labels)
    if mean.ndim == 1:
        parts = [x] if shared_statistics else [x[labels == d] for d in present]
        for part in parts:
            m, u = of_channels(part, ddof=1)
            mean, var = decay * mean + (1 - decay) * m, decay * var + (1 - decay) * u
        return mean, var, len(parts)
    steps = np.zeros(len(mean), dtype=int)
    for d in present:
        m, u = of_channels(x[labels == d], ddof=1)
        mean[d], var[d] = decay * mean[d] + (1 - decay) * m, decay * var[d] + (1 - decay) * u
        steps[d] = 1
    return mean, var, steps


def at_test(x, dy, labels, mean, var, weight, bias, eps):
    """N9: y and dx of each sample with the population and the affine of its domain."""
    number = max(labels) + 1
    values = (per_domain(v, number)[labels] for v in (mean, var, weight, bias))
    return with_constants(x, dy, *values, eps)[:2]
