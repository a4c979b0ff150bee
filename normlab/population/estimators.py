"""Population statistics of a model with fixed weights, estimated on any data."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from normlab.norms.base import (
    BatchStatistics,
    PopulationNorm,
    normalization,
    own_choices,
    population_layers,
    refuse_strangers,
)
from normlab.population.accumulate import Collector, Mean, Pooled, Watcher
from normlab.population.cheap import Cheap
from normlab.population.layerwise import check_layerwise, layerwise
from normlab.population.together import Attempt, Group, Together, without_broadcasts
from normlab.population.values import Population

__all__ = ["Estimator", "estimate"]

Estimator = Literal["pooled", "mean", "layerwise", "cheap"]


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator,
    group_size: int | None = None,
    decay: float | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    group: Group = None,
) -> Population:
    """Population statistics of `model` on `batches`, its weights fixed (Wu & Johnson 2021, sec. 3).

    Runs the model in eval mode without gradients, except that its batch norms normalize with the
    statistics of each batch ("layerwise": with population statistics); merges what every layer
    saw, in float64:

    - "pooled": mean and biased variance of all elements, E[var_B + mean_B^2] - E[mean_B]^2 over
      groups B, weighted by their size (PreciseBN of the paper and of fvcore). Exact for the first
      layer; the inputs of the deeper ones depend on how the batches are formed.
    - "mean": averages of the groups' means and unbiased variances (torch's update_bn, pycls). It
      leaves out the variance between group means: too small wherever groups differ, as with
      batches of one class each.
    - "layerwise": the first layer's pooled statistics, then the second's with the first normalizing
      by its own, and so on (the paper's appendix A.3): the same for every batch size, and what
      "pooled" gives with all the data in one batch. One pass over `batches` per layer, each up to
      that layer: about half of a forward on average, times the number of layers.
    - "cheap": the running average with fixed weights. `decay` None: r_t = r_(t-1) + (b_t - r_(t-1))
      / t, the plain average over the forwards, whatever their size (torch's momentum=None: "mean"
      if all are of one size). Else r_t = decay r_(t-1) + (1 - decay) b_t from the layer's buffers
      on, which keep the weight decay^T after T forwards (`iterations_needed`). b_t is what the
      layer's own rule makes of a batch (`PopulationNorm.ema_step`).

    Where there is a process group, its ranks estimate together: each calls this with the same model
    and with batches of its own, as many as it has, also none. All get the same result, to the bit:
    that of one process with all the batches ("layerwise" merges each layer before it measures the
    next; "cheap" averages the forwards of all ranks, and refuses a decay, since they have no
    order). What fails on one rank raises on all. Forwards of a DistributedDataParallel broadcast
    nothing. Layers that are synchronized over ranks exchange in every forward and see the batches
    of all their ranks as one: ranks need equally many, or `group_size`, or "layerwise" (and what
    fails inside such a forward, the others learn by its timeout).

    Args:
        model: any module with PopulationNorm layers, alone or inside wrappers.
        batches: what `forward` takes; by default a tensor or a tuple or list that starts with one,
            of which no more is read. A shorter last batch counts by its size. "layerwise" passes
            over them again and again: a list or a loader, each time with the same samples.
        estimator: one of the four above.
        group_size: consecutive samples that share one set of statistics, in place of each layer's
            own grouping; must divide every batch.
        decay: for "cheap" only, in [0, 1).
        forward: called as forward(model, batch) instead of model(batch) or model(batch[0]).
        group: the ranks, as everywhere in `normlab.dist`: a process group, or None for all. A
            process that estimates while the others do not says "alone".

    On another domain's batches this is Adaptive BN: no label is read, and no parameter changes.

    A layer that mixes batch and running statistics (BatchRenorm) goes on doing so, and what follows
    it depends on its buffers; not so in "layerwise".

    A layer used several times in a pass pools what it saw. Frozen layers (whose owner set
    `statistics` to "population") keep their constants and, like layers that were never reached, are
    absent from the result, as what layers of other kinds keep is (timm's EvoNorm). What a
    `normalization` around the call chose counts for nothing in it.
    Parameters, buffers, modes and settings are as before afterwards, also after an exception; no
    random number is drawn. A float32 layer knows means to about 1e-7 of their size, and variances
    to that and the mean's last places. Where torch's batch norm sums in float32 (channels_last and
    (N, C) on a CPU) its error of 1e-5 to 1e-4 of a variance stays for means up to ten spreads;
    about larger ones, where that error would grow, another route is taken.

    Raises ValueError without any batch, for an unknown estimator, for a decay that does not belong,
    for a model with torch's own batch norms, which it would leave as they are, for one whose
    parameters are sharded over ranks (FSDP), for one without a batch norm or whose batch norms are
    all frozen, and what the layers raise; "layerwise" also for batches that can be passed
    over only once, where batches reach the layers in different orders, and for layers of several
    populations or whose statistic is no variance. Over ranks also where their estimators, layers or
    group_size differ, and for a decay; RuntimeError for what failed on another rank.
    """
    together = Together(model, group)
    layers: dict[str, PopulationNorm] = {}
    facts = [0.0] * 4
    with together.attempt() as checked:
        layers = _checked(model, batches, estimator, decay, together)
        facts = _facts(estimator, layers, group_size)
    of_ranks = together.exchange(facts, checked)
    if (of_ranks != of_ranks[0]).any():
        raise ValueError(
            "ranks estimate different things: their estimators, group_size or layers differ"
        )
    run = _run if forward is None else forward
    with torch.no_grad(), own_choices(model), _evaluating(model), without_broadcasts(model):
        if estimator == "layerwise":
            return layerwise(model, layers, batches, run, group_size, together)
        watchers = {
            name + key: _watcher(estimator, decay, layer, key)
            for name, layer in layers.items()
            for key in layer.populations()
        }
        passes = _observe(model, layers, watchers, batches, run, group_size, together)
    if passes == 0:
        raise ValueError("population statistics need at least one batch; there was none")
    results = {name: watcher.result() for name, watcher in watchers.items()}
    return {name: result for name, result in results.items() if result is not None}


def _checked(
    model: nn.Module,
    batches: Iterable[Any],
    estimator: Estimator,
    decay: float | None,
    together: Together,
) -> dict[str, PopulationNorm]:
    """The layers to estimate, if that can be done."""
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator is one of {get_args(Estimator)}, not {estimator!r}")
    if decay is not None and estimator != "cheap":
        raise ValueError(f"decay belongs to estimator='cheap', not to {estimator!r}")
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), not {decay}")
    if decay is not None and together.size > 1:
        raise ValueError(
            "decay weighs batches by their order, and those of several ranks have none: leave it "
            "out, or estimate on each rank alone (group='alone')"
        )
    refuse_strangers(model, "estimated")
    _refuse_sharded(model)
    found = population_layers(model)
    layers = {name: layer for name, layer in found.items() if not layer.frozen}
    if not layers:
        frozen = f"all {len(found)} batch norms of the model are frozen (statistics='population')"
        none = f"{type(model).__name__} has no batch norm"
        raise ValueError(f"nothing to estimate: {frozen if found else none}")
    if estimator == "layerwise":
        check_layerwise(model)
        if iter(batches) is batches:
            raise ValueError(
                "layerwise passes over the batches once for every layer: give it a list or a "
                "loader, not an iterator that is spent after one pass"
            )
    return layers


def _refuse_sharded(model: nn.Module) -> None:
    # Each forward gathers the parameters from all ranks, and ranks may have unequal batches.
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it, nothing is sharded
    if fsdp is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
            raise ValueError(
                f"{name or 'the model'} is sharded over ranks (FSDP), which estimate cannot run: "
                "load its full state_dict into a model that is not, and estimate that"
            )


def _facts(
    estimator: Estimator, layers: dict[str, PopulationNorm], group_size: int | None
) -> list[float]:
    """What all ranks must agree on."""
    shapes = [
        (name, key, len(mean))
        for name, layer in layers.items()
        for key, (mean, _) in layer.populations().items()
    ]
    digest = hashlib.sha256(repr(shapes).encode()).digest()
    exact = int.from_bytes(digest[:6], "big")  # as a float64
    return [get_args(Estimator).index(estimator), group_size or 0, len(shapes), exact]


def _watcher(
    estimator: Estimator, decay: float | None, layer: PopulationNorm, population: str
) -> Watcher:
    if estimator == "cheap":
        return Cheap(layer, decay, population)
    mean, _ = layer.populations()[population]
    return Collector(Pooled(mean) if estimator == "pooled" else Mean(mean))


def _observe(
    model: nn.Module,
    layers: dict[str, PopulationNorm],
    watchers: Mapping[str, Watcher],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    group_size: int | None,
    together: Together,
) -> int:
    """One pass over `batches` under their own statistics; what all ranks saw, and how many."""
    passes = 0
    synchronized: dict[str, bool] = {}
    with ExitStack() as restore:
        with together.attempt() as prepared:
            restore.enter_context(
                normalization(model, statistics="batch", update=False, group_size=group_size)
            )
            synchronized = together.synchronized(layers)
        several = bool(together.exchange([len(synchronized)], prepared).any())
        for name, layer in layers.items():
            observe = partial(_hand_on, name, watchers) if synchronized.get(name, True) else None
            restore.enter_context(_observed(layer, observe))
        if several:
            batches = together.in_step(batches)
        # In a forward that waits for other ranks, nothing else can tell them of a failure.
        with nullcontext(Attempt()) if several else together.attempt() as observed:
            for batch in batches:
                run(model, batch)
                passes += 1
    return int(together.merge(list(watchers.values()), [passes], observed)[:, 0].sum())


def _hand_on(name: str, watchers: Mapping[str, Watcher], batch: BatchStatistics) -> None:
    watchers[name + batch.population].observe(batch)


def _run(model: nn.Module, batch: Any) -> object:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """eval() within the context; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _observed(
    layer: PopulationNorm, observe: Callable[[BatchStatistics], None] | None
) -> Iterator[None]:
    """Only `observe`, if anything, watches the layer within the context."""
    before = layer.observers
    layer.observers = [] if observe is None else [observe]
    try:
        yield
    finally:
        layer.observers = before
