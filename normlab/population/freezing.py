"""Batch norms made constant in the middle of a training."""

from collections.abc import Mapping
from typing import Literal

from torch import nn

from normlab.norms.base import population_layers, refuse_strangers
from normlab.population.values import Statistics, apply

__all__ = ["FreezeAffine", "freeze"]

FreezeAffine = Literal["trainable", "frozen"]


def freeze(
    model: nn.Module,
    population: Mapping[str, Statistics] | None = None,
    *,
    affine: FreezeAffine = "trainable",
) -> None:
    """From now on, normalize with constant population statistics, in train() as in eval().

    Every PopulationNorm of `model` computes y = weight * (x - mean) / sqrt(var + eps) + bias with
    what it holds, or with what `population` gives it first, as `FrozenBatchNorm` does: no sample
    sees another, nothing moves the buffers. The layers and their parameters stay the objects that
    they are, so that an optimizer keeps its state.

    affine: "trainable": weight and bias go on learning; "frozen": they are constants too.

    Raises ValueError, before any change, for an unknown `affine`, for statistics that do not fit
    the model (as `apply` does) and for batch norms of torch's (`normlab.convert` them first).

    Source: Wu & Johnson 2021, section 3.4: train with batch statistics, then, for the last part of
    the training, with the population statistics that inference uses.
    """
    if affine not in ("trainable", "frozen"):
        raise ValueError(f"affine is 'trainable' or 'frozen', not {affine!r}")
    refuse_strangers(model, "frozen")
    apply(model, population or {})
    for layer in population_layers(model).values():
        layer.statistics, layer.update = "population", None
        if affine == "frozen":
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)
