"""Local response normalization (Krizhevsky, Sutskever & Hinton 2012): neighbouring channels."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms._checks import check_input, check_real, check_whole

__all__ = ["LocalResponseNorm"]

Squares = Literal["sum", "mean"]


class LocalResponseNorm(nn.Module):
    """Each value divided by a power of the squares of its neighbours in the channel direction.

    y_c = x_c / (k + alpha * S_c)^beta, where S_c gathers x_j^2 at the same position over a window
    of `size` channels: size // 2 below c, c itself and (size - 1) // 2 above (torch's window: of 4,
    two below and one above); channels that do not exist are zeros. There is no mean, no variance
    and no population: squares are of x itself, nothing is learnt, and no other sample or position
    is looked at; the same in train() and eval().

    Peers disagree about alpha, so it is an argument:

    ========  ===============================  =================================================
    squares   S_c                              who
    ========  ===============================  =================================================
    "sum"     sum of x_j^2                     the paper, TensorFlow (depth_radius = size // 2)
    "mean"    the same divided by `size`,      torch (k=1), Caffe: their alpha is `size` times
              also where the window sticks out that of the paper for the same function
    ========  ===============================  =================================================

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        size: channels in a window; may exceed C.
        alpha, beta, k: of the formula; the defaults are the paper's.
        squares: "sum" or "mean", see above.

    The squares are float32 at least: half inputs do not overflow. Limits: alpha=0 and k=1 is the
    identity, to the bit; alpha=0 is x / k^beta; size >= 2C, "sum", alpha=1, beta=1/2 and k near 0
    divides by the root of the sum of squares over all channels.

    Errors: ValueError for size below 1, alpha below 0, k not above 0, what is not finite and an
    unknown `squares`, and in forward for a wrong shape or dtype.

    Source: Krizhevsky, Sutskever & Hinton 2012, section 3.3. Peers: the table above; torch's layer
    is squares="mean" with k=1.
    """

    def __init__(
        self,
        num_features: int,
        *,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        squares: Squares = "sum",
    ) -> None:
        super().__init__()
        check_whole("num_features", num_features, 1)
        check_whole("size", size, 1)
        check_real("alpha", alpha, "at least 0 and finite", 0.0)
        check_real("beta", beta, "finite", -math.inf)
        check_real("k", k, "above 0 and finite", 0.0, open=True)
        if squares not in get_args(Squares):
            raise ValueError(f"squares is one of {get_args(Squares)}, not {squares!r}")
        self.num_features = num_features
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.squares: Squares = squares

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) to the same shape and dtype."""
        check_input(x, self.num_features, type(self).__name__)
        z = x.to(torch.promote_types(x.dtype, torch.float32))
        if z.numel() == 0:
            return z.to(x.dtype)
        squares = z.square().reshape(x.size(0), 1, self.num_features, -1)
        squares = F.pad(squares, (0, 0, self.size // 2, (self.size - 1) // 2))
        divisor = 1 if self.squares == "sum" else self.size
        window = F.avg_pool2d(squares, (self.size, 1), stride=1, divisor_override=divisor)
        scale = torch.add(self.k, window.view(x.shape), alpha=self.alpha)
        return (z * scale.pow(-self.beta)).to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, size={self.size}, alpha={self.alpha}, beta={self.beta}, "
            f"k={self.k}, squares={self.squares}"
        )
