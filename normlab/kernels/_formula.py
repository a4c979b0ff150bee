"""The gradient of batch norm by operators that have derivatives themselves."""

import torch
from torch import Tensor

__all__ = ["batch_norm_backward"]


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    *,
    groups: int,
    interleaved: bool,
    span: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `normlab.kernels.batch_norm_backward` returns, x's own statistics included.

    With h = (x - mean) / sqrt(var + eps), g = dy * weight and E the mean over what shares a mean:
    dx = (g - E[g] - h * E[g h]) / sqrt(var + eps).
    """
    samples, channels = x.shape[:2]
    split = (samples // groups, groups) if interleaved else (groups, samples // groups)
    over = 0 if interleaved else 1
    shape = (*split, channels // span, span, -1)
    precision = torch.promote_types(x.dtype, torch.float32)
    z, d = (v.to(precision).reshape(shape) for v in (x, dy))
    all_of = (over, 3, 4)
    centered = z - z.mean(all_of, keepdim=True)
    rstd = (centered.square().mean(all_of, keepdim=True) + eps).rsqrt()
    h = centered * rstd
    own = weight is not None and weight.dim() == 2
    scaled = d
    if weight is not None:
        each = weight.view(-1, channels // span, span, 1).unsqueeze(over)
        scaled = d * each
    rest = scaled - scaled.mean(all_of, keepdim=True) - h * (scaled * h).mean(all_of, keepdim=True)
    dx = (rest * rstd).reshape(x.shape).to(x.dtype)
    for_affine = (over, 4) if own else (0, 1, 4)
    dbias, dweight = d.sum(for_affine), (d * h).sum(for_affine)
    size = (groups, channels) if own else (channels,)
    return dx, torch.stack([dbias.reshape(size), dweight.reshape(size)])
