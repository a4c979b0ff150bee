"""Batch norm's running statistics in the words of Keras and of Caffe (E25), on torch's float64."""

import torch


def moments(x):
    """N1: mu and var_b of x (N, C, H, W)."""
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def normalized(x, mean, var, eps):
    """N1 at test: (x - mean) / sqrt(var + eps)."""
    channels = (1, -1, 1, 1)
    return (x - mean.view(channels)) / (var.view(channels) + eps).sqrt()


class Keras:
    """Its update, in its words: moving = moving * momentum + batch * (1 - momentum), biased."""

    def __init__(self, channels, momentum=0.99, eps=1e-3):
        self.momentum, self.eps = momentum, eps
        self.moving_mean = torch.zeros(channels, dtype=torch.float64)
        self.moving_variance = torch.ones(channels, dtype=torch.float64)

    def train(self, x):
        mean, var = moments(x)
        self.moving_mean = self.moving_mean * self.momentum + mean * (1 - self.momentum)
        self.moving_variance = self.moving_variance * self.momentum + var * (1 - self.momentum)

    def tensors(self):
        return {"moving_mean": self.moving_mean, "moving_variance": self.moving_variance}

    def __call__(self, x):
        return normalized(x, self.moving_mean, self.moving_variance, self.eps)


class Caffe:
    """batch_norm_layer.cpp: three blobs, sums of fraction^t times a batch's mean, unbiased variance
    and 1; global statistics are the first two over the third, or 0 where that is 0."""

    def __init__(self, channels, fraction=0.999, eps=1e-5):
        self.fraction, self.eps = fraction, eps
        self.blobs = [torch.zeros(n, dtype=torch.float64) for n in (channels, channels, 1)]

    def train(self, x):
        mean, var = moments(x)
        m = x.numel() // x.size(1)
        news = (mean, var * m / (m - 1), torch.ones(1))
        self.blobs = [self.fraction * b + n for b, n in zip(self.blobs, news, strict=True)]

    def tensors(self):
        return dict(zip(("mean", "variance", "scale_factor"), self.blobs, strict=True))

    def __call__(self, x):
        scale = 0 if self.blobs[2] == 0 else 1 / self.blobs[2]
        return normalized(x, self.blobs[0] * scale, self.blobs[1] * scale, self.eps)
