"""Percentiles of what the last convolution gives, before any norm, on the same images every time.

The first 256 images of the validation split in a fixed order, not augmented, pass through the
network in eval mode; its batch norms take the statistics of these images, in groups of the NBS
(all of them as one group where the NBS is larger or there are no whole groups). Of all values that
the last of the network's convolutions gives (in its forward's order of definition):

p01, p20, p80, p99   percentiles, in the units of the activations
range                p99 - p01

"Group Normalization" shows them over the training of a VGG-16: without a norm they drift, with
batch or group norm they stay. How far they drift is the ratio of the range after training to that
after the first epochs; `log2_range` is its logarithm, so that a difference of two epochs is the
logarithm of the ratio: 1 is twice as wide.

Source: Wu & He (2018), section 4.1 and figure 6.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import log2

import torch
from torch import Tensor, nn

from normlab.norms.base import normalization, population_layers
from normlab.probes.base import Context

__all__ = ["check", "measure", "percentiles"]

IMAGES = 256
"""Of the validation split, or as many as it has."""

PERCENTS = (1, 20, 80, 99)


def check(context: Context) -> None:
    """Refuse a network without a convolution."""
    _last_convolution(context.model)


def measure(context: Context) -> dict[str, float]:
    """The quantities of the module's description, by name."""
    images = min(IMAGES, context.data.size("val"))
    group = context.plan.nbs
    if group is None or group > images:
        group = images
    images -= images % group
    ((x, _),) = context.batches("val", images, samples=images)
    statistics = (
        normalization(context.model, statistics="batch", update=False, group_size=group)
        if any(not layer.frozen for layer in population_layers(context.model).values())
        else nullcontext()
    )
    with torch.no_grad(), context.autocast(), statistics, _evaluating(context.model):
        values = _given(_last_convolution(context.model), context.model, x)
    found = percentiles(values, PERCENTS)
    spread = found[-1] - found[0]
    measured = {f"p{percent:02}": value for percent, value in zip(PERCENTS, found, strict=True)}
    return measured | {"range": spread, "log2_range": log2(spread) if spread > 0 else float("nan")}


def percentiles(values: Tensor, percents: tuple[int, ...]) -> list[float]:
    """Of all elements, between the two nearest ranks linearly, as numpy's `percentile` has them.

    `torch.quantile` refuses as many elements as a large network gives.
    """
    ordered = values.flatten().float().sort().values
    found = []
    for percent in percents:
        place = percent / 100 * (len(ordered) - 1)
        low, high = (
            ordered[int(place)].item(),
            ordered[min(int(place) + 1, len(ordered) - 1)].item(),
        )
        found.append(low + (place - int(place)) * (high - low))
    return found


def _last_convolution(model: nn.Module) -> nn.Conv2d:
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not found:
        raise ValueError("needs a network with convolutions")
    return found[-1]


def _given(layer: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    """What a layer gives while the model runs on x; of several calls, in the last one."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, y: outputs.append(y.detach().clone()))
    try:
        model(x)
    finally:
        handle.remove()
    return outputs[-1]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """eval() within; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
