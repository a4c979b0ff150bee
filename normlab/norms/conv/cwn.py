"""Centered weight normalization (Huang, Liu, Liu, Lang & Tao 2017)."""

from typing import Any

import torch
from torch import Tensor

from normlab.norms.conv.wn import WeightNormConv2d, _norm

__all__ = ["CenteredWeightNormConv2d"]


class CenteredWeightNormConv2d(WeightNormConv2d):
    """Weight normalization of centered filters: g u / |u| with u = v - mean(v) per filter.

    Taking the place of a convolution (`from_conv`), or made anew, g = |u|: the filters start
    centered and are otherwise the plain one's, so the function changes by the filters' means. The
    gradient of v is orthogonal to 1 and to u.

    A constant filter, and any filter with m = 1, becomes 0, with finite gradients. Arguments,
    state, errors and precision: see WeightNormConv2d.

    Limits: WeightNormConv2d of v - mean(v); with g = sqrt(m), m = (I / groups) kh kw,
    WeightStandardizedConv2d ("timm") without eps.

    Source: Huang, Liu, Liu, Lang & Tao 2017. Peers: torch has no such layer; its weight norm of
    centered filters is equal, but for constant ones, where it divides 0 by 0.
    """

    def _vectors(self) -> Tensor:
        centered: Tensor = _Centered.apply(super()._vectors())
        return centered

    def _fused(self) -> Tensor:
        return self._vectors()

    def _excess(self, norm: Tensor) -> Tensor:
        # What rounding leaves of a difference is no direction.
        return norm - 8 * torch.finfo(norm.dtype).eps * _norm(self.weight.detach())


class _Centered(torch.autograd.Function):
    """Filters less their means, a projection: so is its derivative, which autograd takes apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return v - v.mean((1, 2, 3), keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # noqa: ARG004
        return _Centered.apply(dy)
