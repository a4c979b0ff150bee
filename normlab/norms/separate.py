"""Batch norm with several domains in a batch (Wu & Johnson 2021, section 5; Chang et al. 2019)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.norms._checks import check_input
from normlab.norms._domains import Labels, Sets, read
from normlab.norms._grouped import grouped_batch_norm, is_half
from normlab.norms._moments import moments
from normlab.norms.base import BatchStatistics, PopulationNorm, Source, check_update

__all__ = ["SeparateBatchNorm", "domains"]


class SeparateBatchNorm(PopulationNorm):
    """Batch norm that knows which of D domains each sample comes from.

    y = weight * (x - mean) / sqrt(var + eps) + bias with *biased* variance, as BatchNorm, and three
    switches: each of the following is one for all domains ("shared") or one per domain.

    ==================  ===========================================  ============================
    switch              shared                                       specific, for domain d
    ==================  ===========================================  ============================
    share_statistics    mean, var over the whole batch               over the batch's samples of d
    share_population    one mean, var (C,)                           row d of (D, C)
    share_affine        one weight, bias (C,)                        row d of (D, C)
    ==================  ===========================================  ============================

    They are the columns of table 5 in "Rethinking 'Batch' in BatchNorm": a network is good if its
    first two agree. Defaults: statistics and population specific, affine shared.

    Population: in a forward that updates, with a = 1 - decay and *unbiased* variances,

    - statistics and population of one kind: r += a (b - r) with what normalized.
    - specific statistics, shared population: the one population takes a step per domain that is
      present, in the order of the domains, as one BatchNorm called on each of them in turn (how
      detection heads share BN over levels).
    - shared statistics, specific population: population d follows the mean and variance of the
      samples of d, which normalized nothing.

    A domain that a batch lacks keeps its buffers bitwise; its weight and bias get a zero gradient.
    num_batches_tracked counts the steps of each population. Observers are given what the
    populations follow, domain by domain.

    Which sample is whose is said by `domains`, a context around the model's forward:
    `with domains(model, labels): y = model(x)`. Without it, a forward that needs the labels is
    refused; one that uses nothing specific does not need them. With specific statistics and
    population, outputs, gradients and buffers are bitwise those of D separate layers of torch, each
    called on its part of the batch (of D BatchNorms, where they are torch's: see there); the order
    of the samples matters to no more than rounding.

    state_dict: the keys of BatchNorm2d, with shapes (C,) and () for what is shared, (D, C) and (D,)
    for what is specific. A checkpoint of a BatchNorm, or of a layer that shares more, fills every
    domain; into a layer that shares more, specific values do not load. With num_domains=1 all is
    shared, and the layer is BatchNorm, state_dict included. In a `normlab.population`, the
    statistics of domain d are those of `<layer>[d]`; a domain without samples is absent from an
    estimate, and `using` leaves it as it is.

    `group_size` gives each domain statistics per so many consecutive samples of the batch, where
    statistics are specific; updates then follow these groups one after another.

    Args:
        num_features: channels C of the input (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W).
        num_domains: D, at least 1.
        share_statistics, share_population, share_affine: the switches above.
        eps: added to the variance.
        decay: share of the running statistics that stays at each step (torch's 1 - momentum).
        affine: learn weights and biases.
        statistics, update: choices of a batch norm, see PopulationNorm.

    Limits: one domain, or everything shared, is BatchNorm; everything specific, that many
    BatchNorms. Source: Wu & Johnson 2021, section 5 and table 5; Chang et al. 2019. Peers:
    wgchang/DSBN normalizes the whole batch by its first sample's domain, here a batch may mix
    domains; in detectron2's CycleBatchNormList the order of the calls says whose turn it is.

    Errors: ValueError for the arguments above; in forward also for unknown domains, another number
    of labels than samples, and one element per channel of a domain, before any state changes.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_domains: int,
        share_statistics: bool = False,
        share_population: bool = False,
        share_affine: bool = True,
        eps: float = 1e-5,
        decay: float = 0.9,
        affine: bool = True,
        statistics: Source | None = None,
        update: bool | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, decay=decay, affine=affine, statistics=statistics, update=update
        )
        if isinstance(num_domains, bool) or not isinstance(num_domains, int) or num_domains < 1:
            raise ValueError(f"num_domains must be a whole number from 1 on, not {num_domains!r}")
        if not (share_affine or affine):
            raise ValueError("share_affine=False needs affine=True: there is no affine to separate")
        self.num_domains = num_domains
        self.share_statistics = share_statistics
        self.share_population = share_population
        self.share_affine = share_affine
        self.domains: Labels | None = None
        rows = (num_domains, num_features)
        if num_domains > 1 and not share_population:
            self.running_mean = torch.zeros(rows)
            self.running_var = torch.ones(rows)
            self.num_batches_tracked = torch.zeros(num_domains, dtype=torch.long)
        if num_domains > 1 and not share_affine:
            self.weight = nn.Parameter(torch.ones(rows))
            self.bias = nn.Parameter(torch.zeros(rows))

    def populations(self) -> dict[str, tuple[Tensor, Tensor]]:
        if self.running_mean.dim() == 1:
            return super().populations()
        rows = zip(self.running_mean, self.running_var, strict=True)
        return {f"[{domain}]": row for domain, row in enumerate(rows)}

    def _forward(self, x: Tensor) -> Tensor:
        check_input(x, self.num_features, type(self).__name__, self._buffers["running_mean"])
        several = self.num_domains > 1
        own_population = self.running_mean.dim() == 2
        own_affine = self.weight is not None and self.weight.dim() == 2
        if self.source == "population":
            if own_population or own_affine:
                check_update(self.update, self.source)
                return self._apply_populations(x, self._known(x).sets(x))
            return super()._forward(x)
        if several and not self.share_statistics:
            return self._separate(x)
        if own_affine or (own_population and (self.updates or self.observers)):
            return self._mixed(x, own_population, own_affine)
        return super()._forward(x)

    def _known(self, x: Tensor) -> Labels:
        """Whose samples these are, or a refusal."""
        if self.domains is None:
            raise ValueError(
                f"SeparateBatchNorm does not know which of its {self.num_domains} domains the "
                "samples are from: call the model within `with domains(model, labels):`"
            )
        self.domains.check(x.size(0))
        return self.domains

    def _apply_populations(self, x: Tensor, sets: Sets) -> Tensor:
        parts = []
        for part, domain in sets.parts(x):
            mean, var = self._population(domain)
            weight, bias = self._affine(domain)
            parts.append(F.batch_norm(part, mean, var, weight, bias, False, eps=self.eps))
        return sets.join(parts) if parts else x

    def _separate(self, x: Tensor) -> Tensor:
        """Each domain by its own statistics: one batch norm after another."""
        self._groups(x)  # refuses a batch that group_size does not divide
        sets = self._known(x).sets(x, self.group_size)
        self._check_counts(x, sets)
        parts = []
        for part, domain in sets.parts(x):
            running, count = self._population(domain), part.numel() // self.num_features
            y, statistics = self._one_group(
                part, count, running, *self._affine(domain), self._key(domain)
            )
            parts.append(y)
            if self.updates:
                self._track(domain)
            if statistics is not None:
                for observe in self.observers:
                    observe(statistics)
        return sets.join(parts)

    def _mixed(self, x: Tensor, own_population: bool, own_affine: bool) -> Tensor:
        """All domains by the same statistics, with what else is specific."""
        groups, _ = self._groups(x)
        labels = self._known(x)
        count = self._count(x, groups)
        followed = own_population and (self.updates or bool(self.observers))
        if followed:
            self._check_counts(x, labels.sets(x))
        weight, bias = (None, None) if own_affine else (self.weight, self.bias)
        # The affine of a half-precision input acts on float32, as where it is in the operator.
        z = x.float() if own_affine and is_half(x) else x
        y, mean, var = grouped_batch_norm(
            z, groups, interleaved=False, weight=weight, bias=bias, eps=self.eps
        )
        if own_affine:
            scale, shift = (self._per_sample(v, labels, y) for v in (self.weight, self.bias))
            y = torch.addcmul(shift, y, scale).to(x.dtype)
        if followed:
            for part, domain in labels.sets(x).parts(x.detach()):
                self._follow(moments(part, self._key(domain)), domain)
        elif not own_population:
            self._follow(BatchStatistics(mean, var, count), 0)
        return y

    def _follow(self, statistics: BatchStatistics, domain: int) -> None:
        """Move the domain's population, and tell the observers what it follows."""
        if self.updates:
            self.ema_step(*self._population(domain), statistics, self.decay)
            self._track(domain)
        for observe in self.observers:
            observe(statistics)

    def _check_counts(self, x: Tensor, sets: Sets) -> None:
        elements = x[0, 0].numel()
        for domain, size in zip(sets.domains, sets.sizes, strict=True):
            if size * elements < 2:
                raise ValueError(
                    f"SeparateBatchNorm needs more than one element per domain and channel: domain "
                    f"{domain} has {size} samples of shape {tuple(x.shape[1:])}"
                )

    def _key(self, domain: int) -> str:
        return f"[{domain}]" if self.running_mean.dim() == 2 else ""

    def _population(self, domain: int) -> tuple[Tensor, Tensor]:
        if self.running_mean.dim() == 1:
            return self.running_mean, self.running_var
        return self.running_mean[domain], self.running_var[domain]

    def _affine(self, domain: int) -> tuple[Tensor | None, Tensor | None]:
        if self.weight is None or self.bias is None or self.weight.dim() == 1:
            return self.weight, self.bias
        return self.weight[domain], self.bias[domain]

    def _track(self, domain: int) -> None:
        tracked = self.num_batches_tracked
        (tracked if tracked.dim() == 0 else tracked[domain]).add_(1)

    @staticmethod
    def _per_sample(values: Tensor | None, labels: Labels, y: Tensor) -> Tensor:
        """The row of (D, C) of each sample, to be multiplied with y (N, C, ...)."""
        assert values is not None
        rows = values[labels.rows(y.device)]
        return rows.reshape(*rows.shape, *[1] * (y.dim() - 2))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            own, stored = getattr(self, name), state_dict.get(prefix + name)
            if own is None or stored is None or own.dim() != 1 + (name[0] != "n"):
                continue  # absent, or shared: torch compares the shapes
            if own.shape[1:] == stored.shape:
                state_dict[prefix + name] = stored.expand(own.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Labels are of one forward of this object, not of its copies.
        return {**super().__getstate__(), "domains": None}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_domains={self.num_domains}, "
            f"share_statistics={self.share_statistics}, share_population={self.share_population}, "
            f"share_affine={self.share_affine}"
        )


@contextmanager
def domains(model: nn.Module, labels: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Within the context, the SeparateBatchNorms of `model` know the domains of the samples.

    labels: the domain of each sample of every forward, from 0 to num_domains - 1: (N,) of any
    integer dtype and device, or one number for batches of any size. A context inside another one
    replaces its labels; at the end, also after an exception, what was known before is known again.
    Activation checkpointing runs forwards again in backward, which then belongs inside, too. A
    model without such layers is left alone.

    Raises ValueError, before any change, for labels of another kind and for a domain that a layer
    does not have; a forward whose batch has another size is refused by the layers.
    """
    known = read(labels)
    layers = {k: v for k, v in model.named_modules() if isinstance(v, SeparateBatchNorm)}
    for name, layer in layers.items():
        values = torch.as_tensor(known).reshape(-1)
        wrong = ((values < 0) | (values >= layer.num_domains)).nonzero()
        if len(wrong):
            which = "" if isinstance(known, int) else f" of sample {int(wrong[0])}"
            raise ValueError(
                f"domain {int(values[wrong[0]])}{which}: the domains of {name or 'the layer'} are "
                f"0 to {layer.num_domains - 1}"
            )
    before = [layer.domains for layer in layers.values()]
    shared = Labels(known)
    try:
        for layer in layers.values():
            layer.domains = shared
        yield
    finally:
        for layer, own in zip(layers.values(), before, strict=True):
            layer.domains = own


class InTurn(nn.Module):
    """Calls `model` on batches (N, ...) that hold D domains in turn: sample i is of domain i mod D.

    So what calls a network without knowing of domains, a training loop, needs no labels: only
    batches, micro-batches and shares of them that begin with domain 0. In `state_dict` the model is
    below `model`. Raises ValueError in forward as `domains` does.
    """

    def __init__(self, model: nn.Module, num_domains: int) -> None:
        super().__init__()
        self.model = model
        self.num_domains = num_domains

    def forward(self, x: Tensor) -> Any:
        with domains(self.model, torch.arange(len(x)) % self.num_domains):
            return self.model(x)


def num_domains(model: nn.Module) -> int:
    """The most domains that a layer of `model` tells apart; 1 where none needs labels."""
    layers = (m for m in model.modules() if isinstance(m, SeparateBatchNorm))
    return max((layer.num_domains for layer in layers), default=1)


def in_turn(model: nn.Module, domains: int) -> InTurn | None:
    """What calls `model` on batches that hold as many domains in turn; None: no layer asks."""
    return InTurn(model, domains) if num_domains(model) > 1 and domains > 1 else None
