"""What the layers share: population statistics and the four choices of a batch norm; sample norms.

A batch norm is four choices: which statistics normalize, how the batch is formed, whether the
batch updates the population statistics, and which population statistics are used at test. The first
three are the attributes `statistics`, `group_size` and `update` of every `PopulationNorm`; the
fourth is a value put into the buffers (`normlab.population.using`). `train()` and `eval()` are
their defaults.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import kernels
from normlab.norms._choices import (
    Choosing,
    Source,
    check_update,
    normalization,
    own_choices,
    refuse_strangers,
)
from normlab.norms._grouped import float32_affine, group_norm, grouped_batch_norm, is_half, variance
from normlab.norms._recomputation import leaving_no_trace, recomputing

__all__ = [
    "BatchStatistics",
    "PopulationNorm",
    "SampleNorm",
    "Source",
    "check_nbs",
    "check_update",
    "move_towards",
    "normalization",
    "own_choices",
    "population_layers",
    "recomputing",
    "refuse_strangers",
]


@dataclass(frozen=True)
class BatchStatistics:
    """The statistics that one forward normalized with, a row per group of samples.

    mean and var (biased) are (G, C), detached, float32 (float64 for a float64 input); count is the
    number of elements behind each; population, of `PopulationNorm.populations`, follows them.
    """

    mean: Tensor
    var: Tensor
    count: int
    population: str = ""

    def rounded(self) -> "BatchStatistics":  # to float32
        return replace(self, mean=self.mean.float(), var=self.var.float())

    def unbiased(self) -> Tensor:
        return self.var * (self.count / (self.count - 1))


def _check_common(num_features: int, eps: float) -> None:
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, not {num_features}")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, not {eps}")


def check_nbs(nbs: object, layer: str) -> None:
    """Refuse chunks of other than a whole number of samples from 2 on."""
    if nbs == 1 and not isinstance(nbs, bool):
        raise ValueError(f"nbs=1 is instance norm (norm=in); {layer} needs nbs >= 2")
    if isinstance(nbs, bool) or not isinstance(nbs, int) or nbs < 2:
        raise ValueError(f"nbs must be a whole number of at least 2, not {nbs!r}")


def _check_input(x: Tensor, num_features: int, layer: str) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"{layer} takes 2 to 5 dimensions (N, C, ...), not {tuple(x.shape)}")
    if x.size(1) != num_features:
        raise ValueError(f"{layer}({num_features}) got {x.size(1)} channels: {tuple(x.shape)}")


class PopulationNorm(Choosing):
    """A batch norm over one or more groups of samples: the base of the BatchNorm family.

    y = weight * (x - mean) / sqrt(var + eps) + bias, per channel, with either the group's mean and
    *biased* variance over its samples and positions, or the population's (the buffers).

    A forward that updates moves the buffers towards the batch's mean and *unbiased* variance:
    running = decay * running + (1 - decay) * batch (`ema_step`). `decay` is the share that stays:
    torch's `momentum` is round(1 - decay, 12), so that 0.9 is exactly torch's 0.1.

    The state_dict is that of torch.nn.BatchNorm2d: weight, bias, running_mean, running_var and
    num_batches_tracked.

    Attributes that may be set at any time, for a while through `normalization`; the first two are
    arguments, too:
        statistics: what normalizes, "batch" or "population"; None: batch in train(), population in
            eval(). A layer set to "population" is frozen: it keeps that through `normalization` and
            `population.estimate`, and through train().
        update: whether batch statistics move the buffers; None: in train() only.
        group_size: samples that share one set of statistics, consecutive ones, in place of the
            layer's own way of forming groups; None: the layer's own.
        observers: called with the BatchStatistics of every forward that used batch statistics,
            after any update. They change no result, and copies of the layer start without them.

    Activation checkpointing (`torch.utils.checkpoint`, either kind) runs a forward a second time,
    inside the backward pass: that run neither updates nor calls observers. It takes the choices
    that are set then; where they come from `normalization`, call backward inside it too. With
    torch.compile, checkpoint inside what is compiled: around it, the graph updates in both runs.

    Raises ValueError for a decay outside [0, 1) and for update=True with statistics="population";
    in forward, before any state changes, for a batch that the groups do not divide, for one element
    per group and channel, for a wrong shape, and for `update` without batch statistics. A decay
    below 0.5 warns: it usually is torch's momentum.
    """

    batch: ClassVar[str] = "per_rank"
    """How the normalization batch is formed, in the words of `normlab.batchplan`; norms that look
    at no other sample have no such attribute."""

    pools: ClassVar[bool] = True
    """Whether statistics of parts of the data give those of all of it, as mean and variance do."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
    ) -> None:
        super().__init__(statistics, update)
        _check_common(num_features, eps)
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay must be in [0, 1), not {decay}"
                + (": statistics that never move are statistics='population'" * (decay == 1))
            )
        if decay < 0.5:
            warnings.warn(
                f"decay={decay} keeps almost only the last batch; decay is 1 - torch's momentum",
                stacklevel=3,
            )
        self.num_features = num_features
        self.eps = eps
        self.decay = decay
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.observers: list[Callable[[BatchStatistics], None]] = []

    @property
    def momentum(self) -> float:
        """The weight of the newest batch, torch's `momentum`."""
        return round(1 - self.decay, 12)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) to the same shape and dtype."""
        if recomputing():
            with leaving_no_trace(self):
                return self._forward(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        _check_input(x, self.num_features, type(self).__name__)
        if self.source == "population":
            check_update(self.update, self.source)
            return self._apply_population(x)
        groups, interleaved = self._groups(x)
        y, statistics = self._normalize(x, groups, interleaved, self._count(x, groups))
        if self.updates:
            self.num_batches_tracked.add_(1)
        if statistics is not None:
            for observe in self.observers:
                observe(statistics)
        return y

    def populations(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The layer's populations: mean and var (C,), in the buffers' memory.

        The key is what follows the layer's name in a `normlab.population.Population`: '' for an
        only one; of several, `BatchStatistics.population` tells observers whose theirs are.
        """
        return {"": (self.running_mean, self.running_var)}

    def ema_step(self, mean: Tensor, var: Tensor, batch: BatchStatistics, decay: float) -> None:
        """Move `mean` and `var` (C,), in place, as one updating forward moves the buffers.

        With several groups: one step towards the averages of the groups' means and unbiased
        variances. With one, every layer's rule is torch's.
        """
        _follow(mean, var, batch, round(1 - decay, 12))

    def _apply_population(self, x: Tensor) -> Tensor:
        """Normalize with the buffers; nothing moves."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
        )

    def _form_groups(self) -> tuple[int | None, bool]:
        """The layer's own groups: samples in each (None: all), and whether they interleave."""
        return None, False

    def _groups(self, x: Tensor) -> tuple[int, bool]:
        samples = x.size(0)
        if samples == 0:
            raise ValueError(f"batch statistics of an empty batch {tuple(x.shape)}")
        name = "nbs" if self.group_size is None else "group_size"
        size, interleaved = (
            self._form_groups() if self.group_size is None else (self.group_size, False)
        )
        if size is None:
            return 1, False
        if size < 1 or samples % size:
            raise ValueError(f"a batch of {samples} samples is not a multiple of {name}={size}")
        return samples // size, interleaved

    def _count(self, x: Tensor, groups: int) -> int:
        """Elements per group and channel, of which there have to be two."""
        count = x.numel() // (groups * self.num_features)
        if count < 2:
            raise ValueError(
                f"{type(self).__name__} needs more than one element per group and channel: "
                f"{groups} groups of an input {tuple(x.shape)} leave {count}"
            )
        return count

    def _normalize(
        self, x: Tensor, groups: int, interleaved: bool, count: int
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Normalize with the groups' statistics and, if the layer updates, move the buffers.

        Returns the statistics if there are observers. `num_batches_tracked` counts afterwards.
        """
        if groups > 1 and kernels.takes(x):
            y, mean, var = kernels.batch_norm(
                x, self.weight, self.bias, groups=groups, interleaved=interleaved, eps=self.eps
            )
            precise = BatchStatistics(mean, var, count)
            if self.updates:
                self.ema_step(self.running_mean, self.running_var, precise, self.decay)
            return y, precise.rounded() if self.observers else None
        # Where nothing is learnt or kept, torch's bits are not owed: the route of many groups takes
        # half the time in NCHW on a CPU.
        watching = not (self.updates or torch.is_grad_enabled())
        if groups == 1 and not (watching and x.is_contiguous() and x.device.type == "cpu"):
            running = self.running_mean, self.running_var
            return self._one_group(x, count, running, self.weight, self.bias)
        y, mean, var = grouped_batch_norm(
            x, groups, interleaved=interleaved, weight=self.weight, bias=self.bias, eps=self.eps
        )
        statistics = BatchStatistics(mean, var, count)
        if self.updates:
            self.ema_step(self.running_mean, self.running_var, statistics, self.decay)
        return y, statistics

    def _one_group(
        self,
        x: Tensor,
        count: int,
        running: tuple[Tensor, Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        population: str = "",
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Batch norm with one group, and the update if any; the statistics if observed.

        On the pure path it is torch's, to the bit. running is mean and var (C,) of `population`, in
        the buffers' memory.
        """
        if kernels.takes(x):
            y, batch_mean, batch_var = kernels.batch_norm(x, weight, bias, groups=1, eps=self.eps)
            precise = BatchStatistics(batch_mean, batch_var, count, population)
            if self.updates:
                _follow(*running, precise, self.momentum)
            return y, precise.rounded() if self.observers else None
        if running[0].dtype == torch.float32:
            weight, bias = float32_affine(x, weight, bias)
        mean, var, momentum = (*running, self.momentum) if self.updates else (None, None, 0.0)
        if not self.observers:
            y = F.batch_norm(x, mean, var, weight, bias, True, momentum, self.eps)
            return y, None
        if mean is None and not is_half(running[0]):
            # A running average that forgets at once holds the batch's mean and unbiased variance.
            last = x.new_zeros((2, self.num_features), dtype=running[0].dtype)
            y = F.batch_norm(x, last[0], last[1], weight, bias, True, 1.0, self.eps)
            last = torch.stack((last[0], last[1] * ((count - 1) / count)))  # y's backward has it
            if _large_means(last) and x.dtype == torch.float32 and x.device.type == "cpu":
                y, batch_mean, batch_var = grouped_batch_norm(
                    x, 1, interleaved=False, weight=weight, bias=bias, eps=self.eps
                )
                return y, BatchStatistics(batch_mean, batch_var, count, population)
            return y, BatchStatistics(last[:1], last[1:], count, population)
        # The operator behind F.batch_norm, which also returns the statistics: an observer must not
        # change a bit of the buffers either.
        y, batch_mean, rstd, _, _ = torch._batch_norm_impl_index(
            x, weight, bias, mean, var, True, momentum, self.eps, torch.backends.cudnn.enabled
        )
        batch_var = variance(rstd, self.eps)
        return y, BatchStatistics(batch_mean.detach()[None], batch_var[None], count, population)

    def __getstate__(self) -> dict[str, Any]:
        # An observer watches this object: a copy must not report to it (and it need not pickle).
        return {**super().__getstate__(), "observers": []}

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.num_features}, eps={self.eps}, decay={self.decay}, affine={affine}"


def _large_means(statistics: Tensor) -> bool:
    """Whether a mean is so large beside its spread, (2, C), that sums in float32 lose the spread.

    torch's batch norm takes such sums in channels_last and of (N, C) on a CPU. A compiled graph
    cannot branch on values.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return bool((statistics[0].square() > 100 * statistics[1]).any())


def _follow(mean: Tensor, var: Tensor, batch: BatchStatistics, weight: float) -> None:
    means, vars = batch.mean, batch.var
    if not kernels.move_towards(mean, var, means, vars, count=batch.count, weight=weight):
        move_towards(mean, var, batch.mean.mean(0), batch.unbiased().mean(0), weight)


def move_towards(
    mean: Tensor, var: Tensor, to_mean: Tensor, to_var: Tensor, weight: float | Tensor
) -> None:
    """Move `mean` and `var` in place by `weight` of the way to `to_mean` and `to_var`.

    weight is a number or a tensor of one, in the precision of `mean`.
    """
    mean.lerp_(to_mean.to(mean.dtype), weight)
    var.lerp_(to_var.to(var.dtype), weight)


class SampleNorm(nn.Module):
    """The norms whose statistics are each sample's own: the base of group, layer and instance norm.

    y = weight * (x - mean) / sqrt(var + eps) + bias with mean and *biased* variance per sample and
    group of consecutive channels, weight and bias per channel; the same in train() and eval().
    The statistics are float32 at least and centered before squaring in every memory layout, unlike
    torch's own group norm in channels_last on a CPU.

    Raises ValueError for a wrong shape, and wherever a group has a single element, whatever the
    number of samples (torch raises for one sample only, and returns zeros for more).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, num_features: int, num_groups: int, *, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__()
        _check_common(num_features, eps)
        self.num_features = num_features
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) to the same shape and dtype."""
        _check_input(x, self.num_features, type(self).__name__)
        if x[:1].numel() == self.num_groups:
            raise ValueError(
                f"{type(self).__name__} needs more than one element per group: "
                f"{self.num_groups} groups of a sample of shape {tuple(x.shape[1:])} leave 1"
            )
        return group_norm(x, self.num_groups, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


def population_layers(model: nn.Module) -> dict[str, PopulationNorm]:
    """The PopulationNorm layers of `model` by name, a shared one once, under its first name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PopulationNorm)
    }
