"""Samples whose derivatives end here: batch norm that learns from some of its samples alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.norms._grouped import _transformed, is_half

__all__ = ["constant_from", "constant_output", "own_gradient", "worth_own_sums"]


class _ConstantFrom(torch.autograd.Function):
    """The identity, to whose derivative the samples from `own` on are constants."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, own: int) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.own = inputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # Outside of double backward dy is new, made by what normalizes: nobody else reads it.
        dx = dy.clone() if torch.is_grad_enabled() or _transformed() else dy
        dx[ctx.own :] = 0
        return dx, None


class _ConstantHere(torch.autograd.Function):
    """_ConstantFrom in the memory of x: no view, which what follows could not change in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: int) -> Tensor:
        ctx.own = own
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            return torch.cat([dy[: ctx.own], torch.zeros_like(dy[ctx.own :])]), None
        dx = torch.empty_like(dy)
        dx[: ctx.own] = dy[: ctx.own]
        dx[ctx.own :].zero_()
        return dx, None


LARGE = 2**17
"""Elements from which half a backward pass saves more time than its further calls take."""


def worth_own_sums(x: Tensor) -> bool:
    """Whether backward takes its sums itself, for the samples that gradients reach.

    Of half inputs torch's operator takes them, and rounds once: two roundings in operators of our
    own would lose the small projections, and in float32 these are slower than its zeros.
    """
    if x.device.type != "cpu" or is_half(x) or _transformed() or not torch.is_grad_enabled():
        return False
    return x.numel() >= LARGE


class _OwnGradient(torch.autograd.Function):
    """See own_gradient.

    With h = (x - mean) rstd, sums over the first `own` samples, and M elements per channel of all:
    dweight = sum(dy h), dbias = sum(dy), dx = weight rstd (dy - (dbias + h dweight) / M).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        own: int,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.own, ctx.eps = own, eps
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        own, needed, rest = ctx.own, ctx.needs_input_grad[:3], (None,) * 5
        if torch.is_grad_enabled():
            constant = constant_from(x, own)
            y = F.batch_norm(constant, None, None, weight, bias, True, 0.0, ctx.eps)
            known = [t for t, wanted in zip((x, weight, bias), needed, strict=True) if wanted]
            found = iter(torch.autograd.grad(y[:own], known, dy[:own], create_graph=True))
            return *(next(found) if wanted else None for wanted in needed), *rest
        z, dz = x[:own], dy[:own]
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dz, z, weight, None, None, mean, rstd, True, ctx.eps, (False, True, True)
        )
        dx = None
        if needed[0]:
            count, dx = x.numel() // x.size(1), torch.empty_like(x)
            scale = rstd if weight is None else rstd * weight
            z, dz, part = (v.movedim(1, -1) for v in (z, dz, dx[:own]))
            torch.sub(z, mean, out=part)
            torch.addcmul(dz, part, dweight * rstd, value=-1 / count, out=part)
            if z.is_contiguous():
                torch.addcmul(dbias * scale / -count, part, scale, out=part)
            else:  # two operators, which are vectorized where that one is not
                part.sub_(dbias, alpha=1 / count).mul_(scale)
            dx[own:].zero_()
        return dx, dweight if needed[1] else None, dbias if needed[2] else None, *rest


def own_gradient(
    x: Tensor,
    own: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's batch norm of x (N, C, ...) in training, learning from the first `own` samples alone.

    Moves running mean and variance (C,), if there are any. Returns y, and mean and rstd (C,)
    without gradient. The other samples of x are constants, and nothing depends on theirs of y.
    """
    y, mean, rstd = _OwnGradient.apply(x, weight, bias, *running, own, momentum, eps)
    return y, mean, rstd


def constant_from(x: Tensor, own: int) -> Tensor:
    y: Tensor = _ConstantFrom.apply(x, own)
    return y


def constant_output(y: Tensor, own: int) -> Tensor:
    """y (N, C, ...), of which nothing else has a need, with samples from `own` on detached."""
    if _transformed():
        return torch.cat([y[:own], y[own:].detach()])  # such Functions are not taken there
    constant: Tensor = _ConstantHere.apply(y, own)
    return constant
