"""Layer normalization with an affine part per element: torch.nn.LayerNorm([C, H, W])."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normlab.norms._checks import check_common, check_input
from normlab.norms._grouped import layer_norm

__all__ = ["ElementwiseLayerNorm"]


class ElementwiseLayerNorm(nn.Module):
    """Layer norm over (C, H, W) whose weight and bias have a value per *element*.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over (C, H, W)
    per sample, as LayerNorm (`ln`), but weight and bias are (C, H, W). That fixes the size of the
    input and breaks the symmetry between positions, which is seldom what is meant for images. There
    is no population: testing is as training. One of three layers called layer norm:

    ==================  ===============  ============  =========================================
    config name         statistics over  affine per    who
    ==================  ===============  ============  =========================================
    ln                  C, H, W          channel       Group Normalization's LN, tensorpack
    ln_elementwise      C, H, W          element       torch.nn.LayerNorm([C, H, W])
    ln_channels         C                channel       ConvNeXt, timm LayerNorm2d, detectron2
    ==================  ===============  ============  =========================================

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        shape: the sizes after C: () or (L,), (H, W), (D, H, W). A network built by normlab learns
            them beforehand, from the shapes that reach its norms for images of the data set.
        eps: added to the variance.
        affine: learn a weight and a bias per element.

    Limits: LayerNorm where weight and bias are constant in a channel. The statistics are float32 at
    least. Errors: ValueError for a shape of sizes below 1 or of one element in all, and in forward
    for an input of another shape: nothing is reshaped or interpolated.

    Source: Ba, Kiros & Hinton 2016, taken to feature maps element by element. Peers:
    torch.nn.LayerNorm([C, H, W]) is this layer, state_dict included; ml-cvnets began with it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, num_features: int, *, shape: Sequence[int], eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__()
        check_common(num_features, eps)
        self.shape = tuple(shape)
        if len(self.shape) > 3 or not all(size >= 1 for size in self.shape):
            raise ValueError(f"shape is up to three sizes of at least 1, not {self.shape}")
        if num_features * math.prod(self.shape) == 1:
            raise ValueError("ElementwiseLayerNorm needs more than one element per sample")
        self.num_features = num_features
        self.eps = eps
        full = (num_features, *self.shape)
        self.weight = nn.Parameter(torch.ones(full)) if affine else None
        self.bias = nn.Parameter(torch.zeros(full)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, *shape) to the same shape and dtype."""
        check_input(x, self.num_features, type(self).__name__, self._parameters.get("weight"))
        if x.shape[2:] != self.shape:
            raise ValueError(
                f"ElementwiseLayerNorm has a weight for each of {(self.num_features, *self.shape)}"
                f" and takes no other size, not {tuple(x.shape)}"
            )
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
            last = x.movedim(1, -1)
            weight = None if weight is None else weight.movedim(0, -1)
            bias = None if bias is None else bias.movedim(0, -1)
            return layer_norm(last, last.shape[1:], weight, bias, self.eps).movedim(-1, 1)
        return layer_norm(x, x.shape[1:], weight, bias, self.eps)

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.num_features}, shape={self.shape}, eps={self.eps}, affine={affine}"
