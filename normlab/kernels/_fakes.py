"""What a compiler may know of the operators without calling them: the results' shapes."""

from typing import Any

import torch
from torch import Tensor

from normlab.kernels import _calls

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "gradient",
    "gradient_sums",
    "moments",
    "normalize",
    "renorm",
    "renorm_backward",
]


def batch_norm(x: Tensor, _w: Any, _b: Any, groups: int, _i: bool, span: int, _e: float) -> Any:
    return torch.empty_like(_calls.laid(x)), *_calls.empty_statistics(x, groups, span)


def moments(x: Tensor, groups: int, _i: bool) -> Any:
    return _calls.empty_statistics(x, groups, 1)


def normalize(x: Tensor, *_: Any) -> Any:
    return torch.empty_like(_calls.laid(x))


def batch_norm_backward(
    _dy: Tensor, x: Tensor, weight: Any, _m: Any, _v: Any,
    groups: int, _i: bool, _s: int, _e: float, for_x: bool,
) -> Any:  # fmt: skip
    own = weight is not None and weight.dim() == 2
    size = (2, groups, x.size(1)) if own else (2, x.size(1))
    dx = torch.empty_like(_calls.laid(x)) if for_x else x.new_empty(0)
    return dx, x.new_empty(size, dtype=torch.float32)


def renorm(x: Tensor, *rest: Any) -> Any:
    *_, groups, _eps = rest
    y, statistics = normalize(x), _calls.empty_statistics(x, groups, 1)
    return y, *statistics, _calls.empty_correction(x, groups)


def renorm_backward(
    _dy: Tensor, x: Tensor, _w: Any, mean: Tensor, _v: Any, _c: Any, eps: float, for_x: bool
) -> Any:
    return batch_norm_backward(_dy, x, None, mean, _v, mean.size(0), False, 1, eps, for_x)


def gradient_sums(_dy: Tensor, x: Tensor, _m: Any, _v: Any, groups: int, _e: float) -> Any:
    return x.new_empty((2, groups, x.size(1)), dtype=torch.float64)


def gradient(_dy: Tensor, x: Tensor, *_: Any) -> Any:
    return torch.empty_like(_calls.laid(x))
