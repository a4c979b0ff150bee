"""Fixup (N18): Zhang, Dauphin and Ma 2019."""

import math

from torch.nn.functional import conv2d


def branch_factor(blocks, convolutions):
    """N18: L^(-1 / (2m - 2)) for L residual branches of m convolutions each."""
    return blocks ** (-1 / (2 * convolutions - 2))


def first_deviation(fan_out, blocks, convolutions=2):
    """N18: a branch's first convolution starts with He's sqrt(2 / fan_out) times the factor."""
    return math.sqrt(2 / fan_out) * branch_factor(blocks, convolutions)


def block(x, first, second, shortcut, biases, scale, stride):
    """N18: a scalar bias before each convolution and activation, one multiplier per branch.

    y = relu(scale conv2(relu(conv1(x + b1a) + b1b) + b2a) + b2b + shortcut(x + b1a)), with 3x3
    filters `first` and `second`, a 1x1 `shortcut` and biases (b1a, b1b, b2a, b2b), all torch's
    float64.
    """
    b1a, b1b, b2a, b2b = biases
    y = (conv2d(x + b1a, first, stride=stride, padding=1) + b1b).clamp(min=0)
    y = scale * conv2d(y + b2a, second, padding=1) + b2b
    return (y + conv2d(x + b1a, shortcut, stride=stride)).clamp(min=0)
