"""Layer normalization over the channels at each position (ConvNeXt, Liu et al. 2022)."""

import torch
from torch import Tensor, nn

from normlab.norms._checks import check_common, check_input
from normlab.norms._grouped import layer_norm

__all__ = ["ChannelsLayerNorm"]


class ChannelsLayerNorm(nn.Module):
    """Layer norm over C alone: every position of every sample has statistics of its own.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over C per
    sample and position, weight and bias per channel. What a transformer's layer norm is to a token,
    at each pixel; positions do not see each other, unlike in `ln` and `ln_elementwise` (there is a
    table of the three in ElementwiseLayerNorm). There is no population: testing is as training.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        eps: added to the variance.
        affine: learn a weight and a bias per channel.

    Limits: at one position, LayerNorm (`ln`). The statistics are float32 at least; the output has
    the memory layout of the input. Errors: ValueError for a single channel, which has no spread,
    and in forward for a wrong shape.

    Source: Liu et al. 2022 (ConvNeXt), with Ba, Kiros & Hinton 2016 at each position. Peers: timm's
    LayerNorm2d (eps 1e-6 there), ConvNeXt's and detectron2's LayerNorm, torch.nn.LayerNorm(C) on
    channels-last data.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        check_common(num_features, eps)
        if num_features < 2:
            raise ValueError("ChannelsLayerNorm needs at least 2 channels: one has no variance")
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) to the same shape and dtype."""
        check_input(x, self.num_features, type(self).__name__, self._parameters.get("weight"))
        last = x.movedim(1, -1)
        y = layer_norm(last, (self.num_features,), self.weight, self.bias, self.eps).movedim(-1, 1)
        return y.contiguous() if x.is_contiguous() else y

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"
