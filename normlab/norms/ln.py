"""Layer normalization of a convolutional feature map, as the Group Normalization paper means it."""

from normlab.norms.base import SampleNorm

__all__ = ["LayerNorm"]


class LayerNorm(SampleNorm):
    """Layer norm: each sample's statistics over all its channels and positions.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over (C, H, W)
    per sample, weight and bias per *channel*. There is no population: no sample sees another, and
    testing is as training.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the variance.
        affine: learn a weight and a bias per channel.

    Limits: it is GroupNorm with one group, to the bit. Errors: see SampleNorm.

    Source: Ba, Kiros & Hinton 2016, for convolutions as in Wu & He 2018, section 3.1. Peers:
    tensorpack's LayerNorm is this one. Two others share the name: torch.nn.LayerNorm([C, H, W]) has
    the same statistics but a weight and a bias per element, which fixes the input's size
    (ElementwiseLayerNorm, `ln_elementwise`); ConvNeXt's LayerNorm2d (timm, detectron2) takes its
    statistics over C alone, at each position (ChannelsLayerNorm, `ln_channels`).
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, 1, eps=eps, affine=affine)
