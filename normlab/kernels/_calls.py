"""What is behind each operator: results made, layouts made to agree, the kernels called."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from normlab.kernels import _switch
from normlab.kernels._library import BOTH, FIRST, SECOND, dense

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "empty_correction",
    "empty_statistics",
    "gradient",
    "gradient_sums",
    "kept",
    "laid",
    "moments",
    "move",
    "normalize",
    "renorm",
    "renorm_backward",
]


def laid(x: Tensor) -> Tensor:
    return x if dense(x) else x.contiguous()


def _as(dy: Tensor, x: Tensor) -> Tensor:
    """dy in the memory layout and dtype of x."""
    same = dy.dtype == x.dtype and (dy.stride() == x.stride() or x.is_contiguous())
    if same and (not x.is_contiguous() or dy.is_contiguous()):
        return dy
    return torch.empty_like(x).copy_(dy)


def _ready(v: Tensor | None, w: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """A weight and a bias as the kernels take them: contiguous float32."""
    if v is not None and not (v.dtype == torch.float32 and v.is_contiguous()):
        v = v.float().contiguous()
    if w is not None and not (w.dtype == torch.float32 and w.is_contiguous()):
        w = w.float().contiguous()
    return v, w


def empty_statistics(x: Tensor, groups: int, span: int) -> tuple[Tensor, Tensor]:
    size = groups, x.size(1) // span
    return x.new_empty(size, dtype=torch.float64), x.new_empty(size, dtype=torch.float64)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    interleaved: bool,
    span: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = laid(x)
    y, (mean, var) = torch.empty_like(x), empty_statistics(x, groups, span)
    affine = _ready(weight, bias)
    _switch.kernels().forward(BOTH, x, y, *affine, mean, var, groups, interleaved, span, eps)
    return y, mean, var


def moments(x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    x = laid(x)
    mean, var = empty_statistics(x, groups, 1)
    none = None, None, None
    _switch.kernels().forward(FIRST, x, *none, mean, var, groups, interleaved, 1, 1.0)
    return mean, var


def normalize(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    interleaved: bool,
    eps: float,
) -> Tensor:
    x = laid(x)
    y = torch.empty_like(x)
    weight, bias = _ready(weight, bias)
    single = var.dtype == torch.float32
    if mean is not None:
        single = single and mean.dtype == torch.float32
        mean = (mean if single else mean.double()).contiguous()
    var = (var if single else var.double()).contiguous()
    known = weight, bias, mean, var
    _switch.kernels().forward(SECOND, x, y, *known, groups, interleaved, 1, eps)
    return y


def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    groups: int,
    interleaved: bool,
    span: int,
    eps: float,
    for_x: bool,
) -> tuple[Tensor, Tensor]:
    x = laid(x)
    channels = x.size(1)
    dx = torch.empty_like(x) if for_x else x.new_empty(0)
    sums = mean.new_empty((2, groups, channels))
    own = weight is not None and weight.dim() == 2
    affine = x.new_empty((2, groups, channels) if own else (2, channels), dtype=torch.float32)
    _switch.kernels().backward(
        BOTH if for_x else FIRST, _as(dy, x), x, dx if for_x else None, _ready(weight)[0],
        mean, var, sums, affine, groups, interleaved, span, eps,
        span * x.numel() / (groups * channels),
    )  # fmt: skip
    return dx, affine


def renorm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    limits: Sequence[float] | Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = laid(x)
    y, (mean, var) = torch.empty_like(x), empty_statistics(x, groups, 1)
    correction = empty_correction(x, groups)
    known = *_ready(weight, bias), mean, var
    r_limit, d_limit = limits
    running = running_mean.float().contiguous(), running_var.float().contiguous()
    towards = *running, float(r_limit), float(d_limit), correction
    _switch.kernels().forward(BOTH, x, y, *known, groups, False, 1, eps, towards)
    return y, mean, var, correction


def empty_correction(x: Tensor, groups: int) -> Tensor:
    return x.new_empty((2, groups, x.size(1)), dtype=torch.float32)


def renorm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    correction: Tensor,
    eps: float,
    for_x: bool,
) -> tuple[Tensor, Tensor]:
    x = laid(x)
    groups, channels = mean.size(0), mean.size(1)
    dx = torch.empty_like(x) if for_x else x.new_empty(0)
    affine = x.new_empty((2, channels), dtype=torch.float32)
    _switch.kernels().backward(
        BOTH if for_x else FIRST, _as(dy, x), x, dx if for_x else None, _ready(weight)[0],
        mean, var, mean.new_empty((2, groups, channels)), affine, groups, False, 1, eps,
        x.numel() / (groups * channels), correction,
    )  # fmt: skip
    return dx, affine


def gradient_sums(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, groups: int, eps: float
) -> Tensor:
    x = laid(x)
    sums = mean.new_empty((2, groups, x.size(1)))
    known = mean.contiguous(), var.contiguous()
    _switch.kernels().backward(
        FIRST, _as(dy, x), x, None, None, *known, sums, None, groups, False, 1, eps, 1.0
    )
    return sums


def gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sums: Tensor,
    groups: int,
    eps: float,
    count: float,
) -> Tensor:
    x = laid(x)
    dx = torch.empty_like(x)
    known = _ready(weight)[0], mean.contiguous(), var.contiguous(), sums.contiguous()
    _switch.kernels().backward(
        SECOND, _as(dy, x), x, dx, *known, None, groups, False, 1, eps, count
    )
    return dx


def move(mean: Tensor, var: Tensor, to: tuple[Tensor, Tensor], unbiased: float, w: float) -> None:
    _switch.kernels().move(to, unbiased, w, mean, var)
    increment_version((mean, var))


def kept(v: Tensor) -> Tensor:
    return v.clone()
