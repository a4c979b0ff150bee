"""Population statistics as a value, and the two ways to put one into a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.norms.base import population_layers

__all__ = ["Population", "Statistics", "apply", "using"]


@dataclass(frozen=True)
class Statistics:
    """A layer's population statistics: mean and var (C,), float64, of count elements a channel."""

    mean: Tensor
    var: Tensor
    count: int


Population = dict[str, Statistics]
"""Statistics by the layer's name in the model; of a layer with several populations, by its name and
theirs (`bn1[0]`, see `PopulationNorm.populations`)."""

_Values = dict[str, tuple[Tensor, Tensor]]


def apply(model: nn.Module, population: Mapping[str, Statistics]) -> None:
    """Write `population` into the buffers of the layers that it names, for good.

    The values are rounded to the buffers' dtype. Nothing else changes: not the layers that it does
    not name, and not `num_batches_tracked`. What an evaluation `using` the same population measures
    is then what a checkpoint of the model holds.

    Raises ValueError, before any change, as `using` does.
    """
    _fill(_buffers(model, population), _values(population))


@contextmanager
def using(model: nn.Module, population: Mapping[str, Statistics]) -> Iterator[None]:
    """Within the context, the layers named in `population` hold its values in their buffers.

    Afterwards, also after an exception, the buffers are bitwise what they were. Layers that
    `population` does not name are left alone.

    Raises ValueError, before any change, for a name that is no PopulationNorm of `model` and for a
    wrong number of channels.
    """
    buffers = _buffers(model, population)
    before = {name: (mean.clone(), var.clone()) for name, (mean, var) in buffers.items()}
    try:
        _fill(buffers, _values(population))
        yield
    finally:
        _fill(buffers, before)


def _buffers(model: nn.Module, population: Mapping[str, Statistics]) -> _Values:
    """The buffers that `population` is for; ValueError where it does not fit the model."""
    held = {
        name + key: buffers
        for name, layer in population_layers(model).items()
        for key, buffers in layer.populations().items()
    }
    for name, values in population.items():
        if name not in held:
            raise ValueError(f"no layer with population statistics is called {name!r}")
        channels = held[name][0].size(0)
        for value in (values.mean, values.var):
            if value.shape != (channels,):
                raise ValueError(
                    f"{name} has {channels} channels, its statistics {tuple(value.shape)}"
                )
    return {name: held[name] for name in population}


def _values(population: Mapping[str, Statistics]) -> _Values:
    return {name: (statistics.mean, statistics.var) for name, statistics in population.items()}


def _fill(buffers: _Values, values: _Values) -> None:
    with torch.no_grad():
        for name, (mean, var) in buffers.items():
            mean.copy_(values[name][0])
            var.copy_(values[name][1])
