"""Population statistics as a value: estimated, used during one evaluation, never left in a model.

The sources of the statistics that a batch norm tests with are protocols of evaluation of one
network: the running average it trained with (its buffers), averages with other decays (`EmaBank`),
or an estimate with fixed weights on any data (`estimate`: "precise" on training data, "adaptive" on
another domain's). `using` puts one into the model for as long as an evaluation takes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normlab.norms.base import BatchStatistics, PopulationNorm, normalization, population_layers

__all__ = ["EmaBank", "Estimator", "Population", "Statistics", "estimate", "using"]

Estimator = Literal["pooled", "mean"]


@dataclass(frozen=True)
class Statistics:
    """A layer's population statistics: mean and var (C,), float64, of count elements a channel."""

    mean: Tensor
    var: Tensor
    count: int


Population = dict[str, Statistics]
"""Statistics by the layer's name in the model."""


class _Pooled:
    """Mean and biased variance of all elements seen, merged as Chan et al. (1979) in float64.

    The same for any split of the data into batches and groups, up to rounding: no difference of
    large squares is ever taken.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(self, means: Tensor, variances: Tensor, counts: Tensor, count: int) -> None:
        """Merge groups: means and biased variances (G, C), elements (G, 1), and their sum."""
        mean = (counts * means).sum(0) / count
        squares = (counts * (variances + (means - mean).square())).sum(0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squares = self.squares + squares + difference.square() * (self.count * count / total)
        self.count = total

    def result(self) -> Statistics | None:
        if self.mean is None or self.squares is None:
            return None
        return Statistics(self.mean, self.squares / self.count, self.count)


class _Mean:
    """Means of the groups' means and of their unbiased variances, weighted by their elements."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.var: Tensor | None = None

    def add(self, means: Tensor, variances: Tensor, counts: Tensor, count: int) -> None:
        """Merge groups: means and biased variances (G, C), elements (G, 1), and their sum."""
        mean = (counts * means).sum(0) / count
        var = (counts * (variances * (counts / (counts - 1)))).sum(0) / count
        self.count += count
        if self.mean is None or self.var is None:
            self.mean, self.var = mean, var
            return
        self.mean = self.mean + (mean - self.mean) * (count / self.count)
        self.var = self.var + (var - self.var) * (count / self.count)

    def result(self) -> Statistics | None:
        if self.mean is None or self.var is None:
            return None
        return Statistics(self.mean, self.var, self.count)


class _Collector:
    """Hands what a layer observed to an estimator, many groups at a time and in float64.

    Merging every batch as it comes would cost a small network a percent of its forward. What waits
    is copied to a place made beforehand: small tensors that stay among the activations scatter the
    memory that those reuse.
    """

    rows = 64  # groups that wait, at least

    def __init__(self, estimator: _Pooled | _Mean, layer: PopulationNorm) -> None:
        self.estimator = estimator
        self.counts: list[int] = []
        self._make_room(layer.running_mean, self.rows)

    def _make_room(self, like: Tensor, rows: int) -> None:
        self.means = like.new_empty((rows, like.size(-1)), dtype=torch.float64)
        self.variances = torch.empty_like(self.means)

    def observe(self, batch: BatchStatistics) -> None:
        groups = batch.mean.size(0)
        if len(self.counts) + groups > self.means.size(0):
            self.flush()
            if groups > self.means.size(0):
                self._make_room(self.means, groups)
        place = slice(len(self.counts), len(self.counts) + groups)
        self.means[place].copy_(batch.mean)
        self.variances[place].copy_(batch.var)
        self.counts += [batch.count] * groups

    def flush(self) -> None:
        if not self.counts:
            return
        rows = len(self.counts)
        counts = self.means.new_tensor(self.counts)[:, None]
        self.estimator.add(self.means[:rows], self.variances[:rows], counts, sum(self.counts))
        self.counts = []

    def result(self) -> Statistics | None:
        """What was seen, or None if it was nothing."""
        self.flush()
        return self.estimator.result()


_ESTIMATORS: dict[Estimator, type[_Pooled | _Mean]] = {"pooled": _Pooled, "mean": _Mean}


def estimate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator,
    group_size: int | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Population:
    """Population statistics of `model` on `batches`, its weights fixed (Wu & Johnson 2021, sec. 3).

    Runs the model in eval mode without gradients, except that its batch norms normalize with the
    statistics of each batch; merges what every layer saw, in float64:

    - "pooled": mean and biased variance of all elements, E[var_B + mean_B^2] - E[mean_B]^2 over
      groups B, weighted by their size (PreciseBN of the paper and of fvcore).
    - "mean": averages of the groups' means and unbiased variances (torch's update_bn, pycls). It
      leaves out the variance between group means: too small wherever groups differ, as with
      batches of one class each.

    Args:
        model: any module with PopulationNorm layers, alone or inside wrappers.
        batches: what `forward` takes; by default a tensor or a tuple that starts with one. A
            shorter last batch counts by its size.
        estimator: "pooled" or "mean".
        group_size: consecutive samples that share one set of statistics, in place of each layer's
            own grouping; must divide every batch.
        forward: called as forward(model, batch) instead of model(batch) or model(batch[0]).

    A layer used several times in a pass pools what it saw. Frozen layers (`statistics` set to
    "population") keep their constants and, like layers that were never reached, are absent from the
    result. Parameters, buffers, modes and settings are as before afterwards, also after an
    exception; no random number is drawn. Only the means are limited by the input's precision: a
    float32 layer knows them to about 1e-7 of their size (1e-6 in channels_last, as torch sums).

    Raises ValueError without any batch, for an unknown estimator, and what the layers raise.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator is one of {get_args(Estimator)}, not {estimator!r}")
    layers = {k: v for k, v in population_layers(model).items() if v.statistics != "population"}
    if not layers:
        return {}
    seen = {name: _Collector(_ESTIMATORS[estimator](), layer) for name, layer in layers.items()}
    run = _run if forward is None else forward
    passes = 0
    with ExitStack() as restore:
        restore.enter_context(torch.no_grad())
        restore.enter_context(_evaluating(model))
        restore.enter_context(
            normalization(model, statistics="batch", update=False, group_size=group_size)
        )
        for name, layer in layers.items():
            restore.enter_context(_observed(layer, seen[name].observe))
        for batch in batches:
            run(model, batch)
            passes += 1
    if passes == 0:
        raise ValueError("population statistics need at least one batch; there was none")
    results = {name: accumulated.result() for name, accumulated in seen.items()}
    return {name: result for name, result in results.items() if result is not None}


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


@contextmanager
def using(model: nn.Module, population: Mapping[str, Statistics]) -> Iterator[None]:
    """Within the context, the layers named in `population` hold its values in their buffers.

    Afterwards, also after an exception, the buffers are bitwise what they were. Layers that
    `population` does not name are left alone.

    Raises ValueError, before any change, for a name that is no PopulationNorm of `model` and for a
    wrong number of channels.
    """
    layers = population_layers(model)
    for name, values in population.items():
        if name not in layers:
            raise ValueError(f"no layer with population statistics is called {name!r}")
        channels = layers[name].num_features
        for value in (values.mean, values.var):
            if value.shape != (channels,):
                raise ValueError(
                    f"{name} has {channels} channels, its statistics {tuple(value.shape)}"
                )
    buffers = {name: (layers[name].running_mean, layers[name].running_var) for name in population}
    before = {name: (mean.clone(), var.clone()) for name, (mean, var) in buffers.items()}
    try:
        _fill(buffers, {name: (v.mean, v.var) for name, v in population.items()})
        yield
    finally:
        _fill(buffers, before)


def _fill(
    buffers: Mapping[str, tuple[Tensor, Tensor]], values: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    with torch.no_grad():
        for name, (mean, var) in buffers.items():
            mean.copy_(values[name][0])
            var.copy_(values[name][1])


class EmaBank:
    """Running averages with further decays, beside each layer's own, during one training.

    For every decay d and layer: r = d r + (1 - d) b at each forward that moves the layer's own
    buffers, b by the layer's own rule (`PopulationNorm.ema_step`), from the buffers' values at
    construction on, in float64. After T steps batch t weighs (1 - d) d^(T-t) and the initial value
    d^T. With the layer's own decay the bank follows its buffers up to their float32 rounding.
    Watching changes nothing in the training, to the bit.

    Raises ValueError for decays that repeat or lie outside [0, 1).
    """

    def __init__(self, model: nn.Module, decays: Iterable[float]) -> None:
        self.decays = tuple(float(decay) for decay in decays)
        for decay in self.decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_bank: a decay must be in [0, 1), not {decay}")
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"ema_bank: decays repeat: {list(self.decays)}")
        self._layers = population_layers(model)
        self._count = dict.fromkeys(self._layers, 0)
        self._mean: dict[str, Tensor] = {}
        self._var: dict[str, Tensor] = {}
        self._observers: dict[str, Callable[[BatchStatistics], None]] = {}
        for name, layer in self._layers.items():
            rows = (len(self.decays), 1)
            self._mean[name] = layer.running_mean.detach().double().repeat(rows)
            self._var[name] = layer.running_var.detach().double().repeat(rows)
            self._observers[name] = partial(self._follow, name)
            layer.observers.append(self._observers[name])

    def _follow(self, name: str, batch: BatchStatistics) -> None:
        layer = self._layers[name]
        if not layer.updates:  # an evaluation with batch statistics, not training
            return
        for decay, mean, var in zip(self.decays, self._mean[name], self._var[name], strict=True):
            layer.ema_step(mean, var, batch, decay)
        self._count[name] += batch.count * batch.mean.size(0)

    def population(self, decay: float) -> Population:
        """The averages with `decay`; layers that have not been updated yet are absent.

        Raises ValueError for a decay that the bank does not follow.
        """
        if decay not in self.decays:
            raise ValueError(f"ema_bank has the decays {list(self.decays)}, not {decay}")
        row = self.decays.index(decay)
        return {
            name: Statistics(self._mean[name][row].clone(), self._var[name][row].clone(), count)
            for name, count in self._count.items()
            if count > 0
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only (loads with weights_only=True)."""
        return {
            "decays": list(self.decays),
            "layers": {
                name: {
                    "count": count,
                    "mean": self._mean[name].clone(),
                    "var": self._var[name].clone(),
                }
                for name, count in self._count.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError if it is of other decays or layers."""
        if tuple(state["decays"]) != self.decays:
            raise ValueError(
                f"ema_bank has the decays {list(self.decays)}, the state {state['decays']}"
            )
        if state["layers"].keys() != self._count.keys():
            raise ValueError("ema_bank: the state is of a model with other layers")
        for name, values in state["layers"].items():
            self._count[name] = values["count"]
            self._mean[name].copy_(values["mean"])
            self._var[name].copy_(values["var"])

    def detach(self) -> None:
        """Stop watching; the averages stay. Further calls do nothing."""
        for name, observer in self._observers.items():
            watching = self._layers[name].observers
            self._layers[name].observers = [o for o in watching if o is not observer]
        self._observers = {}
