"""Frozen batch normalization: constant statistics in training too."""

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab import kernels
from normlab.norms._grouped import float32_affine
from normlab.norms.base import PopulationNorm, Source

__all__ = ["FrozenBatchNorm"]

Affine = Literal["frozen", "trainable", "none"]


class FrozenBatchNorm(PopulationNorm):
    """Batch norm with constant mean and variance, in train() as in eval().

    y = weight * (x - running_mean) / sqrt(running_var + eps) + bias, per channel: no sample sees
    another, and dx = dy * weight / sqrt(running_var + eps).

    Population: what a checkpoint holds, torch's *unbiased* variance; no forward moves a buffer.
    running_var = 0 is finite.

    It stays so through train(), `normalization` and `population.estimate`: `statistics` is
    "population", and anything else is refused. `population.using` and load_state_dict, which put
    statistics in, work as for the whole family. A new layer has mean 0 and variance 1: it divides
    by sqrt(1 + eps), the identity up to eps / 2.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        affine: "frozen": weight and bias are constants too: their requires_grad is False, and no
            gradient reaches them where it is set (detectron2, torchvision). "trainable": only the
            statistics are constant. "none": there are no weight and bias.
        eps: added to the variance.

    The state_dict is BatchNorm2d's. Checkpoints of BatchNorm load, and those of detectron2's and
    torchvision's frozen layers, which lack num_batches_tracked; no value is changed on loading.

    Limits: BatchNorm in eval(); "none" with mean 0 and variance 1 - eps is the identity. Unlike
    `requires_grad_(False)` and `eval()` on a batch norm, which train() undoes, there is no mode to
    forget. Errors: ValueError for an unknown `affine`; in forward see PopulationNorm.

    Source: He et al. 2017 ("Mask R-CNN") and its code; Wu & Johnson 2021, section 3.4. Peers:
    detectron2's and torchvision's keep weight and bias as buffers, here they are parameters as in
    BatchNorm; detectron2's begins with variance 1 - eps, and subtracts eps from the variance of old
    checkpoints.
    """

    batch: ClassVar[str] = "none"

    def __init__(self, num_features: int, *, affine: Affine = "frozen", eps: float = 1e-5) -> None:
        if affine not in get_args(Affine):
            raise ValueError(f"affine is one of {get_args(Affine)}, not {affine!r}")
        super().__init__(num_features, eps=eps, affine=affine != "none")
        self.affine: Affine = affine
        self.statistics = "population"
        for parameter in self.parameters():
            parameter.requires_grad_(affine == "trainable")

    @property
    def source(self) -> Source:
        """Always "population"; raises ValueError where `statistics` was set to something else."""
        if self.statistics != "population":
            raise ValueError(
                f"FrozenBatchNorm has constant statistics: statistics={self.statistics!r} needs "
                "BatchNorm"
            )
        return "population"

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) to the same shape and dtype."""
        return self._forward(x)  # no state moves: a recomputation is a forward like any other

    def _apply_population(self, x: Tensor) -> Tensor:
        if self.affine == "trainable":
            return super()._apply_population(x)
        weight, bias, (mean, var) = self._tensors()
        fused = kernels.takes(x)
        if not fused and mean.dtype == torch.float32:
            weight, bias = float32_affine(x, weight, bias)
        if weight is not None and weight.requires_grad:
            weight = weight.detach()
        if bias is not None and bias.requires_grad:
            bias = bias.detach()
        constants = mean, var, weight, bias
        if not fused and torch._C._are_functorch_transforms_active():  # they take no such Function
            return F.batch_norm(x, *constants, False, eps=self.eps)
        y: Tensor = _Constant.apply(x, *constants, self.eps, fused)
        return y

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class _Constant(torch.autograd.Function):
    """Batch norm of x (N, C, ...) with constants (C,) only, so that dy has one factor per channel.

    torch's own gradient sums over dy for a weight and a bias that nobody asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        fused: bool,
    ) -> Tensor:
        ctx.save_for_backward(var, weight)
        ctx.eps, ctx.fused = eps, fused
        if fused:
            return kernels.normalize(x, mean, var, weight, bias, eps=eps)
        return F.batch_norm(x, mean, var, weight, bias, False, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        var, weight = ctx.saved_tensors
        # Multiplying by weight / sqrt(var + eps), in float32 where dy is half.
        if ctx.fused and (torch.compiler.is_compiling() or not torch.is_grad_enabled()):
            dx = kernels.normalize(dy, None, var, weight, None, eps=ctx.eps)
        else:
            dx = F.batch_norm(dy, torch.zeros_like(var), var, weight, None, False, eps=ctx.eps)
        return dx, None, None, None, None, None, None
