"""The kernels as operators of torch (`torch.ops.normlab`), with fakes and derivatives.

Eager code calls what is behind an operator directly: the dispatcher would take as long again as a
small batch norm. A compiler, and whatever else looks at operators, sees the operators.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normlab.kernels import _calls, _fakes, _switch
from normlab.kernels._formula import batch_norm_backward as by_formula

__all__ = [
    "batch_norm",
    "gradient",
    "gradient_sums",
    "kept",
    "moments",
    "move_towards",
    "normalize",
    "renorm",
    "renorm_backward",
]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    groups: int,
    interleaved: bool = False,
    span: int = 1,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight * (x - mean) / sqrt(var + eps) + bias by each group's statistics of x (N, C, ...).

    Sample i belongs to group i // (N / G), or to i % G where `interleaved`; a mean is over the
    group's samples and positions and over `span` consecutive channels. weight and bias are (C,), or
    both (G, C). Returns y, laid out as x and of its dtype, and mean and biased variance
    (G, C / span) in float64, without gradient.
    """
    weight, bias = _float(weight), _float(bias)
    if _seen(x):
        done: tuple[Tensor, Tensor, Tensor]
        done = torch.ops.normlab.batch_norm(x, weight, bias, groups, interleaved, span, eps)
        return done
    done = _BatchNorm.apply(x, weight, bias, groups, interleaved, span, eps)
    return done


def moments(x: Tensor, *, groups: int, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (G, C) of x (N, C, ...) in float64; groups as in `batch_norm`.

    It has no derivative.
    """
    if torch.is_grad_enabled():
        _refuse_gradient(x)
    call = torch.ops.normlab.moments if _seen(x) else _calls.moments
    mean, var = call(x, groups, interleaved)
    return mean, var


def normalize(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    groups: int = 1,
    interleaved: bool = False,
    eps: float,
) -> Tensor:
    """weight * (x - mean) / sqrt(var + eps) + bias by given statistics, (G, C), or (C,) for G = 1.

    mean, weight and bias are zeros and ones where they are None. mean and var are computed with in
    float64, whatever they come in. Groups and shapes are as in
    `batch_norm`. It has no derivative: who calls it has one.
    """
    if torch.is_grad_enabled():
        _refuse_gradient(x, weight, bias)
    call = torch.ops.normlab.normalize if _seen(x) else _calls.normalize
    y: Tensor = call(x, mean, var, weight, bias, groups, interleaved, eps)
    return y


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, *, groups: int = 1, eps: float
) -> Tensor:
    """Sums (2, G, C) in float64 of dy and of dy * h, h = (x - mean) / sqrt(var + eps).

    Groups are consecutive samples; mean and var are (G, C). It has no derivative.
    """
    if torch.is_grad_enabled():
        _refuse_gradient(dy, x)
    call = torch.ops.normlab.gradient_sums if _seen(x) else _calls.gradient_sums
    sums: Tensor = call(dy, x, mean.double(), var.double(), groups, eps)
    return sums


def gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sums: Tensor,
    *,
    groups: int = 1,
    eps: float,
    count: float,
) -> Tensor:
    """weight / sqrt(var + eps) * (dy - sums[0] / count - h * sums[1] / count): dx.

    sums are `gradient_sums`, of all who share the statistics of `count` elements per channel. It
    has no derivative.
    """
    if torch.is_grad_enabled():
        _refuse_gradient(dy, x, weight, sums)
    call = torch.ops.normlab.gradient if _seen(x) else _calls.gradient
    dx: Tensor = call(dy, x, weight, mean.double(), var.double(), sums, groups, eps, count)
    return dx


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    groups: int,
    interleaved: bool = False,
    span: int = 1,
    eps: float,
    for_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """dx of `batch_norm`, and the gradients of bias and weight: (2, C), or (2, G, C) for own ones.

    dx is empty unless for_x.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Somebody wants a derivative of this one: by operators that have one.
        return by_formula(dy, x, weight, groups=groups, interleaved=interleaved, span=span, eps=eps)
    call = torch.ops.normlab.batch_norm_backward if _seen(x) else _calls.batch_norm_backward
    dx, affine = call(dy, x, weight, mean, var, groups, interleaved, span, eps, for_x)
    return dx, affine


def renorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    limits: tuple[Any, Any],
    *,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight * ((x - mean) / s * r + d) + bias, s = sqrt(var + eps), by each group's statistics.

    r = s / sigma within [1 / R, R] and d = (mean - running_mean) / sigma within [-D, D], with
    sigma = sqrt(running_var + eps) and limits (R, D), numbers or tensors of one. weight, bias and
    the running statistics are (C,); groups are consecutive samples. Returns y, mean and biased
    variance (G, C) in float64, and r and d (2, G, C) in float32. It has no derivative.
    """
    if torch.is_grad_enabled():
        _refuse_gradient(x, weight, bias)
    known = weight, bias, running_mean, running_var
    done: tuple[Tensor, Tensor, Tensor, Tensor]
    if _seen(x):
        both = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in limits])
        done = torch.ops.normlab.renorm(x, *known, both, groups, eps)
    else:
        done = _calls.renorm(x, *known, limits, groups, eps)
    return done


def renorm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    correction: Tensor,
    *,
    eps: float,
    for_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """dx of `renorm`, r and d being constants, and the gradients (2, C) of bias and weight.

    dx is empty unless for_x.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        r, d = correction
        scale = r if weight is None else r * weight
        dx, (dshift, dscale) = by_formula(
            dy, x, scale, groups=len(r), interleaved=False, span=1, eps=eps
        )
        return dx, torch.stack([dshift.sum(0), (r * dscale + d * dshift).sum(0)])
    call = torch.ops.normlab.renorm_backward if _seen(x) else _calls.renorm_backward
    dx, affine = call(dy, x, weight, mean, var, correction, eps, for_x)
    return dx, affine


def move_towards(
    mean: Tensor, var: Tensor, means: Tensor, vars: Tensor, *, count: int, weight: float
) -> bool:
    """Move mean and var (C,) in place as `PopulationNorm.ema_step` does, if the kernels can.

    means and biased vars (G, C), over count elements each, are those of `batch_norm` or `moments`;
    others, and what is compiled, are left to the caller: it returns whether it has moved.
    """
    if (
        means.dtype != torch.float64
        or mean.dtype != torch.float32
        or var.dtype != torch.float32
        or not _switch.enabled()
        or _seen(mean)
        or not (mean.is_contiguous() and var.is_contiguous())
        or not (means.is_contiguous() and vars.is_contiguous())
        or mean.device.type != "cpu"
    ):
        return False
    _calls.move(mean, var, (means, vars), count / (count - 1), weight)
    return True


def kept(v: Tensor) -> Tensor:
    """v (a constant) for the backward pass of a compiled step, which does not compute it again.

    torch recomputes what is cheap from the inputs of the graph, buffers included, and finds them as
    the forward has left them (torch 2.15). It recomputes no operator that it does not know.
    """
    constant: Tensor = torch.ops.normlab.kept(v) if torch.compiler.is_compiling() else v
    return constant


def _refuse_gradient(*tensors: Tensor | None) -> None:
    if any(v is not None and v.requires_grad for v in tensors):
        raise RuntimeError("this kernel has no derivative, and an input requires one")


def _float(v: Tensor | None) -> Tensor | None:
    return v if v is None or v.dtype == torch.float32 else v.float()


def _seen(x: Tensor) -> bool:
    """Whether somebody looks at the operators: a compiler, a subclass of Tensor, a mode."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


# -- derivatives -----------------------------------------------------------------------------------


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, *ctx.options = inputs
    _, mean, var = output
    ctx.save_for_backward(x, weight, mean, var)
    ctx.bias = bias is not None
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * 4
    if dy is None:
        return None, None, None, *nothing
    x, weight, mean, var = ctx.saved_tensors
    groups, interleaved, span, eps = ctx.options
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    how = {"groups": groups, "interleaved": interleaved, "span": span, "eps": eps}
    dx, affine = batch_norm_backward(dy, x, weight, mean, var, **how, for_x=for_x)
    dbias, dweight = affine.unbind()
    return (
        dx if for_x else None,
        dweight if for_weight else None,
        dbias if for_bias else None,
        *nothing,
    )


class _BatchNorm(torch.autograd.Function):
    """The operator's derivative without the operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _calls.batch_norm(*inputs)
        _remember(ctx, inputs, output)
        return output

    backward = staticmethod(_differentiate)


# -- what a dispatcher knows of them ---------------------------------------------------------------

_GROUPS = "SymInt groups, bool interleaved"

_defined = torch.library.Library("normlab", "DEF")
for _name, _signature, _kernel, _fake in (
    (
        "batch_norm",
        f"(Tensor x, Tensor? weight, Tensor? bias, {_GROUPS}, SymInt span, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        _calls.batch_norm,
        _fakes.batch_norm,
    ),
    ("moments", f"(Tensor x, {_GROUPS}) -> (Tensor, Tensor)", _calls.moments, _fakes.moments),
    (
        "normalize",
        "(Tensor x, Tensor? mean, Tensor var, Tensor? weight, Tensor? bias, "
        f"{_GROUPS}, float eps) -> Tensor",
        _calls.normalize,
        _fakes.normalize,
    ),
    (
        "batch_norm_backward",
        "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor var, "
        f"{_GROUPS}, SymInt span, float eps, bool for_x) -> (Tensor, Tensor)",
        _calls.batch_norm_backward,
        _fakes.batch_norm_backward,
    ),
    (
        "renorm",
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
        "Tensor limits, SymInt groups, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
        _calls.renorm,
        _fakes.renorm,
    ),
    (
        "renorm_backward",
        "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor correction, "
        "float eps, bool for_x) -> (Tensor, Tensor)",
        _calls.renorm_backward,
        _fakes.renorm_backward,
    ),
    (
        "gradient_sums",
        "(Tensor dy, Tensor x, Tensor mean, Tensor var, SymInt groups, float eps) -> Tensor",
        _calls.gradient_sums,
        _fakes.gradient_sums,
    ),
    (
        "gradient",
        "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor sums, "
        "SymInt groups, float eps, float count) -> Tensor",
        _calls.gradient,
        _fakes.gradient,
    ),
):
    _defined.define(_name + _signature)
    _defined.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"normlab::{_name}", _fake, lib=_defined)
_defined.define("kept(Tensor v) -> Tensor")
_defined.impl("kept", _calls.kept, "CompositeExplicitAutograd")
torch.library.register_fake("normlab::kept", _calls.kept, lib=_defined)
torch.library.register_autograd(
    "normlab::batch_norm", _differentiate, setup_context=_remember, lib=_defined
)
