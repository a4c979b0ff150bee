"""Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016)."""

from normlab.norms.base import SampleNorm

__all__ = ["InstanceNorm"]


class InstanceNorm(SampleNorm):
    """Instance norm: statistics over the positions of one channel of one sample.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and biased variance over (H, W) per
    sample and channel, weight and bias per channel: group norm with C groups, and batch norm of one
    sample. Unlike torch.nn.InstanceNorm2d it is affine by default, as the papers compare it, and
    has no running statistics: with them, torch's evaluation is no longer per instance.

    Args:
        num_features: channels C of the input (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the variance.
        affine: learn a weight and a bias per channel.

    Errors: see SampleNorm; an input with one position, hence every (N, C), is refused.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, num_features, eps=eps, affine=affine)
