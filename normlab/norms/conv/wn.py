"""Weight normalization (Salimans & Kingma 2016)."""

import torch
from torch import Tensor, nn

from normlab.norms.conv.base import ReparametrizedConv2d

__all__ = ["WeightNormConv2d"]


class WeightNormConv2d(ReparametrizedConv2d):
    """A convolution with filters g v / |v|: their direction and their length learn apart.

    v is `weight`, (O, I / groups, kh, kw), and g is `weight_g`, (O, 1, 1, 1): one length per
    filter, |.| the Euclidean norm over a filter. Taking the place of a convolution (`from_conv`),
    or made anew, g = |v|: the function is the plain one's, to rounding; the gradient of v is
    orthogonal to v. Equal to torch.nn.utils.parametrizations.weight_norm, whose `original0` is g
    and `original1` is v.

    A filter of zeros stays 0 and passes finite gradients (|v| counts as 1 there), where torch's
    become nan. Where g is 0 as well nothing can move: not for zero-initialized filters.

    Args: those of torch.nn.Conv2d.

    State: `weight` (v), `weight_g`, and `bias`. The norm is float32 at least. Weight decay treats
    `weight_g` as the gamma of a norm.
    """

    weight_g: nn.Parameter

    def reset_parameters(self) -> None:
        """Draw v and the bias as torch.nn.Conv2d does, and make g = |v| again."""
        super().reset_parameters()
        if "weight_g" in self._parameters:
            with torch.no_grad():
                self.weight_g.copy_(self._lengths())
        else:
            self._adopt()

    def filters(self) -> Tensor:
        """g times the directions of the filters, (O, I / groups, kh, kw)."""
        v = self._vectors()
        norm, length = _norm(v), _norm(self.weight)
        # What rounding leaves of a difference is no direction.
        none = norm <= 8 * torch.finfo(v.dtype).eps * length
        filters: Tensor = v * (self.weight_g / norm.masked_fill(none, 1.0))
        return filters.to(self.weight.dtype)

    def _vectors(self) -> Tensor:
        """What the filters have the direction of, float32 at least."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def _adopt(self) -> None:
        self.weight_g = nn.Parameter(self._lengths(), self.weight.requires_grad)

    def _lengths(self) -> Tensor:
        return _norm(self._vectors().detach()).to(self.weight.dtype)


def _norm(filters: Tensor) -> Tensor:
    """The norm of each filter, (O, 1, 1, 1), float32 at least."""
    dtype = torch.promote_types(filters.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(filters, dim=(1, 2, 3), keepdim=True, dtype=dtype)
    return norm
