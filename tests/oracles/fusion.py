"""Batch norm folded into the convolution before it (K9)."""


def folded(weight, bias, gamma, beta, mean, var, eps):
    """K9: W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta."""
    scale = gamma / (var + eps).sqrt()
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), (bias - mean) * scale + beta
