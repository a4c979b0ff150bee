"""Weight standardization (Qiao, Wang, Liu, Shen & Yuille 2019)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t

from normlab.norms._grouped import is_channels_last, is_half, layer_norm
from normlab.norms.conv.base import ReparametrizedConv2d

__all__ = ["WeightStandardizedConv2d"]

Convention = Literal["timm", "official"]


class WeightStandardizedConv2d(ReparametrizedConv2d):
    """A convolution with filters of mean 0 and variance 1.

    Each of the O filters is standardized over its m = (I / groups) kh kw weights at every forward.
    The two published codes differ by sqrt(m / (m - 1)), 1.9 % at m = 27, and in eps:

    ==========  =================================  ===========  ==================================
    convention  filter                             default eps  who
    ==========  =================================  ===========  ==================================
    "timm"      (w - mean) / sqrt(var_b + eps)     1e-6         timm's StdConv2d; var_b is biased
    "official"  (w - mean) / (std_u + eps)         1e-5         the authors; std_u is unbiased
    ==========  =================================  ===========  ==================================

    The function does not change with w -> a w + b per filter (a > 0, eps -> 0), so the gradient of
    a filter is orthogonal to 1 and to the filter. Taking the place of a convolution (`from_conv`)
    keeps its parameters and changes its function: filters are centered, and their norm becomes
    sqrt(m), or sqrt(m - 1), whatever it was. A norm that follows undoes the second; without one,
    activations grow from layer to layer. At test the filters are the same: what they are may be
    written into a plain convolution's weight.

    A constant filter, and any filter with m = 1, becomes 0, with finite gradients. Small filters
    count against eps: var_b well above it is assumed.

    Limits: CenteredWeightNormConv2d with g = sqrt(m), for eps -> 0.

    Args: those of torch.nn.Conv2d, and
        convention: "timm" or "official", see above.
        eps: None is the convention's own.

    State: `weight` (the unstandardized one) and `bias`, as Conv2d. Statistics are float32 at least.
    Errors: ValueError for an unknown convention and an eps not above 0.

    Source: Qiao, Wang, Liu, Shen & Yuille 2019. Peers: the table above; the authors' code divides 0
    by 0 at m = 1, and its gradient is infinite at constant filters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        convention: Convention = "timm",
        eps: float | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        if convention not in get_args(Convention):
            raise ValueError(f"convention is one of {get_args(Convention)}, not {convention!r}")
        if eps is not None and not eps > 0:
            raise ValueError(f"eps must be above 0, not {eps}")
        self.convention: Convention = convention
        self.eps = eps or {"timm": 1e-6, "official": 1e-5}[convention]

    def filters(self) -> Tensor:
        """The standardized weight (O, I / groups, kh, kw)."""
        if self.convention == "timm":  # one operator: half the time of a batch norm over filters
            last = is_channels_last(self.weight)
            v = self.weight.movedim(1, -1) if last else self.weight
            ones = zeros = None
            if is_half(v) and v.device.type == "cpu":  # beside float32 it rounds once, as a copy
                ones = v.new_ones(v.shape[1:], dtype=torch.float32)
                zeros = torch.zeros_like(ones)
            y = layer_norm(v, v.shape[1:], ones, zeros, self.eps)
            return y.movedim(-1, 1) if last else y
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        filters = weight.flatten(1)
        centered = filters - filters.mean(1, keepdim=True)
        # The derivative of this norm at 0 is 0, where that of a square root is infinite.
        norm = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
        deviation = norm / math.sqrt(max(1, filters.size(1) - 1))
        standardized: Tensor = centered / (deviation + self.eps)
        return standardized.view_as(weight).to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(self)}, convention={self.convention}, eps={self.eps}"
