"""Population statistics: running averages (N1, N4, K4, K5), estimates (K1, K2), merging (K8)."""

import numpy as np

from oracles.moments import of_channels


def ema_weights(decay, steps):
    """K5: the initial value weighs decay^T, and batch t of T (1 - decay) decay^(T - t)."""
    return np.array([decay**steps, *((1 - decay) * decay ** np.arange(steps - 1.0, -1, -1))])


def ema(initial, values, decay):
    """K5: the running average after the steps towards values (T, ...), in closed form."""
    values = np.asarray(values)
    start = np.broadcast_to(initial, values.shape[1:])
    return np.tensordot(ema_weights(decay, len(values)), [start, *values], 1)


def after_chunks(rule, running, means, biased, elements, decay):
    """N4: the running mean and variance after a batch of chunks, each rule in its own words.

    means and biased (chunks, C), of `elements` each. mean: one step towards the average of the
    chunks' statistics; pooled: towards those of the whole batch; first: the first chunk's alone;
    sequential: a step of (1 - decay) / chunks for each. Variances are unbiased.
    """
    mean, var = running
    unbiased = biased * elements / (elements - 1)
    groups = len(means)
    step = 1 - decay
    if rule == "mean":
        return decay * mean + step * means.mean(0), decay * var + step * unbiased.mean(0)
    if rule == "pooled":
        total = elements * groups
        second = mixture(means, biased)[1] * total / (total - 1)
        return decay * mean + step * means.mean(0), decay * var + step * second
    if rule == "first":
        return decay * mean + step * means[0], decay * var + step * unbiased[0]
    keep = 1 - step / groups
    return ema(mean, means, keep), ema(var, unbiased, keep)


def plain_average(rule, batches, chunks, decay):
    """K4: the average over batches (N, C, ...) of what a ghost norm's rule makes of each.

    Every batch counts the same. first: its first chunk; sequential: its chunks by their age in
    steps of (1 - decay) / chunks; mean: its chunks alike; pooled: the whole batch.
    """
    keep = 1 - (1 - decay) / chunks
    shares = {
        "first": np.eye(chunks)[0], "sequential": keep ** np.arange(chunks - 1.0, -1, -1)
    }.get(rule, np.ones(chunks))  # fmt: skip
    shares = shares / shares.sum()
    means, variances = [], []
    for batch in batches:
        own = [of_channels(part, ddof=1) for part in np.split(batch, chunks)]
        means.append(shares @ np.array([m for m, _ in own]))
        variances.append(
            of_channels(batch, ddof=1)[1] if rule == "pooled"
            else shares @ np.array([v for _, v in own])
        )  # fmt: skip
    return np.mean(means, 0), np.mean(variances, 0)


def mixture(means, variances, weights=None):
    """K1, K8: mu = sum w mu_i, var = sum w (var_i + (mu_i - mu)^2): the law of total variance."""
    means, variances = np.asarray(means), np.asarray(variances)
    weights = np.ones(len(means)) if weights is None else np.asarray(weights, dtype=float)
    weights = weights / weights.sum()
    mean = weights @ means
    return mean, weights @ variances + weights @ (means - mean) ** 2


def mean_of_batches(parts):
    """K2: means and unbiased variances of batches (n_i, C, ...), weighted by their elements."""
    sizes = np.array([part.size for part in parts], dtype=float)
    own = [of_channels(part, ddof=1) for part in parts]
    weights = sizes / sizes.sum()
    return weights @ np.array([m for m, _ in own]), weights @ np.array([v for _, v in own])


def averaged_weights(count, decay):
    """SWA: 1 / T of each; an EMA that starts at the first weights: K5 with these as initial."""
    if decay is None:
        return np.full(count, 1 / count)
    return ema_weights(decay, count - 1)
