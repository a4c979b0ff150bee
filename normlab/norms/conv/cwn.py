"""Centered weight normalization (Huang, Liu, Liu, Lang & Tao 2017)."""

from torch import Tensor

from normlab.norms.conv.wn import WeightNormConv2d

__all__ = ["CenteredWeightNormConv2d"]


class CenteredWeightNormConv2d(WeightNormConv2d):
    """Weight normalization of centered filters: g u / |u| with u = v - mean(v) per filter.

    Taking the place of a convolution (`from_conv`),
    or made anew, g = |u|: the filters start centered and are otherwise the plain one's, so the
    function changes by the filters' means. The gradient of v is orthogonal to 1 and to u.

    A constant filter, and any filter with m = 1, becomes 0, with finite gradients. Arguments,
    state, errors and precision: see WeightNormConv2d.

    Limits: WeightNormConv2d of v - mean(v); with g = sqrt(m), m = (I / groups) kh kw,
    WeightStandardizedConv2d ("timm") without eps.

    Source: Huang, Liu, Liu, Lang & Tao 2017. Peers: torch has no such layer; its weight norm of
    centered filters is equal, but for constant ones, where it divides 0 by 0.
    """

    def _vectors(self) -> Tensor:
        v = super()._vectors()
        return v - v.mean((1, 2, 3), keepdim=True)
