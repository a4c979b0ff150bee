"""Synchronized batch normalization: one set of statistics over the batches of a group of ranks."""

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup

from normlab import dist, kernels
from normlab.norms._grouped import float32_affine
from normlab.norms.base import BatchStatistics, PopulationNorm, Source, _check_input

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(PopulationNorm):
    """Batch norm of the batches of all ranks of a group, as if they were one.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance over the
    samples and positions of all ranks, per channel. Ranks may have different numbers of samples,
    different positions, one sample, or none: a rank without samples takes part, with an empty
    output.

    Population: as BatchNorm's, with the mean and the *unbiased* variance of the elements of all
    ranks; the buffers are the same on all of them.

    Each rank sends the count, mean and variance of its part, taken around its own mean; they are
    merged in float64 by the law of total variance (`normlab.dist.pool`), so that all ranks get
    bitwise the same statistics and buffers. Backward sums sum(dy) and sum(dy * xhat) over the
    ranks, and divides by the number of elements of all. One exchange each way; evaluation with
    population statistics exchanges nothing.

    Gradients are those of the *sum* of the ranks' losses. The gradient of x is complete; those of
    weight and bias are this rank's part, as any other parameter's, and their sum over the ranks is
    that of one process with the whole batch. DistributedDataParallel averages them instead, which
    gives the gradients of the mean of the ranks' losses: that is the loss of one process, averaged
    over its N samples, where the rank of n samples scales its mean loss by ranks * n / N (by 1 if
    all have the same number).

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        group: the ranks, a torch.distributed process group that this process is in; None: all
            ranks. Copies of the layer share it. A layer with a group cannot be pickled.
        eps: added to the variance.
        decay: share of the running statistics that stays at each update (torch's 1 - momentum).
        affine: learn a weight and a bias per channel.
        statistics, update: choices of a batch norm, see PopulationNorm.

    All ranks must call the same layers in the same order, forward and backward, and use batch
    statistics, update and compute gradients alike; a rank that is frozen ("population") exchanges
    nothing. Each exchange of a forward carries the layer's number in the order of first use, which
    call of it this is, and whether the rank refuses its input, so that ranks which meet in
    different layers of one width, or of which one has a wrong shape, all raise. What nothing can
    tell is a rank that does not come to an exchange: one that has fewer batches, is in eval() or
    already in its backward pass. There the others wait until the process group's timeout; in
    layers of different widths, it is the collective that fails.

    Observers get the statistics of the group, the same on every rank. `group_size` forms groups
    within a rank, without any exchange, and needs update=False, as in `population.estimate`.

    Compiled (torch.compile), the layer is a graph break once there are several ranks, equal to the
    eager one, and fullgraph=True is refused; with one process it is part of the graph.

    Limits: BatchNorm with one rank, to the bit, and BatchNorm of the ranks' whole batch with
    several, up to rounding. There are no second derivatives across ranks.

    Errors: ValueError for a group without this process, on all ranks if all of them together have
    fewer than two elements per channel, and where a rank has a wrong shape or group_size with
    update; RuntimeError, on all ranks, where they differ in the ways above, or another one has such
    a ValueError; else see PopulationNorm.

    Source: Peng et al. 2018 (MegDet); Zhang et al. 2018 (EncNet). Peers: torch's layer needs a GPU
    once there is a process group; detectron2's NaiveSyncBatchNorm by default and tensorpack weigh
    ranks alike whatever they hold, and store the biased variance.
    """

    batch: ClassVar[str] = "sync"

    def __init__(
        self,
        num_features: int,
        *,
        group: ProcessGroup | None = None,
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, decay=decay, affine=affine, statistics=statistics, update=update
        )
        dist.place(group)
        self._shared = _Shared(group)
        self._number: int | None = None
        self._calls = 0

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that share statistics; None: all."""
        return self._shared.group

    def _forward(self, x: Tensor) -> Tensor:
        alone = dist.place(self.group)[1] == 1
        within = self.group_size is not None and not self.updates
        if alone or within or self.source == "population":
            return super()._forward(x)
        return self._synchronize(x)

    @_disable_dynamo
    def _synchronize(self, x: Tensor) -> Tensor:
        """Never compiled: what the ranks tell each other decides how to go on."""
        statistics, backward = self._exchange(x, self._refusal(x))
        if backward and not x.requires_grad:
            x = dist.with_gradient(x)
        weight, bias = float32_affine(x, self.weight, self.bias)
        y: Tensor = _SynchronizedNorm.apply(
            x, weight, bias, statistics, self.eps, self.group, backward
        )
        if self.updates:
            self.ema_step(self.running_mean, self.running_var, statistics, self.decay)
            self.num_batches_tracked.add_(1)
        for observe in self.observers:
            observe(statistics)
        return y

    def _refusal(self, x: Tensor) -> ValueError | None:
        """What is wrong here: not to be raised before the other ranks know."""
        if self.group_size is not None:
            return ValueError(
                f"group_size={self.group_size} forms groups within a rank, whose statistics "
                "cannot update what the ranks share: it needs update=False"
            )
        try:
            _check_input(x, self.num_features, type(self).__name__)
        except ValueError as error:
            return error
        return None

    def _exchange(self, x: Tensor, refusal: ValueError | None) -> tuple[BatchStatistics, bool]:
        """The group's statistics, and whether any of its ranks needs the gradient of its x."""
        if self._number is None:
            group = dist.members(self.group)
            self._number = _used.get(group, 0)
            _used[group] = self._number + 1
        self._calls += 1
        learns = torch.is_grad_enabled()
        head = [self._number, self._calls, refusal is not None, self.updates, learns]
        with torch.no_grad():
            part = x if refusal is None else x.new_empty(0, self.num_features)
            mean, var = _moments(part)
            head += [learns and x.requires_grad, part.numel() // self.num_features]
            parts = dist.stack(torch.cat([mean.new_tensor(head), mean, var]), self.group)
        heads, means, variances = parts.split([len(head), *[self.num_features] * 2], dim=1)
        _agree(heads[:, :5].int().tolist(), refusal)
        counts = heads[:, 6]
        count = int(counts.sum())
        if count < 2:
            raise ValueError(
                f"SyncBatchNorm needs more than one element per channel over its {len(parts)} "
                f"ranks, which have {count}"
            )
        mean, var, _ = dist.pool(means, variances, counts)
        precision = torch.promote_types(x.dtype, torch.float32)
        statistics = BatchStatistics(mean.to(precision)[None], var.to(precision)[None], count)
        return statistics, bool(heads[:, 5].any())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_number": None, "_calls": 0}  # a copy is another layer


class _Shared:
    """A process group, which copies of a layer have in common."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Shared":
        return self


_used: WeakKeyDictionary[ProcessGroup, int] = WeakKeyDictionary()
"""How many layers have been used in each group: correct programs have equal orders on all ranks."""


def _agree(heads: list[list[int]], refusal: ValueError | None) -> None:
    """Raise, on every rank, where ranks are in different calls or modes, or one has a refusal.

    heads: per rank the number of its layer, which call of it this is, whether the rank refuses it,
    whether it updates, and whether it computes gradients.
    """
    calls = [head[:2] for head in heads]
    if any(call != calls[0] for call in calls):
        told = [f"rank {rank}: call {n} of layer {which}" for rank, (which, n) in enumerate(calls)]
        raise RuntimeError(
            f"ranks are in different synchronized layers, or calls of one ({', '.join(told)}; "
            "layers are numbered in the order of first use)"
        )
    if refusal is not None:
        raise refusal
    if refused := [rank for rank, head in enumerate(heads) if head[2]]:
        raise RuntimeError(f"ranks {refused} refuse what a synchronized layer is called with there")
    updates, learns = zip(*(head[3:] for head in heads), strict=True)
    for mode, of_ranks in (("update", updates), ("compute gradients", learns)):
        if len(set(of_ranks)) > 1:
            raise RuntimeError(
                f"some ranks {mode} in a synchronized layer, some do not: "
                f"{[bool(value) for value in of_ranks]}"
            )


def _per_channel(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions that statistics are over, and the shape in which values (C,) meet x."""
    return [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in float64, summed in float32 at least; zeros of nothing.

    The rounding of the first mean is found among the values centered by it, and taken out of both.
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        nothing = x.new_zeros(x.size(1), dtype=torch.float64)
        return nothing, nothing
    over, shape = _per_channel(x)
    if kernels.takes(x):
        mean, var = kernels.moments(x, groups=1)
        return mean[0], var[0]
    near = x.mean(over, dtype=precision)
    centered = x - near.view(shape)
    rest = centered.mean(over).double()
    square = centered.square_().mean(over).double()
    return near.double() + rest, (square - rest.square()).clamp_(min=0)


class _SynchronizedNorm(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias with the statistics of N elements on several ranks.

    With h = (x - mean) * rstd and g = dy * weight, dx = rstd * (g - sum(g) / N - h * sum(g h) / N)
    with the sums over all ranks (of `group`, exchanged if `backward`); dweight = sum(dy * h) and
    dbias = sum(dy) over this rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: BatchStatistics,
        eps: float,
        group: ProcessGroup | None,
        backward: bool,
    ) -> Tensor:
        mean, var = statistics.mean[0], statistics.var[0]
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.group, ctx.backward_too = statistics.count, group, backward
        ctx.eps, ctx.fused = eps, kernels.takes(x)
        if ctx.fused:
            return kernels.normalize(x, mean[None], var[None], weight, bias, eps=eps)
        return F.batch_norm(x, mean, var, weight, bias, False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        known = mean[None], var[None]
        if ctx.fused:
            own = kernels.gradient_sums(dy, x, *known, eps=ctx.eps)[:, 0]
        else:
            rstd = (var + ctx.eps).rsqrt_()
            over, shape = _per_channel(x)
            centered = x - mean.view(shape)
            sums = dy.sum(over, dtype=rstd.dtype)
            own = torch.stack([sums, (dy * centered).sum(over, dtype=rstd.dtype) * rstd])
        dx = None
        if ctx.backward_too:
            total = own.to(torch.float64, copy=True)
            distributed.all_reduce(total, group=ctx.group)
            if ctx.fused:
                dx = kernels.gradient(
                    dy, x, weight, *known, total[:, None], eps=ctx.eps, count=ctx.count
                )
            else:
                constant, slope = (total / ctx.count).to(rstd.dtype)
                scale = rstd if weight is None else rstd * weight
                dx = torch.addcmul((-scale * constant).view(shape), dy, scale.view(shape))
                dx = dx.addcmul_(centered, (-scale * rstd * slope).view(shape)).to(x.dtype)
        sums, dots = own.to(mean.dtype)
        dweight, dbias = (
            value if wanted else None
            for value, wanted in zip((dots, sums), ctx.needs_input_grad[1:3], strict=True)
        )
        return dx, dweight, dbias, None, None, None, None
