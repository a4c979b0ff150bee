"""Synchronized batch normalization: one set of statistics over the batches of a group of ranks."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed import ProcessGroup

from normlab import dist, kernels
from normlab.norms._checks import check_input
from normlab.norms._grouped import float32_affine
from normlab.norms._meeting import Call, Meeting, Watch, agree, reserve
from normlab.norms.base import BatchStatistics, PopulationNorm, Source

__all__ = ["SyncBatchNorm", "name_layers"]


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
    different layers of one width, or of which one has a wrong shape, all raise. Once `name_layers`
    knows the network, so do ranks in layers of any width, as long as it checks (the first time,
    and always under debug), and errors have names. A rank that does not come to an exchange, as it
    has fewer batches, is in eval() or already in its backward pass, is missed when the process
    group's timeout is over: the others then raise, with the layer.

    Observers get the statistics of the group, the same on every rank. `group_size` forms groups
    within a rank, without any exchange, and needs update=False, as in `population.estimate`.

    On GPUs the fused operators of torch's SyncBatchNorm do what a rank does by itself, with sums in
    float32. What ranks exchange is the same with and without them, so each may decide for itself.

    Compiled (torch.compile), the layer is a graph break once there are several ranks, equal to the
    eager one, and fullgraph=True is refused; with one process it is part of the graph.

    Limits: BatchNorm with one rank, to the bit, and BatchNorm of the ranks' whole batch with
    several, up to rounding. There are no second derivatives across ranks: RuntimeError, on the rank
    that asks for one.

    Errors: ValueError for a group without this process, on all ranks if all of them together have
    fewer than two elements per channel, and where a rank has a wrong shape or dtype, or group_size
    with update; RuntimeError, on all ranks, where they differ in the ways above, or another one has
    such a ValueError; else see PopulationNorm.

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
        self._watch: Watch | None = None

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
        self._meet(x)
        statistics, backward = self._exchange(x, self._refusal(x))
        if backward and not x.requires_grad:
            x = dist.with_gradient(x)
        weight, bias = float32_affine(x, self.weight, self.bias)
        meeting = Meeting(self._here(), self.group) if backward else None
        y: Tensor = _SynchronizedNorm.apply(x, weight, bias, statistics, self.eps, meeting)
        if self.updates:
            self.ema_step(self.running_mean, self.running_var, statistics, self.decay)
            self.num_batches_tracked.add_(1)
        for observe in self.observers:
            observe(statistics)
        return y

    def _meet(self, x: Tensor) -> None:
        """Count this call, and make sure that the other ranks are in the same one where that is to
        be known before shapes decide how much is exchanged."""
        if self._number is None:
            self._number = reserve(dist.members(self.group), 1)
        self._calls += 1
        self._here().check(x.device, self.group)

    def _here(self) -> Call:
        assert self._number is not None
        return Call(self._number, self._calls, self.num_features, self._watch)

    def _refusal(self, x: Tensor) -> ValueError | None:
        """What is wrong here: not to be raised before the other ranks know."""
        if self.group_size is not None:
            return ValueError(
                f"group_size={self.group_size} forms groups within a rank, whose statistics "
                "cannot update what the ranks share: it needs update=False"
            )
        try:
            check_input(x, self.num_features, type(self).__name__, self._buffers["running_mean"])
        except ValueError as error:
            return error
        return None

    def _exchange(self, x: Tensor, refusal: ValueError | None) -> tuple[BatchStatistics, bool]:
        """The group's statistics, and whether any of its ranks needs the gradient of its x."""
        here, learns = self._here(), torch.is_grad_enabled()
        head = [here.layer, here.number, refusal is not None, self.updates, learns]
        with torch.no_grad():
            part = x if refusal is None else x.new_empty(0, self.num_features)
            mean, var = _moments(part)
            head += [learns and x.requires_grad, part.numel() // self.num_features]
            with here.explained("forward"):
                own = torch.cat([dist.numbers(head, mean.device), mean, var])
                parts = dist.stack(own, self.group)
        heads, means, variances = parts.split([len(head), *[self.num_features] * 2], dim=1)
        told = heads.long().tolist()  # the only look at what a GPU holds, and waits for it
        here.compare([[*head[:2], self.num_features] for head in told])
        agree([head[2:5] for head in told], refusal)
        counts = [head[6] for head in told]
        count = sum(counts)
        if count < 2:
            raise ValueError(
                f"SyncBatchNorm needs more than one element per channel over its {len(parts)} "
                f"ranks, which have {count}"
            )
        mean, var, _ = dist.pool(means, variances, heads[:, 6], counts)
        precision = torch.promote_types(x.dtype, torch.float32)
        statistics = BatchStatistics(mean.to(precision)[None], var.to(precision)[None], count)
        return statistics, any(head[5] for head in told)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another layer, of another network.
        return {**super().__getstate__(), "_number": None, "_calls": 0, "_watch": None}


class _Shared:
    """A process group, which copies of a layer have in common."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Shared":
        return self


def name_layers(model: nn.Module, *, debug: bool = False) -> None:
    """Let the SyncBatchNorms of `model` call each other by name, and check that ranks meet in one.

    Every rank calls it, with the same model, once that is complete. Then ranks that come to
    different layers are told apart from the first forward on, whatever the layers' widths, and
    errors name the layers as `model` does. A check is one more exchange of three numbers before the
    layer's own: for as many exchanges as there are layers, or, with `debug`, for all, also those of
    backward passes.
    """
    watches: dict[ProcessGroup, Watch] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SyncBatchNorm) or dist.place(layer.group)[1] == 1:
            continue
        group = dist.members(layer.group)
        watch = watches.setdefault(group, Watch({}, debug))
        layer._number, layer._calls, layer._watch = reserve(group, 1), 0, watch
        watch.add(layer._number, name or "the model")


def _has_operators(x: Tensor) -> bool:
    """Whether torch has its fused operators for what this rank has: elements, on a GPU."""
    return x.is_cuda and x.numel() > 0


def _dense(x: Tensor) -> Tensor:
    """In a memory format that torch's fused operators read without a detour."""
    formats = torch.channels_last, torch.channels_last_3d
    return x if any(x.is_contiguous(memory_format=one) for one in formats) else x.contiguous()


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
    if _has_operators(x):
        mean, rstd = (value.double() for value in torch.batch_norm_stats(_dense(x), 0.0))
        return mean, torch.where(rstd > 0, rstd.pow(-2), 0.0)  # rstd is 0 where the variance is
    near = x.mean(over, dtype=precision)
    centered = x - near.view(shape)
    rest = centered.mean(over).double()
    square = centered.square_().mean(over).double()
    return near.double() + rest, (square - rest.square()).clamp_(min=0)


class _SynchronizedNorm(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias with the statistics of N elements on several ranks.

    With h = (x - mean) * rstd and g = dy * weight, dx = rstd * (g - sum(g) / N - h * sum(g h) / N)
    with the sums over all ranks (which meet for it, if any needs a dx); dweight = sum(dy * h) and
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
        meeting: Meeting | None,
    ) -> Tensor:
        mean, var = statistics.mean[0], statistics.var[0]
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.meeting = statistics.count, meeting
        ctx.eps, ctx.fused, ctx.operators = eps, kernels.takes(x), _has_operators(x)
        if ctx.fused:
            return kernels.normalize(x, mean[None], var[None], weight, bias, eps=eps)
        return F.batch_norm(x, mean, var, weight, bias, False, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _SynchronizedNorm._gradients(ctx, dy)
        if torch.is_grad_enabled():
            found = _Once.apply(found, dy, *ctx.saved_tensors[:2])
        return *found, None, None, None

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        known = mean[None], var[None]
        if ctx.fused:
            own = kernels.gradient_sums(dy, x, *known, eps=ctx.eps)[:, 0]
        elif ctx.operators:
            x, dy, rstd = _dense(x), _dense(dy), (var + ctx.eps).rsqrt_()
            sums, dots, _, _ = torch.batch_norm_backward_reduce(
                dy, x, mean, rstd, weight, True, False, False
            )
            own = torch.stack([sums, dots * rstd])
        else:
            rstd = (var + ctx.eps).rsqrt_()
            over, shape = _per_channel(x)
            centered = x - mean.view(shape)
            sums = dy.sum(over, dtype=rstd.dtype)
            own = torch.stack([sums, (dy * centered).sum(over, dtype=rstd.dtype) * rstd])
        dx = None
        if ctx.meeting is not None:
            total = ctx.meeting.sum(own.to(torch.float64, copy=True))
            if ctx.fused:
                dx = kernels.gradient(
                    dy, x, weight, *known, total[:, None], eps=ctx.eps, count=ctx.count
                )
            elif ctx.operators:
                means = (total / ctx.count).to(rstd.dtype)
                one = torch.ones(1, dtype=torch.int32, device=x.device)  # they are divided already
                dx = torch.batch_norm_backward_elemt(
                    dy, x, mean, rstd, weight, means[0], means[1] / rstd, one
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
        return dx, dweight, dbias


class _Once(torch.autograd.Function):
    """`found`, tensors or None, as what it depends on, `of`: without a derivative of its own.

    torch's once_differentiable leaves constants where dy is one, which pass for derivatives of 0.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ARG004
        found: tuple[Tensor | None, ...],
        *of: Tensor | None,  # noqa: ARG004
    ) -> tuple[Tensor | None, ...]:
        return found

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:  # noqa: ARG004
        raise RuntimeError("SyncBatchNorm has no second derivatives across ranks")
