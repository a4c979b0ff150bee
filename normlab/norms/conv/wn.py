"""Weight normalization (Salimans & Kingma 2016)."""

from functools import partial

import torch
from torch import Tensor, nn

from normlab.norms._grouped import is_channels_last
from normlab.norms.conv.base import ReparametrizedConv2d

__all__ = ["WeightNormConv2d"]


class WeightNormConv2d(ReparametrizedConv2d):
    """A convolution with filters g v / |v|: their direction and their length learn apart.

    v is `weight`, (O, I / groups, kh, kw), and g is `weight_g`, (O, 1, 1, 1): one length per
    filter, |.| the Euclidean norm over a filter. Taking the place of a convolution (`from_conv`),
    or made anew, g = |v|: the function is the plain one's, to rounding; the gradient of v is
    orthogonal to v.

    A filter of zeros stays 0 and passes finite gradients (|v| counts as 1 there). Where g is 0 as
    well nothing can move: not for zero-initialized filters.

    Limits: the plain convolution where g = |v|.

    Args: those of torch.nn.Conv2d.

    State: `weight` (v), `weight_g`, and `bias`. The norm is float32 at least. Weight decay treats
    `weight_g` as the gamma of a norm. Errors: those of torch.nn.Conv2d.

    Source: Salimans & Kingma 2016, equation 2. Peers: torch.nn.utils.parametrizations.weight_norm
    is equal, its `original0` being g and its `original1` v; filters of zeros are nan there.
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
        # Asking for a norm's value would wait for a GPU, and torch's transformations have none.
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        weight = self.weight
        if weight.is_cpu and not transformed:
            v = self._fused()
            filters, norm = _weight_norm(v, self.weight_g.to(v.dtype))
            if self._excess(norm).min().item() > 0:
                return filters.to(weight.dtype)
        v = self._vectors()
        norm = _norm(v)
        filters = v * (self.weight_g / norm.masked_fill(self._excess(norm) <= 0, 1.0))
        return filters.to(weight.dtype)

    def _vectors(self) -> Tensor:
        """What the filters have the direction of, float32 at least."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def _fused(self) -> Tensor:
        """The same for torch's operator, whose statistics are float32 for half filters too."""
        return self.weight

    def _excess(self, norm: Tensor) -> Tensor:
        """By how much the norms (O, 1, 1, 1) are above those of no direction."""
        return norm

    def _adopt(self) -> None:
        self.weight_g = nn.Parameter(self._lengths(), self.weight.requires_grad)

    def _lengths(self) -> Tensor:
        return _norm(self._vectors().detach()).to(self.weight.dtype)


def _weight_norm(v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """g v / |v| in the memory layout of v, and |v| (O, 1, 1, 1) without gradient.

    By torch's operator, which reads contiguous v (O, ...) once.
    """
    last = is_channels_last(v)
    v = v.movedim(1, -1) if last else v.contiguous()
    filters, norm = torch._weight_norm_interface(v, g)
    if filters.grad_fn is not None:
        filters.grad_fn.register_hook(partial(_differentiable, v, g))
    return filters.movedim(-1, 1) if last else filters, norm.detach()


def _differentiable(
    v: Tensor, g: Tensor, found: tuple[Tensor | None, ...], incoming: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of v and g that were `found`, such that they can be differentiated again.

    torch's own second derivative takes the norms for constants. A hook, since a Function of our own
    costs more than the operator does for small filters.
    """
    if not torch.is_grad_enabled():
        return None
    length = _norm(v)
    directions = v / length
    dg = (incoming[0] * directions).sum((1, 2, 3), keepdim=True)
    dv = (incoming[0] - directions * dg) * (g / length)
    due = dv.to(v.dtype), dg.to(g.dtype)
    return tuple(None if old is None else new for old, new in zip(found, due, strict=True))


def _norm(filters: Tensor) -> Tensor:
    """The norm of each filter, (O, 1, 1, 1), float32 at least."""
    dtype = torch.promote_types(filters.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(filters, dim=(1, 2, 3), keepdim=True, dtype=dtype)
    return norm
