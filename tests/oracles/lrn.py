"""Local response norm (N17): Krizhevsky et al. 2012, section 3.3."""

import numpy as np


def forward_backward(x, dy, size, alpha, beta, k, divided):
    """N17: y_c = x_c / (k + a sum_j x_j^2)^beta and dx, one value and one neighbour at a time.

    j runs over the channels from c - size // 2 to c + (size - 1) // 2 that exist; a is alpha, or
    alpha / size where `divided`, as in torch and Caffe.
    """
    channels = x.shape[1]
    alpha = alpha / size if divided else alpha
    window = [
        [j for j in range(c - size // 2, c + (size - 1) // 2 + 1) if 0 <= j < channels]
        for c in range(channels)
    ]
    base = np.stack([k + alpha * sum(x[:, j] ** 2 for j in window[c]) for c in range(channels)], 1)
    y, dx = np.empty_like(x), np.empty_like(x)
    for c in range(channels):
        y[:, c] = x[:, c] * base[:, c] ** -beta
        dx[:, c] = dy[:, c] * base[:, c] ** -beta
        for i in range(channels):
            if c in window[i]:
                d = dy[:, i] * x[:, i] * -beta * base[:, i] ** (-beta - 1)
                dx[:, c] += d * alpha * 2 * x[:, c]
    return y, dx
