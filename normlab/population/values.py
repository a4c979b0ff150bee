"""Population statistics as a value, and the two ways to put one into a model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.norms.base import PopulationNorm

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


def apply(model: nn.Module, population: Mapping[str, Statistics]) -> None:
    """Write `population` into the buffers of the layers that it names, for good.

    The values are rounded to the buffers' dtype. Nothing else changes: not the layers that it does
    not name, and not `num_batches_tracked`. What an evaluation `using` the same population measures
    is then what a checkpoint of the model holds.

    Raises ValueError, before any change, as `using` does.
    """
    _check(model, population)
    _fill(model, population)


@contextmanager
def using(model: nn.Module, population: Mapping[str, Statistics]) -> Iterator[None]:
    """Within the context, the layers named in `population` hold its values in their buffers.

    Afterwards, also after an exception, the buffers are bitwise what they were, also if a move, a
    cast or load_state_dict has replaced them meanwhile (rounded, where a cast leaves less
    precision), or `normlab.convert` the layers. Layers that `population` does not name are left
    alone.

    Raises ValueError, before any change, for a name that is no PopulationNorm of `model`, for a
    wrong number of channels and for two names of one layer; RuntimeError at the end where a layer
    is no longer there to get its statistics back (after an exception, a note on that).
    """
    _check(model, population)
    held = _held(model)
    before = {}
    for name in population:
        mean, var = held[name]
        before[name] = Statistics(mean.clone(), var.clone(), 0)
    try:
        _fill(model, population)
        yield
    except BaseException as error:
        gone = _fill(model, before)
        if gone:
            error.add_note(_lost(gone))
        raise
    gone = _fill(model, before)
    if gone:
        raise RuntimeError(_lost(gone))


def _lost(names: list[str]) -> str:
    return (
        f"{', '.join(map(repr, names))} held other population statistics for a while, and are no "
        "longer there to get their own back: change a model's layers outside of `using`"
    )


def _layers(model: nn.Module) -> dict[str, PopulationNorm]:
    """Under all of their names: a layer may be at several places."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, PopulationNorm)}


def _held(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Where mean and var of each name are now: moving a model gives it other tensors."""
    return {
        name + key: buffers
        for name, layer in _layers(model).items()
        for key, buffers in layer.populations().items()
    }


def _check(model: nn.Module, population: Mapping[str, Statistics]) -> None:
    """ValueError where `population` does not fit the model."""
    held = _held(model)
    named = {
        name + key: (id(layer), key)
        for name, layer in _layers(model).items()
        for key in layer.populations()
    }
    taken: dict[tuple[int, str], str] = {}
    for name, values in population.items():
        if name not in held:
            raise ValueError(f"no layer with population statistics is called {name!r}")
        first = taken.setdefault(named[name], name)
        if first != name:
            raise ValueError(f"{first!r} and {name!r} are one layer: give its statistics once")
        channels = held[name][0].size(0)
        for value in (values.mean, values.var):
            if value.shape != (channels,):
                raise ValueError(
                    f"{name} has {channels} channels, its statistics {tuple(value.shape)}"
                )


@torch.no_grad()
def _fill(model: nn.Module, population: Mapping[str, Statistics]) -> list[str]:
    """Write what there is a place for; the names for which there is none."""
    held = _held(model)
    gone = []
    for name, values in population.items():
        if name not in held or held[name][0].shape != values.mean.shape:
            gone.append(name)
            continue
        mean, var = held[name]
        mean.copy_(values.mean)
        var.copy_(values.var)
    return gone
