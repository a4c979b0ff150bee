"""Normalizing many groups in either memory layout, without a loop unless the groups are large.

Routes are chosen by layout, precision and size, because no operator of torch is both quick and
accurate on a CPU in all of them:

- Whatever `normlab.kernels` takes: those, in any size; group norm in channels_last alone, since in
  NCHW torch's has fewer calls. What follows is the pure path.

- NCHW: each group's channels gathered into rows, then group norm of one channel per group; of large
  maps on a CPU, `_chunked`; where groups interleave, half inputs go through batch norm on a view.
- channels_last, one group of all channels: layer norm.
- channels_last, half precision, large groups of samples: torch's batch norm of each
  (`_EachGroup`).
- channels_last otherwise: `_CenteredNorm` below. torch's own channels_last group norm on a CPU
  computes E[x^2] - E[x]^2 in float32: wrong by 3e-1 at mean 1e3 and by 1e3 at mean 1e4 for a spread
  of 1.
- channels_last, half precision: statistics per channel by batch norm with one channel per group and
  channel, which needs no float32 copy of the input; group norm through a contiguous copy.

Statistics are float32 at least, whatever the input's dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab import kernels
from normlab.norms._chunked import chunked_batch_norm, chunks_in_place

__all__ = [
    "float32_affine",
    "group_norm",
    "grouped_batch_norm",
    "is_channels_last",
    "is_half",
    "layer_norm",
    "variance",
]


def is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def float32_affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`weight` and `bias` such that torch's operators take float32 statistics of a half `x`.

    They do so only where a parameter is float32: without one, mean and rstd are rounded to half.
    """
    if not is_half(x):
        return weight, bias
    channels = x.size(1)
    weight = x.new_ones(channels, dtype=torch.float32) if weight is None else weight.float()
    bias = x.new_zeros(channels, dtype=torch.float32) if bias is None else bias.float()
    return weight, bias


def _needs_float32(x: Tensor) -> bool:
    """Whether torch's operators refuse a half `x` with float32 parameters: all but the CPU's do."""
    return is_half(x) and x.device.type != "cpu"


def _float32(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What stands beside a half input that was made float32: half parameters cannot."""
    return None if weight is None else weight.float(), None if bias is None else bias.float()


def variance(rstd: Tensor, eps: float) -> Tensor:
    """The biased variance behind rstd = 1 / sqrt(var + eps); rounding below zero is clamped."""
    return rstd.detach().pow(-2).sub_(eps).clamp_(min=0)


def _transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _worth_a_call_each(x: Tensor, groups: int, interleaved: bool) -> bool:
    """Whether groups of channels_last are so large that a call for each costs less than copies.

    Of half inputs alone: the operator's float32 sums over many elements lose a spread of 1 about a
    mean of 1e4, which a half input cannot hold anyway.
    """
    if x.device.type != "cpu" or _transformed() or interleaved or not is_half(x):
        return False
    return x.numel() // groups >= 2**17


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def grouped_batch_norm(
    x: Tensor,
    groups: int,
    *,
    interleaved: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of each of `groups` equal groups of samples.

    x is (N, C, ...) with `groups` dividing N. Sample i belongs to group i // (N / G), or to i % G
    where `interleaved`. weight and bias are (C,), shared by the groups, or both (G, C). Returns y,
    in the dtype of x, and channels_last where x is, and mean and biased variance (G, C), detached.
    """
    if kernels.takes(x):
        y, mean, var = kernels.batch_norm(
            x, weight, bias, groups=groups, interleaved=interleaved, eps=eps
        )
        return y, mean.float(), var.float()
    if _needs_float32(x):
        weight, bias = _float32(weight, bias)
        y, mean, var = grouped_batch_norm(
            x.float(), groups, interleaved=interleaved, weight=weight, bias=bias, eps=eps
        )
        return y.to(x.dtype), mean, var
    samples, channels = x.shape[:2]
    split = (samples // groups, groups) if interleaved else (groups, samples // groups)
    weight, bias = float32_affine(x, weight, bias)
    own = weight is not None and weight.dim() == 2
    if is_channels_last(x):
        last = x.movedim(1, -1)
        z = last.reshape(*split, -1, channels)
        if interleaved:
            z = z.transpose(0, 1)
        if _worth_a_call_each(x, groups, interleaved):
            y, mean, rstd = _EachGroup.apply(z.reshape(groups, -1, channels), weight, bias, eps)
        elif is_half(x):
            rows = z.reshape(groups, -1, channels).transpose(0, 1).reshape(-1, groups * channels)
            assert weight is not None
            assert bias is not None
            w, b = (v.flatten() if own else v.repeat(groups) for v in (weight, bias))
            y, mean, rstd = torch.native_batch_norm(rows, w, b, None, None, True, 0.0, eps)
            y = y.view(-1, groups, channels).transpose(0, 1)
        else:
            rows = z.reshape(groups, -1, channels)
            w, b = (v[:, None] if own else v for v in _affine(x, weight, bias))
            y, mean, rstd, _ = _CenteredNorm.apply(rows, w, b, channels, eps)
        if interleaved:
            y = y.reshape(groups, split[0], -1, channels).transpose(0, 1)
        y = y.reshape(last.shape).movedim(-1, 1)
    elif groups > 1 and chunks_in_place(x, weight, bias):
        return chunked_batch_norm(
            x, groups, interleaved=interleaved, weight=weight, bias=bias, eps=eps
        )
    elif interleaved and is_half(x):  # no copies: a group's channels are channels of their own
        assert weight is not None
        assert bias is not None
        w, b = (v.flatten() if own else v.repeat(groups) for v in (weight, bias))
        view = x.reshape(split[0], groups * channels, *x.shape[2:])
        y, mean, rstd = torch.native_batch_norm(view, w, b, None, None, True, 0.0, eps)
        y = y.view(x.shape)
    else:
        z = x.reshape(*split, channels, -1)
        z = z.permute(1, 2, 0, 3) if interleaved else z.transpose(1, 2)
        gathered = z.shape
        z = z.reshape(groups, channels, -1)
        if own:  # one row whose channels are all groups' channels
            assert weight is not None
            assert bias is not None
            weight, bias = weight.flatten(), bias.flatten()
        batch, wide = (1, groups * channels) if own else (groups, channels)
        y, mean, rstd = torch.native_group_norm(
            z.reshape(batch, wide, -1), weight, bias, batch, wide, z.size(2), wide, eps
        )
        y = y.view(gathered)
        y = y.permute(2, 0, 1, 3) if interleaved else y.transpose(1, 2)
        y = y.reshape(x.shape)
    mean = mean.detach().view(groups, channels)
    return y, mean, variance(rstd, eps).view(groups, channels)


def group_norm(
    x: Tensor, groups: int, *, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group norm of each sample's `groups` groups of consecutive channels; affine per channel.

    x is (N, C, ...) with `groups` dividing C. The output has the dtype and memory layout of x.
    """
    if is_channels_last(x) and kernels.takes(x):
        samples, channels = x.shape[:2]
        return kernels.batch_norm(
            x, weight, bias, groups=samples, span=channels // groups, eps=eps
        )[0]
    if _needs_float32(x):
        weight, bias = _float32(weight, bias)
        return group_norm(x.float(), groups, weight=weight, bias=bias, eps=eps).to(x.dtype)
    samples, channels = x.shape[:2]
    weight, bias = float32_affine(x, weight, bias)
    y: Tensor
    if is_channels_last(x):
        last = x.movedim(1, -1)
        if groups == 1:
            shape = last.shape[1:]  # a row per sample, whose moments torch takes accurately
            weight = None if weight is None else weight.expand(shape)
            bias = None if bias is None else bias.expand(shape)
            return F.layer_norm(last, shape, weight, bias, eps).movedim(-1, 1)
        if is_half(x) and x[0].numel() >= 256 * groups:  # below, that operator is slow itself
            rows = _Laid.apply(x, False)
            spatial = rows[0, 0].numel()
            y = torch.native_group_norm(
                rows, weight, bias, samples, channels, spatial, groups, eps
            )[0]
            y = _Laid.apply(y, True)
            return y
        z = last.reshape(samples, -1, channels)
        y = _CenteredNorm.apply(z, *_affine(x, weight, bias), groups, eps)[0]
        return y.view(last.shape).movedim(-1, 1)
    x = x.contiguous()
    spatial = x[0, 0].numel() if samples else 1
    return torch.native_group_norm(x, weight, bias, samples, channels, spatial, groups, eps)[0]


class _Laid(torch.autograd.Function):
    """The values of x (N, C, ...) laid out with the channels last, or contiguous; dx as x was."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, last: bool) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.last = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _Laid.apply(dy, not ctx.last), None


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """torch's layer norm over the last dimensions, of sizes `shape`; y has the dtype of x."""
    z = x
    if is_half(x):
        weight, bias = _float32(weight, bias)
        if weight is None or _needs_float32(x):
            z = x.float()
    return F.layer_norm(z, list(shape), weight, bias, eps).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`weight` and `bias`, ones and zeros where there are none."""
    weight = x.new_ones(x.size(1)) if weight is None else weight
    bias = x.new_zeros(x.size(1)) if bias is None else bias
    return weight, bias


class _EachGroup(torch.autograd.Function):
    """torch's batch norm of each z[k] (M, C) of z (G, M, C), by its kernel for channels_last.

    A loop, for groups that are large enough to be worth a call each: nothing is transposed. weight
    and bias are (C,) or (G, C). Returned are y, and mean and rstd (G, C) without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, channels = z.size(0), z.size(2)
        y = torch.empty_like(z)
        mean = z.new_empty(groups, channels, dtype=torch.promote_types(z.dtype, torch.float32))
        rstd = torch.empty_like(mean)
        weights, biases = _each(weight, groups), _each(bias, groups)
        outs = zip(y.unbind(), mean.unbind(), rstd.unbind(), strict=True)
        for z_k, w, b, out in zip(z.unbind(), weights, biases, outs, strict=True):
            torch.native_batch_norm(z_k, w, b, None, None, True, 0.0, eps, out=out)
        ctx.save_for_backward(z, weight, bias, mean, rstd)
        ctx.eps = eps
        ctx.own = weight is not None and weight.dim() == 2
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, bias, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # somebody wants a derivative of this one
            rows = (v[:, None] if v.dim() == 2 else v for v in _affine(z[0], weight, bias))
            y = _CenteredNorm.apply(z, *rows, z.size(2), ctx.eps)[0]
            known = [t for t, wanted in zip((z, weight, bias), needed, strict=True) if wanted]
            found = iter(torch.autograd.grad(y, known, dy, create_graph=True))
            return *(next(found) if wanted else None for wanted in needed), None
        dz = torch.empty_like(z)
        ours = _each(weight, z.size(0)), mean.unbind(), rstd.unbind()
        affine = []
        each = zip(dz.unbind(), dy.unbind(), z.unbind(), *ours, strict=True)
        for dz_k, dy_k, z_k, w, m, r in each:
            own, *sums = torch.ops.aten.native_batch_norm_backward(
                dy_k, z_k, w, None, None, m, r, True, ctx.eps, needed
            )
            if needed[0]:
                dz_k.copy_(own)
            affine.append(sums)
        dweight, dbias = (
            torch.stack(values) if wanted else None
            for values, wanted in zip(zip(*affine, strict=True), needed[1:], strict=True)
        )
        if not ctx.own:
            dweight, dbias = (None if v is None else v.sum(0) for v in (dweight, dbias))
        return (dz if needed[0] else None), dweight, dbias, None


def _each(values: Tensor | None, groups: int) -> Sequence[Tensor | None]:
    """`values` (C,) or (G, C) or none of each group."""
    if values is None or values.dim() == 1:
        return [values] * groups
    return values.unbind()


class _CenteredNorm(torch.autograd.Function):
    """y = (z - mean) * rstd * weight + bias of z (R, M, C), per row and group of channels.

    weight and bias are (C,), or (R, 1, C) where each row has its own; mean and rstd, returned
    without gradient, are (R, 1, C), equal within each of `groups` groups of consecutive channels.
    The variance is taken of the centered values, which backward reuses in place of z.

    With h = (z - mean) * rstd, g = dy * weight, E the mean over a group's positions and channels:
    dz = rstd * (g - E[g] - h * E[g * h]). A second derivative goes by way of the centered values,
    an output for that reason: theirs is d - E[d].

    Whatever is as large as z is reduced over M only; the groups are pooled on what is left, since a
    reduction over a few neighbouring channels is several times slower.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precision = torch.promote_types(z.dtype, torch.float32)
        mean = _pool(z.mean(1, keepdim=True, dtype=precision), groups)
        centered = z - mean
        rstd = (_pool(centered.square().mean(1, keepdim=True), groups) + eps).rsqrt_()
        y = torch.addcmul(bias, centered, rstd * weight).to(z.dtype)
        return y, mean, rstd, centered

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, weight, _, ctx.groups, ctx.eps = inputs
        _, mean, rstd, centered = output
        ctx.dtype = z.dtype
        ctx.save_for_backward(centered, rstd, weight)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _m: None, _r: None, d_centered: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        dz = dweight = dbias = None
        if dy is not None:
            dz, dweight, dbias = _CenteredNorm._gradients(ctx, dy)
        if d_centered is not None:
            rest = d_centered - _pool(d_centered.mean(1, keepdim=True), ctx.groups)
            dz = rest.to(ctx.dtype) if dz is None else dz + rest.to(ctx.dtype)
        return dz, dweight, dbias, None, None

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centered, rstd, weight = ctx.saved_tensors
        elements = centered.size(1)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            rstd = (_pool(centered.square().mean(1, keepdim=True), ctx.groups) + ctx.eps).rsqrt()
        sums = dy.sum(1, keepdim=True, dtype=centered.dtype)
        dots = (dy * centered).sum(1, keepdim=True) * rstd
        constant = _pool(sums * weight, ctx.groups) * rstd / -elements
        slope = _pool(dots * weight, ctx.groups) * rstd.square() / -elements
        dz = torch.addcmul(constant, dy, rstd * weight).addcmul_(centered, slope)
        size = weight.shape
        return dz.to(dy.dtype), dots.sum_to_size(size), sums.sum_to_size(size)


def _pool(values: Tensor, groups: int) -> Tensor:
    """The mean over each group of consecutive channels of (R, 1, C), in the place of each."""
    if groups == values.size(2):
        return values
    grouped = values.view(values.size(0), 1, groups, -1)
    return grouped.mean(3, keepdim=True).expand_as(grouped).reshape(values.shape)
