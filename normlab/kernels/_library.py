"""The compiled kernels, called with raw pointers, and checked before anything relies on them."""

import ctypes
from ctypes import c_char_p
from struct import Struct

import torch
from torch import Tensor

from normlab.kernels._build import Unavailable, compiled

__all__ = ["Kernels", "dense", "loaded"]

FIRST, SECOND, BOTH = 1, 2, 3
"""The passes over the data: sums, and what is made with them."""


class Kernels:
    """Batch norm of groups of samples, as the functions of fused.cpp.

    All tensors are on the CPU; x (N, C, ...) is `dense`, in float32 or bfloat16, y, dy and dx are
    laid out as it is; weight and bias are contiguous float32, (C,) or (G, C); mean and var are
    float64 (G, C / span), where they are given to a second pass alone also both float32.

    What a function is told is packed into one structure: ctypes takes as long for each argument as
    for a call, and a small batch norm is no longer than a few calls.
    """

    def __init__(self, path: str) -> None:
        try:
            library = ctypes.CDLL(path)
            self._forward, self._backward = library.normlab_forward, library.normlab_backward
            self._move = library.normlab_move
        except (OSError, AttributeError) as error:
            raise Unavailable(f"cannot load {path}: {error}") from error
        for function in (self._forward, self._backward, self._move):
            function.argtypes = [c_char_p]
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
        towards: tuple[Tensor, Tensor, float, float, Tensor] | None = None,
    ) -> None:
        """Fills mean and var (first pass), and y by what they then are (second pass).

        towards: Batch Renorm's running mean and var (C,), both contiguous float32, the limits of r
        and d, and what is filled with r and d (2, G, C), float32; for both passes and span 1.
        """
        given = bias if weight is None else weight
        failed = self._forward(
            _FORWARD(
                *_common(passes, x, groups, interleaved, span, eps),
                given is not None and given.dim() == 2,
                var.dtype == torch.float32,
                x.data_ptr(),
                0 if y is None else y.data_ptr(),
                0 if weight is None else weight.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if mean is None else mean.data_ptr(),
                var.data_ptr(),
                *(_NOTHING if towards is None else _towards(*towards)),
            )
        )
        if failed:
            raise MemoryError(_SHORT)

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
        correction: Tensor | None = None,
    ) -> None:
        """Fills sums (2, G, C), of dy and of dy * h (first pass); then dx by them (second pass).

        affine, if given, is filled with the gradients of bias and weight: (2, C), or (2, G, C) for
        a weight (G, C). correction is Batch Renorm's r and d (2, G, C): weight is multiplied by r,
        and affine is (2, C).
        """
        r = 0 if correction is None else correction.data_ptr()
        failed = self._backward(
            _BACKWARD(
                *_common(passes, x, groups, interleaved, span, eps),
                weight is not None and weight.dim() == 2,
                count,
                dy.data_ptr(),
                x.data_ptr(),
                0 if dx is None else dx.data_ptr(),
                0 if weight is None else weight.data_ptr(),
                mean.data_ptr(),
                var.data_ptr(),
                sums.data_ptr(),
                0 if affine is None else affine.data_ptr(),
                r,
                0 if correction is None else r + correction.numel() // 2 * 4,
            )
        )
        if failed:
            raise MemoryError(_SHORT)

    def move(
        self, to: tuple[Tensor, Tensor], unbiased: float, weight: float, mean: Tensor, var: Tensor
    ) -> None:
        """mean and var (C,), float32, by `weight` towards the averages of those in `to` (G, C)."""
        means, vars = to
        at = means.data_ptr(), vars.data_ptr(), mean.data_ptr(), var.data_ptr()
        self._move(_MOVE(means.size(0), means.size(1), unbiased, weight, *at))


_SHORT = "no memory for a batch norm's sums"

# The structures of fused.cpp: "q" is an int64_t, "d" a double, "P" a pointer.
_COMMON = "11qd"
_FORWARD = Struct(_COMMON + "2q6P" + "2P2d2P").pack
_BACKWARD = Struct(_COMMON + "qd10P").pack
_MOVE = Struct("2q2d4P").pack

_NOTHING = 0, 0, 0.0, 0.0, 0, 0


def _towards(
    mean: Tensor, var: Tensor, r_limit: float, d_limit: float, correction: Tensor
) -> tuple[float, ...]:
    r = correction.data_ptr()
    d = r + correction.numel() // 2 * 4
    return mean.data_ptr(), var.data_ptr(), r_limit, d_limit, r, d


def dense(x: Tensor) -> bool:
    """Whether x (N, C, ...) is contiguous, or has its channels last."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _common(
    passes: int, x: Tensor, groups: int, interleaved: bool, span: int, eps: float
) -> tuple[object, ...]:
    samples, channels = x.size(0), x.size(1)
    positions = x.numel() // (samples * channels)
    each = samples // groups
    steps = (1, groups) if interleaved else (each, 1)
    last = positions == 1 or not x.is_contiguous()
    half = x.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    return half, last, passes, threads, channels, positions, groups, each, *steps, span, eps


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
