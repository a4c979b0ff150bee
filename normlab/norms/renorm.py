"""Batch renormalization (Ioffe 2017): batch norm, corrected towards the running statistics."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab import kernels
from normlab.norms._grouped import grouped_batch_norm
from normlab.norms._moments import group_statistics
from normlab.norms.base import BatchStatistics, PopulationNorm, Source, check_nbs, recomputing

__all__ = ["BatchRenorm"]

REMEMBERED = 8
"""Forwards whose running statistics are kept for a recomputation."""


class BatchRenorm(PopulationNorm):
    """Batch norm whose training output is moved to where the running statistics would put it.

    y = weight * ((x - m) / s * r + d) + bias, per channel and chunk of `nbs` samples, with

    - m and s = sqrt(v + eps): mean and *biased* variance of the chunk,
    - r = s / sigma within [1 / R, R] and d = (m - mu) / sigma within [-D, D],
    - mu and sigma = sqrt(running_var + eps): the running statistics *before* this forward's update.

    r and d are constants to the gradient, so that dx sums to 0 per channel and chunk as in batch
    norm, and they act before weight and bias.

    Population: the buffers then move as GhostBatchNorm's, one step towards the averages of the
    chunks' means and *unbiased* variances; eps is in no buffer. With population statistics (eval)
    it is BatchNorm.

    The limits grow linearly with n, the forwards so far that updated: R from 1 at n = start *
    forwards to r_max at r_end * forwards, D from 0 at the same start to d_max at d_end * forwards.
    n is `num_batches_tracked`, so that the ramp goes on from a checkpoint; each accumulated
    micro-batch counts, not each optimizer step. The defaults are the paper's: 5,000, 40,000 and
    25,000 steps (of 125,000 here), r_max 3, d_max 5 (and decay 0.99). A finished training's n ends
    the ramp at once; `num_batches_tracked.zero_()` begins it anew.

    Limits: r_max=1, d_max=0, or any n up to start * forwards, is GhostBatchNorm, and BatchNorm for
    a single chunk. With both infinite the output is that of population statistics, whatever the
    batch, and only the gradient is batch norm's. r and d are constants to second derivatives too.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        nbs: samples per chunk, consecutive ones, at least 2; must divide every batch that its
            chunks normalize. None: one chunk, the whole batch.
        r_max, d_max: final limits, at least 1 and 0; may be infinite.
        start, r_end, d_end: where the ramps begin and end, as fractions of `forwards`; no end
            before the start. All 0: final limits from the first forward on.
        forwards: updating forwards of the whole training. A run of normlab fills in its own number.
        eps: added to the variance.
        decay: share of the running statistics that stays at each update (torch's 1 - momentum).
        affine: learn a weight and a bias per channel, shared by all chunks.
        statistics, update: choices of a batch norm, see PopulationNorm.

    Batch statistics in eval() (`statistics="batch"`) are corrected as in training; observers and
    `population.estimate` get the chunk's own m and v. A recomputation (activation checkpointing)
    takes the running statistics that its forward had, found by its batch's m among the last 8
    forwards; of equal batches, the latest that was repeated least often. RuntimeError where none
    of them had the batch, as after a ninth forward.

    Errors: ValueError for the arguments above; in forward see PopulationNorm.

    Source: Ioffe 2017, Algorithm 1. The paper's running sigma averages s, where this one is the
    root of the averaged variance: then the state_dict is BatchNorm2d's. Peers: Keras keeps a second
    pair of statistics for r and d; tensorpack takes one, as here.
    """

    batch: ClassVar[str] = "ghost"

    def __init__(
        self,
        num_features: int,
        *,
        nbs: int | None = None,
        r_max: float = 3.0,
        d_max: float = 5.0,
        start: float = 0.04,
        r_end: float = 0.32,
        d_end: float = 0.2,
        forwards: int = 125_000,
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, decay=decay, affine=affine, statistics=statistics, update=update
        )
        if nbs is not None:
            check_nbs(nbs, "batch renorm")
        if not r_max >= 1:
            raise ValueError(f"r_max must be at least 1 (no rescaling), not {r_max}")
        if not d_max >= 0:
            raise ValueError(f"d_max must be at least 0 (no shift), not {d_max}")
        if not 0 <= start < math.inf:
            raise ValueError(f"start must be at least 0 and finite, not {start}")
        for name, end in (("r_end", r_end), ("d_end", d_end)):
            if not start <= end < math.inf:
                raise ValueError(f"{name} must be at least start={start} and finite, not {end}")
        if isinstance(forwards, bool) or not isinstance(forwards, int) or forwards < 1:
            raise ValueError(f"forwards must be a whole number of at least 1, not {forwards!r}")
        self.nbs = nbs
        self.r_max = r_max
        self.d_max = d_max
        self.start = start
        self.r_end = r_end
        self.d_end = d_end
        self.forwards = forwards
        self._recent: deque[_Recent] = deque(maxlen=REMEMBERED)

    def limits(self, forwards: int | Tensor) -> tuple[Any, Any]:
        """R and D, as numbers or tensors of one, of the forward after `forwards` updating ones."""
        return (
            self._ramp(forwards, self.r_end, 1.0, self.r_max),
            self._ramp(forwards, self.d_end, 0.0, self.d_max),
        )

    def _ramp(self, now: int | Tensor, end: float, low: float, high: float) -> Any:
        start, length = self.start * self.forwards, (end - self.start) * self.forwards
        if isinstance(now, Tensor):
            share = ((now - start) / length).clamp(0, 1) if length > 0 else (now >= start).float()
            ramp = high if math.isinf(high) else low + (high - low) * share
            return torch.where(share > 0, ramp, low)
        done = min(max((now - start) / length, 0), 1) if length > 0 else float(now >= start)
        return low + (high - low) * done if done > 0 else low

    def _form_groups(self) -> tuple[int | None, bool]:
        return self.nbs, False

    def _normalize(
        self, x: Tensor, groups: int, interleaved: bool, count: int
    ) -> tuple[Tensor, BatchStatistics | None]:
        if kernels.takes(x):
            return self._fused(x, groups, count)
        mean, var = group_statistics(x, groups)
        r, d = self._correction(mean, var)
        y: Tensor
        if groups == 1 and not torch._C._are_functorch_transforms_active():
            known = r[0], d[0], mean[0], var[0]
            y = _BatchNorm.apply(x, self.weight, self.bias, *known, self.eps)
        else:
            weight = r if self.weight is None else r * self.weight
            bias = d if self.weight is None else d * self.weight
            bias = bias if self.bias is None else bias + self.bias
            y, _, _ = grouped_batch_norm(
                x, groups, interleaved=interleaved, weight=weight, bias=bias, eps=self.eps
            )
        return y, self._follow(mean, var, count)

    def _fused(self, x: Tensor, groups: int, count: int) -> tuple[Tensor, BatchStatistics | None]:
        weight, bias, running = self._tensors()
        again = recomputing()
        if again:
            with torch.no_grad():
                mean, var = kernels.moments(x, groups=groups)
            was = self._repeated(mean[0].float(), var[0].float())
            running, limits = (was.running[0], was.running[1]), was.limits
        else:
            limits = self._limits()
        y, mean, var = _FusedNorm.apply(x, weight, bias, *running, *limits, groups, self.eps)
        if not again:
            self._remember(mean[0], limits)
        statistics = self._follow(mean, var, count)
        return y, statistics.rounded() if self.observers else None

    def _follow(self, mean: Tensor, var: Tensor, count: int) -> BatchStatistics:
        statistics = BatchStatistics(mean, var, count)
        if self.updates:
            self.ema_step(self.running_mean, self.running_var, statistics, self.decay)
        return statistics

    @torch.no_grad()
    def _correction(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """r and d (G, C) for chunks with these statistics, from the buffers before any update."""
        if recomputing():  # the buffers have moved since
            was = self._repeated(mean[0], var[0])
            (running_mean, running_var), (r_limit, d_limit) = was.running, was.limits
        else:
            running_mean, running_var = self.running_mean, self.running_var
            r_limit, d_limit = self._limits()
            self._remember(mean[0], (r_limit, d_limit))
        rstd = (running_var.to(var.dtype) + self.eps).rsqrt()
        r = ((var + self.eps).sqrt() * rstd).clamp(1 / r_limit, r_limit)
        d = ((mean - running_mean.to(mean.dtype)) * rstd).clamp(-d_limit, d_limit)
        return kernels.kept(r), kernels.kept(d)

    def _limits(self) -> tuple[Any, Any]:
        """`limits` of this forward: numbers, unless to read one would wait for a GPU."""
        forwards = self.num_batches_tracked
        readable = forwards.is_cpu and not torch.compiler.is_compiling()
        return self.limits(int(forwards) if readable else forwards)

    def _remember(self, mean: Tensor, limits: tuple[Any, Any]) -> None:
        """What a recomputation of this forward, with `mean` (C,), will need: before any update."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        with torch.no_grad():
            running = torch.stack((self.running_mean, self.running_var))
        self._recent.append(_Recent(mean, running, limits))

    def _repeated(self, mean: Tensor, var: Tensor) -> "_Recent":
        """The forward that a recomputation repeats, whose first chunk had this mean (C,).

        Equal up to the rounding that operators before the layer may vary in. Raises RuntimeError.
        """
        if self._recent and not torch._C._are_functorch_transforms_active():
            rounding = 4 * torch.finfo(mean.dtype).eps * mean.abs()
            allowed = (1e-4 * (var + self.eps).sqrt() + rounding).nan_to_num(math.inf)
            # One tensor of all: reading a number from a GPU waits for it. NaN is equal to NaN.
            means = torch.stack([was.mean.to(mean.dtype) for was in self._recent])
            distances = ((means - mean).abs() / allowed).nan_to_num(0.0, math.inf).amax(1).tolist()
            # Backward repeats the last forward first, but may repeat one several times: min takes
            # the first of equal ones.
            candidates = zip(reversed(distances), reversed(self._recent), strict=True)
            distance, was = min(candidates, key=lambda each: (each[0], each[1].used))
            if distance <= 1:
                was.used += 1
                return was
        raise RuntimeError(
            "BatchRenorm cannot repeat a forward for activation checkpointing: none of the "
            f"{len(self._recent)} that it remembers had this batch. It remembers the last "
            f"{REMEMBERED}, until it is cast or moved: call backward earlier"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._recent.clear()  # on another device or in another precision, nothing repeats them
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_recent": deque(maxlen=REMEMBERED)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nbs={self.nbs}, r_max={self.r_max}, d_max={self.d_max}"


@dataclass
class _Recent:
    """What a forward found that may be repeated: its first chunk's mean (C,), the running mean and
    variance (2, C) and the limits."""

    mean: Tensor
    running: Tensor
    limits: tuple[Any, Any]
    used: int = 0
    """By how many recomputations."""


class _BatchNorm(torch.autograd.Function):
    """weight * (r * (x - mean) / sqrt(var + eps) + d) + bias of x (N, C, ...), all others (C,).

    mean and var are the batch's: the gradient goes through them, but not through r and d. torch's
    operators for known statistics, which take one pass, with r * weight and d * weight + bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        r: Tensor,
        d: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, r, d, mean, (var + eps).rsqrt())
        ctx.eps = eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        if weight is not None and bias is not None:
            r, d = r * weight, torch.addcmul(bias.to(d.dtype), d, weight)
        elif weight is not None:
            r, d = r * weight, d * weight
        elif bias is not None:
            d = d + bias
        return F.batch_norm(x, mean, var, r, d, False, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r, d, mean, rstd = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        dx, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            dy, x, r if weight is None else r * weight, None, None, mean, rstd, True, ctx.eps,
            [for_x, for_weight, for_weight or for_bias],
        )  # fmt: skip
        dweight = torch.addcmul(r * dscale, d, dshift).to(weight.dtype) if for_weight else None
        dbias = dshift.to(ctx.bias_dtype) if for_bias else None
        return dx, dweight, dbias, *[None] * 5


class _FusedNorm(torch.autograd.Function):
    """The same of chunks by the fused kernels, which find r and d from the running statistics (C,).

    Returned are y, and mean and biased variance (G, C) in float64 without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        r_limit: Any,
        d_limit: Any,
        groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        running = running_mean, running_var, (r_limit, d_limit)
        y, mean, var, correction = kernels.renorm(x, weight, bias, *running, groups=groups, eps=eps)
        ctx.save_for_backward(x, weight, mean, var, correction)
        ctx.eps = eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing: list[Tensor | None] = [None] * 6
        if dy is None:
            return None, None, None, *nothing
        x, weight, mean, var, correction = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        dx, affine = kernels.renorm_backward(
            dy, x, weight, mean, var, correction, eps=ctx.eps, for_x=for_x
        )
        dbias, dweight = affine.unbind()
        return (
            dx if for_x else None,
            dweight.to(weight.dtype) if for_weight else None,
            dbias.to(ctx.bias_dtype) if for_bias else None,
            *nothing,
        )
