"""Population statistics as a value, and the two ways to put one into a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.norms.base import PopulationNorm, population_layers

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

_Held = dict[str, tuple[PopulationNorm, str]]
"""For each name, the layer that it stands for, and which of its populations."""


def apply(model: nn.Module, population: Mapping[str, Statistics]) -> None:
    """Write `population` into the buffers of the layers that it names, for good.

    The values are rounded to the buffers' dtype. Nothing else changes: not the layers that it does
    not name, and not `num_batches_tracked`. What an evaluation `using` the same population measures
    is then what a checkpoint of the model holds.

    Raises ValueError, before any change, as `using` does.
    """
    _fill(_held(model, population), population)


@contextmanager
def using(model: nn.Module, population: Mapping[str, Statistics]) -> Iterator[None]:
    """Within the context, the layers named in `population` hold its values in their buffers.

    Afterwards, also after an exception, the buffers are bitwise what they were, also if the model
    was moved to another device meanwhile. Layers that `population` does not name are left alone.

    Raises ValueError, before any change, for a name that is no PopulationNorm of `model` and for a
    wrong number of channels.
    """
    held = _held(model, population)
    before = {name: Statistics(*_copies(held[name]), 0) for name in held}
    try:
        _fill(held, population)
        yield
    finally:
        _fill(held, before)


def _held(model: nn.Module, population: Mapping[str, Statistics]) -> _Held:
    """What `population` is for; ValueError where it does not fit the model."""
    known = {
        name + key: (layer, key)
        for name, layer in population_layers(model).items()
        for key in layer.populations()
    }
    for name, values in population.items():
        if name not in known:
            raise ValueError(f"no layer with population statistics is called {name!r}")
        channels = len(_buffers(known[name])[0])
        for value in (values.mean, values.var):
            if value.shape != (channels,):
                raise ValueError(
                    f"{name} has {channels} channels, its statistics {tuple(value.shape)}"
                )
    return {name: known[name] for name in population}


def _buffers(held: tuple[PopulationNorm, str]) -> tuple[Tensor, Tensor]:
    """Where mean and var are now: moving a model gives it other tensors."""
    layer, population = held
    return layer.populations()[population]


def _copies(held: tuple[PopulationNorm, str]) -> tuple[Tensor, Tensor]:
    mean, var = _buffers(held)
    return mean.clone(), var.clone()


@torch.no_grad()
def _fill(held: _Held, population: Mapping[str, Statistics]) -> None:
    for name, where in held.items():
        mean, var = _buffers(where)
        mean.copy_(population[name].mean)
        var.copy_(population[name].var)
