"""Virtual batch norm: samples that are only run forward take part in the statistics."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms import _forward_only
from normlab.norms._grouped import float32_affine, variance
from normlab.norms._moments import moments
from normlab.norms.base import BatchStatistics, PopulationNorm, Source

__all__ = ["VirtualBatchNorm", "forward_only", "forward_with"]

Gradient = Literal["own", "all"]
Followed = Literal["all", "own"]


class VirtualBatchNorm(PopulationNorm):
    """Batch norm of a batch [x; v] of N + V samples, of which the last V are forward-only.

    y = weight * (z - mean) / sqrt(var + eps) + bias with *biased* variance, per channel. Two layers
    go by this name; which option says V says which of them it is:

    - `extra=V` (the talk "Devils in BatchNorm"): mean and var over all N + V samples, for all of
      them. The first N outputs are BatchNorm's on [x; v]; V = 0 is BatchNorm. NBS is N + V.
    - `reference=V` (Salimans et al. 2016): v is a batch chosen once. x_i is normalized with the
      statistics of {v, x_i}, so that its output depends on no other x_j; v with its own. NBS is
      V + 1. mean = m_v + (m_i - m_v) / (V + 1), var = (V var_v + var_i) / (V + 1) +
      V (m_i - m_v)^2 / (V + 1)^2, m_i and var_i over the positions of x_i.

    In a network every layer sees [x; v], so the forward-only samples have to run through all of it:
    `y = forward_with(model, x, v)` does so in any model that takes a tensor (N, ...) and returns
    one, and `with forward_only(model, len(v)):` around a forward of one's own in any other. Both
    replace V for that forward. Layers that mix samples in other ways (another batch norm) would
    treat v as ordinary samples.

    gradient: "own" runs v forward only: what comes from v is a constant, so gradients reach x,
    weight and bias through x and its share of the statistics alone; the gradient of v is zero.
    "all" has the whole derivative of the N outputs, through v's share too, where v depends on
    weights of earlier layers. (Memory is that of N + V samples either way.) With `extra`, they are
    the gradients of BatchNorm on [x; v] for outputs N + 1 to N + V that nothing depends on: to the
    bit, but for large inputs of float32 at least on a CPU, where they are so to rounding, and taken
    in less time.

    Population: the running statistics follow the mean and *unbiased* variance of "all" N + V
    samples, or of the "own" N, as the argument `population` says: r += (1 - decay) (b - r).
    Observers are given what they follow.

    With population statistics, in eval(), v plays no role. `group_size`, where it is set, replaces
    all this by groups of consecutive samples.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        extra: V of the first definition, at the end of each batch.
        reference: V of the second definition, instead.
        gradient: "own" or "all", see above.
        population: "all" or "own", see above.
        eps: added to the variance.
        decay: share of the running statistics that stays at each forward (torch's 1 - momentum).
        affine: learn a weight and a bias per channel.
        statistics, update: choices of a batch norm, see PopulationNorm.

    Limits: V = 0 is BatchNorm. The state_dict is that of BatchNorm2d. Source: the talk above;
    Salimans et al. 2016, section 3.4. Peers: TensorFlow's `virtual_batch_size` is neither
    of the two, but GhostBatchNorm.

    Errors: ValueError for the arguments above; in forward, before any state changes,
    for a batch of no more than V samples, and where one element per channel would remain; see also
    PopulationNorm.
    """

    batch: ClassVar[str] = "virtual"

    def __init__(
        self,
        num_features: int,
        *,
        extra: int = 0,
        reference: int = 0,
        gradient: Gradient = "own",
        population: Followed = "all",
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, decay=decay, affine=affine, statistics=statistics, update=update
        )
        _check_number("extra", extra)
        _check_number("reference", reference)
        if extra and reference:
            raise ValueError("extra and reference are two definitions of virtual batch norm: one")
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient is one of {get_args(Gradient)}, not {gradient!r}")
        if population not in get_args(Followed):
            raise ValueError(f"population is one of {get_args(Followed)}, not {population!r}")
        self.extra = extra
        self.reference = reference
        self.gradient: Gradient = gradient
        self.population: Followed = population
        self.forward_only: int | None = None

    @property
    def virtual(self) -> int:
        """V: how many samples at the end of a batch are forward-only now."""
        if self.forward_only is not None:
            return self.forward_only
        return self.reference or self.extra

    def _groups(self, x: Tensor) -> tuple[int, bool]:
        if self.group_size is None:
            self._check_virtual(x)
        return super()._groups(x)

    def _check_virtual(self, x: Tensor) -> None:
        samples, virtual, elements = x.size(0), self.virtual, math.prod(x.shape[2:])
        if virtual and samples <= virtual:
            raise ValueError(
                f"a batch of {samples} samples, of which {virtual} are forward-only, has no other: "
                "see normlab.norms.forward_with"
            )
        if self.reference and virtual * elements < 2:
            raise ValueError(
                f"VirtualBatchNorm needs more than one element per channel in its reference batch: "
                f"{virtual} samples of shape {tuple(x.shape[1:])}"
            )
        followed = self.population == "own" and (self.updates or self.observers)
        if followed and (samples - virtual) * elements == 1:
            raise ValueError(
                f"VirtualBatchNorm's population='own' needs more than one element per channel: "
                f"1 sample of shape {tuple(x.shape[1:])}"
            )

    def _normalize(
        self, x: Tensor, groups: int, interleaved: bool, count: int
    ) -> tuple[Tensor, BatchStatistics | None]:
        virtual = self.virtual
        if self.group_size is not None or virtual == 0:
            return super()._normalize(x, groups, interleaved, count)
        own = x.size(0) - virtual
        if self.gradient == "own" and not self.reference:
            if _forward_only.worth_own_sums(x):
                return self._learning_from(x, own, count)
            x = _forward_only.constant_from(x, own)
        if not self.reference and self.population == "all":
            y, statistics = super()._normalize(x, groups, interleaved, count)
        else:
            y = self._by_reference(x, own) if self.reference else self._by_batch(x)
            statistics = None
            if self.updates or self.observers:
                statistics = moments(x if self.population == "all" else x[:own])
            if self.updates and statistics is not None:
                self.ema_step(self.running_mean, self.running_var, statistics, self.decay)
        if self.gradient == "own" and not self.reference and y.requires_grad:
            y = _forward_only.constant_output(y, own)
        return y, statistics

    def _learning_from(
        self, x: Tensor, own: int, count: int
    ) -> tuple[Tensor, BatchStatistics | None]:
        """`_normalize` of extra samples, with a backward pass over the first `own` samples."""
        everyone = self.population == "all"
        buffers = self.running_mean, self.running_var
        running = buffers if everyone and self.updates else (None, None)
        y, mean, rstd = _forward_only.own_gradient(
            x, own, self.weight, self.bias, running, self.momentum, self.eps
        )
        statistics = None
        if everyone and self.observers:
            statistics = BatchStatistics(mean[None], variance(rstd, self.eps)[None], count)
        elif not everyone and (self.updates or self.observers):
            statistics = moments(x[:own])
            if self.updates:
                self.ema_step(*buffers, statistics, self.decay)
        return y, statistics

    def _by_batch(self, x: Tensor) -> Tensor:
        """All samples by the statistics of all; the buffers stay."""
        weight, bias = float32_affine(x, self.weight, self.bias)
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)

    def _by_reference(self, x: Tensor, own: int) -> Tensor:
        """Each of the first `own` samples by {reference, itself}, the reference by itself."""
        last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        # Parts taken in the order of the memory have their gradients put together in it, too.
        parts = (x.movedim(1, -1) if last else x).split([own, x.size(0) - own])
        mine, reference = (part.movedim(-1, 1) for part in parts) if last else parts
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradient == "all"):
            y_reference = self._by_batch(reference)
            _, mean, var = _centered(reference, [0, *range(2, x.dim())])
        centered, own_mean, own_var = _centered(mine, list(range(2, x.dim())))
        share = 1 / (len(reference) + 1)
        difference = own_mean - mean
        blended = (1 - share) * var + share * own_var
        blended = blended + share * (1 - share) * difference.square()
        scale = (blended + self.eps).rsqrt()
        per_channel = (-1, *[1] * (x.dim() - 2))
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        shift = (1 - share) * difference * scale
        if self.bias is not None:
            shift = shift + self.bias.view(per_channel)
        y = torch.addcmul(shift, centered, scale)
        return torch.cat([y.to(x.dtype), y_reference])

    def __getstate__(self) -> dict[str, Any]:
        # The context is about this object, not about its copies.
        return {**super().__getstate__(), "forward_only": None}

    def extra_repr(self) -> str:
        which = f"reference={self.reference}" if self.reference else f"extra={self.extra}"
        return (
            f"{super().extra_repr()}, {which}, gradient={self.gradient}, "
            f"population={self.population}"
        )


def _centered(x: Tensor, over: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """x less its mean, the mean and the biased variance, float32 at least, of the same rank."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    if not over:
        return torch.zeros_like(z), z, torch.zeros_like(z)
    mean = z.mean(over, keepdim=True)
    centered = z - mean
    return centered, mean, centered.square().mean(over, keepdim=True)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number from 0 on, not {value!r}")


@contextmanager
def forward_only(model: nn.Module, samples: int) -> Iterator[None]:
    """Within the context, the last `samples` of every batch are forward-only to `model`'s layers.

    Its VirtualBatchNorm layers take them as their extra samples or reference batch, in place of the
    number that they were made with; 0 is none. What was set before comes back at the end, also
    after an exception. Activation checkpointing runs forwards again in backward, which then belongs
    inside, too. Raises ValueError for another number, and for a model without such a layer, to
    which these would be samples as all others.
    """
    _check_number("samples", samples)
    layers = [module for module in model.modules() if isinstance(module, VirtualBatchNorm)]
    if not layers:
        raise ValueError("forward-only samples need a model with a VirtualBatchNorm; it has none")
    before = [layer.forward_only for layer in layers]
    try:
        for layer in layers:
            layer.forward_only = samples
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.forward_only = own


def forward_with(model: nn.Module, x: Tensor, virtual: Tensor) -> Tensor:
    """model(x), with the samples `virtual` beside x in every layer and cut off at the end.

    x (N, ...) and virtual (V, ...) run through the model as one batch [x; virtual] under
    `forward_only`; returned are the first N rows of what it returns, a tensor (N + V, ...).
    """
    with forward_only(model, len(virtual)):
        y: Tensor = model(torch.cat([x, virtual]))
    return y[: len(x)]
