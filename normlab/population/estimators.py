"""Population statistics of a model with fixed weights, estimated on any data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from normlab.norms.base import BatchStatistics, PopulationNorm, normalization, population_layers
from normlab.population.accumulate import Collector, Mean, Pooled
from normlab.population.cheap import Cheap
from normlab.population.layerwise import layerwise
from normlab.population.values import Population, Statistics

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

    On another domain's batches this is Adaptive BN: no label is read, and no parameter changes.

    A layer that mixes batch and running statistics (BatchRenorm) goes on doing so, and what follows
    it depends on its buffers; not so in "layerwise".

    A layer used several times in a pass pools what it saw. Frozen layers (`statistics` set to
    "population") keep their constants and, like layers that were never reached, are absent from the
    result. Parameters, buffers, modes and settings are as before afterwards, also after an
    exception; no random number is drawn. Only the means are limited by the input's precision: a
    float32 layer knows them to about 1e-7 of their size (1e-6 in channels_last, as torch sums).

    Raises ValueError without any batch, for an unknown estimator, for a decay that does not belong,
    for a model with torch's own batch norms, which it would leave as they are, and what the layers
    raise; "layerwise" also for batches that can be passed over only once, where batches reach the
    layers in different orders, and for layers of several populations or whose statistic is no
    variance.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator is one of {get_args(Estimator)}, not {estimator!r}")
    if decay is not None and estimator != "cheap":
        raise ValueError(f"decay belongs to estimator='cheap', not to {estimator!r}")
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), not {decay}")
    _refuse_strangers(model)
    layers = {k: v for k, v in population_layers(model).items() if v.statistics != "population"}
    if not layers:
        return {}
    run = _run if forward is None else forward
    with torch.no_grad(), _evaluating(model):
        if estimator == "layerwise":
            return layerwise(model, layers, batches, run, group_size)
        if estimator == "cheap":
            averages = {
                name + key: Cheap(layer, decay, key)
                for name, layer in layers.items()
                for key in layer.populations()
            }
            following = {name: average.observe for name, average in averages.items()}
            _observe(model, layers, following, batches, run, group_size)
            return _present({name: average.result() for name, average in averages.items()})
        kind = Pooled if estimator == "pooled" else Mean
        seen = {
            name + key: Collector(kind(mean))
            for name, layer in layers.items()
            for key, (mean, _) in layer.populations().items()
        }
        observers = {name: collector.observe for name, collector in seen.items()}
        _observe(model, layers, observers, batches, run, group_size)
    return _present({name: each.accumulated().result() for name, each in seen.items()})


def _observe(
    model: nn.Module,
    layers: dict[str, PopulationNorm],
    observers: Mapping[str, Callable[[BatchStatistics], None]],
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], object],
    group_size: int | None,
) -> None:
    """One pass over `batches` under their own statistics, with one observer per population."""
    passes = 0
    with ExitStack() as restore:
        restore.enter_context(
            normalization(model, statistics="batch", update=False, group_size=group_size)
        )
        for name, layer in layers.items():
            restore.enter_context(_observed(layer, partial(_hand_on, name, observers)))
        for batch in batches:
            run(model, batch)
            passes += 1
    if passes == 0:
        raise ValueError("population statistics need at least one batch; there was none")


def _hand_on(
    name: str, observers: Mapping[str, Callable[[BatchStatistics], None]], batch: BatchStatistics
) -> None:
    observers[name + batch.population](batch)


def _present(results: dict[str, Statistics | None]) -> Population:
    return {name: result for name, result in results.items() if result is not None}


def _refuse_strangers(model: nn.Module) -> None:
    """An estimate for a part of the batch norms only would pass for one of the whole model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise ValueError(
                f"{name or 'the model'} is torch's {type(module).__name__}, whose statistics "
                "cannot be estimated here: convert the model first (normlab.convert)"
            )


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
def _observed(layer: PopulationNorm, observe: Callable[[BatchStatistics], None]) -> Iterator[None]:
    """Only `observe` watches the layer within the context."""
    before = layer.observers
    layer.observers = [observe]
    try:
        yield
    finally:
        layer.observers = before
