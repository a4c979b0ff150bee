"""Instance normalization (Ulyanov, Vedaldi & Lempitsky 2016)."""

from normlab.norms.base import SampleNorm

__all__ = ["InstanceNorm"]


class InstanceNorm(SampleNorm):
    """Instance norm: statistics over the positions of one channel of one sample.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over (H, W) per
    sample and channel, weight and bias per channel. There is no population: no sample sees another,
    and testing is as training.

    Args:
        num_features: channels C of the input (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the variance.
        affine: learn a weight and a bias per channel.

    Limits: it is GroupNorm with C groups, to the bit, and BatchNorm of one sample. Second
    derivatives exist for contiguous inputs only. Errors: see SampleNorm; an input with one
    position, hence every (N, C), is refused.

    Source: Ulyanov, Vedaldi & Lempitsky 2016. Peers: torch.nn.InstanceNorm2d has no affine part by
    default; here it has one, as the papers compare it. With track_running_stats=True, which is not
    here, its evaluation is no longer per instance.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, num_features, eps=eps, affine=affine)
