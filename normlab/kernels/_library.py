"""The compiled kernels, called with raw pointers, and checked before anything relies on them."""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from normlab.kernels._build import Unavailable, compiled

__all__ = ["Kernels", "dense", "loaded"]

FIRST, SECOND, BOTH = 1, 2, 3
"""The passes over the data: sums, and what is made with them."""


class Kernels:
    """Batch norm of groups of samples, as the two functions of fused.cpp.

    All tensors are on the CPU; x (N, C, ...) is `dense`, in float32 or bfloat16, y, dy and dx are
    laid out as it is; weight and bias are contiguous float32, (C,) or (G, C); mean and var are
    float64 (G, C / span), where they are given to a second pass alone also both float32.
    """

    def __init__(self, path: str) -> None:
        try:
            library = ctypes.CDLL(path)
            self._forward, self._backward = library.normlab_forward, library.normlab_backward
            self._move = library.normlab_move
        except (OSError, AttributeError) as error:
            raise Unavailable(f"cannot load {path}: {error}") from error
        common: list[Any] = [c_int, c_int, c_int, c_int64, c_void_p, c_int64, c_double]
        self._forward.argtypes = [*common, c_int, c_int, *[c_void_p] * 6]
        self._backward.argtypes = [*common, c_double, c_int, *[c_void_p] * 10]
        self._move.argtypes = [c_int64, c_int64, c_double, c_double, *[c_void_p] * 4]
        self._move.restype = None

    def forward(
        self,
        passes: int,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor,
        groups: int,
        interleaved: bool,
        span: int,
        eps: float,
    ) -> None:
        """Fills mean and var (first pass), and y by what they then are (second pass)."""
        failed = self._forward(
            *_common(passes, x, groups, interleaved, span, eps), _own(weight, bias),
            var.dtype == torch.float32, x.data_ptr(), _at(y), _at(weight), _at(bias), _at(mean),
            var.data_ptr(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for a batch norm's sums")

    def backward(
        self,
        passes: int,
        dy: Tensor,
        x: Tensor,
        dx: Tensor | None,
        weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        sums: Tensor,
        affine: Tensor | None,
        groups: int,
        interleaved: bool,
        span: int,
        eps: float,
        count: float,
    ) -> None:
        """Fills sums (2, G, C), of dy and of dy * h (first pass); then dx by them (second pass).

        affine, if given, is filled with the gradients of bias and weight: (2, C), or (2, G, C) for
        a weight (G, C).
        """
        # The second row of each, without a tensor for it.
        to_sums, to_affine = sums.data_ptr(), _at(affine)
        dots = to_sums + sums.numel() // 2 * 8
        to_weight = None if affine is None else affine.data_ptr() + affine.numel() // 2 * 4
        failed = self._backward(
            *_common(passes, x, groups, interleaved, span, eps), count, _own(weight, None),
            dy.data_ptr(), x.data_ptr(), _at(dx), _at(weight), mean.data_ptr(), var.data_ptr(),
            to_sums, dots, to_affine, to_weight,
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for a batch norm's sums")

    def move(
        self, to: tuple[Tensor, Tensor], unbiased: float, weight: float, mean: Tensor, var: Tensor
    ) -> None:
        """mean and var (C,), float32, by `weight` towards the averages of those in `to` (G, C)."""
        means, vars = to
        at = means.data_ptr(), vars.data_ptr(), mean.data_ptr(), var.data_ptr()
        self._move(*means.shape, unbiased, weight, *at)


def dense(x: Tensor) -> bool:
    """Whether x (N, C, ...) is contiguous, or has its channels last."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _own(weight: Tensor | None, bias: Tensor | None) -> bool:
    given = bias if weight is None else weight
    return given is not None and given.dim() == 2


def _common(
    passes: int, x: Tensor, groups: int, interleaved: bool, span: int, eps: float
) -> tuple[object, ...]:
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    each = samples // groups
    steps = (1, groups) if interleaved else (each, 1)
    shape = (c_int64 * 6)(channels, positions, groups, each, *steps)
    last = positions == 1 or not x.is_contiguous()
    half = x.dtype == torch.bfloat16
    return half, last, passes, torch.get_num_threads(), shape, span, eps


def loaded() -> Kernels:
    """The kernels of this machine. Raises Unavailable, also where they compute something wrong."""
    kernels = Kernels(str(compiled()))
    with torch.no_grad():
        for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            for last in (False, True):
                error = _error(kernels, dtype, last)
                if not error < allowed:
                    raise Unavailable(
                        f"the compiled kernels are wrong by {error:.1e} in {dtype}, "
                        f"{'channels_last' if last else 'NCHW'}"
                    )
    return kernels


def _error(kernels: Kernels, dtype: torch.dtype, last: bool) -> float:
    """The largest difference from the formula in float64, of outputs and gradients."""
    groups, channels, eps = 2, 5, 1e-3
    values = torch.arange(4 * channels * 21, dtype=torch.float64)
    x = (torch.sin(values) * 3 + 20).view(4, channels, 3, 7).to(dtype)
    dy = torch.cos(values * values).view(x.shape).to(dtype)
    if last:
        x, dy = (v.to(memory_format=torch.channels_last) for v in (x, dy))
    weight, bias = torch.linspace(0.5, 2, channels), torch.linspace(-1, 1, channels)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    mean = torch.empty(groups, channels, dtype=torch.float64)
    var, sums = torch.empty_like(mean), mean.new_empty(2, groups, channels)
    affine = torch.empty(2, channels)
    kernels.forward(BOTH, x, y, weight, bias, mean, var, groups, False, 1, eps)
    count = x.numel() / (groups * channels)
    kernels.backward(BOTH, dy, x, dx, weight, mean, var, sums, affine, groups, False, 1, eps, count)
    z, d = (v.double().reshape(groups, 2, channels, 21) for v in (x, dy))
    over, at = (1, 3), (channels, 1)
    rstd = (z.var(over, correction=0, keepdim=True) + eps).rsqrt()
    h = (z - z.mean(over, keepdim=True)) * rstd
    rest = d - d.mean(over, keepdim=True) - h * (d * h).mean(over, keepdim=True)
    pairs = (
        (y, h * weight.view(at) + bias.view(at)),
        (dx, rest * rstd * weight.view(at)),
        (affine[0], d.sum((0, 1, 3))),
        (affine[1], (d * h).sum((0, 1, 3))),
    )
    return max(float((got.double().flatten() - v.flatten()).abs().max()) for got, v in pairs)
