"""Weight standardization (N14), weight norm and centered weight norm (N15)."""

import math

import numpy as np


def filters(kind, weight, g):
    """The filters that convolve, one at a time: of m weights each, with mean 0 as h = w - E[w].

    timm (N14): h / sqrt(sum h^2 / m + 1e-6); official (N14, Qiao et al. 2019):
    h / (sqrt(sum h^2 / (m - 1)) + 1e-5); wn (N15, Salimans and Kingma 2016): g w / |w|;
    cwn (N15, Huang et al. 2017): g h / |h|.
    """
    found = np.empty_like(weight)
    for o, w in enumerate(weight):
        m = w.size
        h = w - w.sum() / m
        if kind == "timm":
            found[o] = h / math.sqrt((h**2).sum() / m + 1e-6)
        elif kind == "official":
            found[o] = h / (math.sqrt((h**2).sum() / (m - 1)) + 1e-5)
        else:
            v = h if kind == "cwn" else w
            found[o] = g[o] * v / math.sqrt((v**2).sum())
    return found
