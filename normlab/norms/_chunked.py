"""Batch norm of chunks in NCHW on a CPU, without moving each chunk's samples side by side.

Statistics are taken per sample and channel, of the free view (1, N * C, positions), and pooled over
each chunk's samples; what is then left is a scale and a shift per sample and channel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["chunked_batch_norm", "chunks_in_place"]

# Below either, the calls per input and per sample and channel cost more than the copies they spare.
_ELEMENTS = 2**19
_POSITIONS = 100


def chunks_in_place(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `chunked_batch_norm` takes x (N, C, ...) and is the quicker route.

    A compiler fuses the operators of the other one itself; transformations want no Function.
    """
    return (
        x.numel() >= _ELEMENTS
        and x[0, 0].numel() >= _POSITIONS
        and x.dtype in (torch.float32, torch.float64)
        and x.device.type == "cpu"
        and all(v is None or v.dtype == x.dtype for v in (weight, bias))
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def chunked_batch_norm(
    x: Tensor,
    groups: int,
    *,
    interleaved: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grouped_batch_norm` of such an x: y, contiguous, and mean and biased variance (G, C)."""
    each = x.size(0) // groups
    split = (each, groups) if interleaved else (groups, each)
    y, mean, var = _ChunkedNorm.apply(
        x.contiguous(), weight, bias, split, int(not interleaved), eps
    )
    return y, mean.view(groups, -1), var.view(groups, -1)


class _ChunkedNorm(torch.autograd.Function):
    """weight * (x - mean) / sqrt(var + eps) + bias of a contiguous x (N, C, ...).

    split are the two sizes that N splits into, of which dimension `over` counts a chunk's samples;
    weight and bias are (C,) or (G, C). mean and var, without gradient, are (split, C) with 1 there.

    With h = (x - mean) * rstd and E the mean over a chunk's samples and positions,
    dx = rstd * weight * (dy - E[dy] - h * E[dy * h]): per sample and channel, dy and x are scaled
    and added to a constant.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        split: tuple[int, int],
        over: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = *split, x.size(1)
        rows = x.view(1, split[0] * split[1] * shape[2], -1)
        wide, positions = rows.shape[1:]
        _, means, rstds = torch.native_group_norm(rows, None, None, 1, wide, positions, wide, eps)
        # Law of total variance. Of few numbers, hence in double: their spread is next to nothing
        # beside a large mean.
        means = means.double().view(shape)
        within = rstds.double().pow_(-2).sub_(eps).clamp_(min=0).view(shape)
        mean = means.mean(over, keepdim=True)
        var = (means - mean).square_().add_(within).mean(over, keepdim=True)
        rstd = (var + eps).rsqrt_().to(x.dtype)
        mean, var = mean.to(x.dtype), var.to(x.dtype)
        w, b = (None if v is None else _each(v, shape, over) for v in (weight, bias))
        known = _each(mean, shape, over), _each(var, shape, over)
        y = F.batch_norm(rows, *known, w, b, False, eps=eps)
        # Autograd forbids changing a view in place (ReLU) that a Function returned.
        y = torch.ops.aten._unsafe_view(y, x.shape)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.chunks, ctx.bias = (shape, over, eps), None if bias is None else bias.shape
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        shape, over, eps = ctx.chunks
        dx: Tensor | None
        if torch.is_grad_enabled():
            dx, dots, sums = _twice_differentiable(x, weight, dy, shape, over, eps)
        else:
            dx, dots, sums = _gradients(x, weight, dy, mean, rstd, shape, over, for_x)
        if for_weight and weight.dim() == 1:
            dots = dots.sum((0, 1))
        if for_bias and len(ctx.bias) == 1:
            sums = sums.sum((0, 1))
        dweight = dots.view(weight.shape) if for_weight else None
        dbias = sums.view(ctx.bias) if for_bias else None
        return dx if for_x else None, dweight, dbias, None, None, None


def _gradients(
    x: Tensor,
    weight: Tensor | None,
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shape: tuple[int, int, int],
    over: int,
    for_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx, and per chunk and channel the sums of dy * h and of dy: as `mean`, 1 for the samples."""
    rows = x.view(1, shape[0] * shape[1] * shape[2], -1)
    d_rows = dy.contiguous().view(rows.shape)
    known = _each(mean, shape, over), _each(rstd, shape, over)
    # Of this operator's results, the two sums alone: in double, and of centered values.
    _, dots, sums = torch.ops.aten.native_batch_norm_backward(
        d_rows, rows, None, None, None, *known, True, 0.0, [False, True, True]
    )
    dots, sums = (v.view(shape).sum(over, keepdim=True) for v in (dots, sums))
    if not for_x:
        return None, dots, sums
    scale = rstd if weight is None else rstd * _beside(weight, over)
    count = shape[over] * rows.size(2)
    slope = scale * rstd * dots / -count
    constant = scale * sums / -count - slope * mean
    scale, slope, constant = (v.expand(shape).reshape(1, -1, 1) for v in (scale, slope, constant))
    dx = torch.addcmul(constant, d_rows, scale).addcmul_(rows, slope)
    return dx.view_as(x), dots, sums


def _twice_differentiable(
    x: Tensor,
    weight: Tensor | None,
    dy: Tensor,
    shape: tuple[int, int, int],
    over: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of operators that have derivatives, x's own statistics included."""
    z, d = x.reshape(*shape, -1), dy.reshape(*shape, -1)
    centered = z - z.mean((over, 3), keepdim=True)
    rstd = (centered.square().mean((over, 3), keepdim=True) + eps).rsqrt()
    h = centered * rstd
    dots, sums = ((d * h).sum((over, 3), keepdim=True), d.sum((over, 3), keepdim=True))
    scale = rstd if weight is None else rstd * _beside(weight, over).unsqueeze(-1)
    count = h.size(over) * h.size(3)
    dx = scale * (d - sums / count - h * (dots / count))
    return dx.view(x.shape), dots.squeeze(3), sums.squeeze(3)


def _beside(v: Tensor, over: int) -> Tensor:
    """v (C,) or (G, C) as it multiplies what has the samples of a chunk in dimension `over`."""
    return v.unsqueeze(over) if v.dim() == 2 else v


def _each(v: Tensor, shape: tuple[int, int, int], over: int) -> Tensor:
    """v once per sample and channel, of which there are `shape`: (N * C,)."""
    return _beside(v, over).expand(shape).flatten()
