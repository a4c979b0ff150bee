"""The running average of a layer's mean beside the means of many mini-batches, weights fixed.

100 mini-batches of the NBS, drawn anew from the training set and augmented, pass through the
network as it is, each normalized by its own statistics, which move nothing. The plain average of
a channel's batch means is its population mean; by how much the running average (EMA) misses it is
seen in the unit of one batch's noise.

Of each population norm l and channel c, with batch means b_1 .. b_100, population mean p and EMA e:
z = median over l and c of |e - p| / std(b); `z_corrected` the same with e / (1 - w), where w is the
weight that the layer's rule leaves to the initial value, 0, after as many steps: what is left is
lag, without the bias of a short average. `log2_z` and `log2_z_corrected` are their logarithms, 0
where the running average is as far off as a mini-batch's mean (nan where it is not off). And for
`first` and `last`, channel 0 of the first and of the last norm, in the units of the activations:
`ema`, `population`, `batch_p05`, `batch_p50` and `batch_p95` (percentiles of the batch means).

The batches are independent draws whatever the order of training, and the network is in eval mode
but for its statistics: no dropout. Before the first step (epoch 0) nothing can be corrected, and
`z_corrected` is z. Channels whose batch means do not vary are left out of the medians.

Source: Wu & Johnson (2021), section 3 and figure 2.
"""

from collections.abc import Iterator
from itertools import count
from math import log2, nan

import torch
from torch import Tensor

from normlab.norms.base import BatchStatistics, PopulationNorm
from normlab.population import estimate
from normlab.probes.base import Context, averaging_layers, check_averages

__all__ = ["check", "measure"]

BATCHES = 100
"""Mini-batches, as in the paper's figure."""


def check(context: Context) -> None:
    """Refuse a network without population statistics that move, or with several in a layer, and a
    training set that is smaller than a normalization batch."""
    check_averages(context)
    nbs, images = context.plan.nbs, context.data.size("train")
    if nbs is not None and nbs > images:
        raise ValueError(f"draws batches of nbs={nbs}, and there are {images} training images")


def measure(context: Context) -> dict[str, float]:
    """The quantities of the module's description, by name."""
    layers = averaging_layers(context)
    with context.autocast():
        populations = [
            estimate(context.model, [x], estimator="pooled", group_size=len(x), group="alone")
            for x in _batches(context)
        ]
    means = [torch.stack([p[name].mean for p in populations]) for name in _names(layers)]
    running = [_running(layer) for layer in layers.values()]
    corrected = [_corrected(layer, context) for layer in layers.values()]
    measured: dict[str, float] = {}
    for quantity, averages in (("z", running), ("z_corrected", corrected)):
        misses = map(_misses, averages, means)
        z = float(torch.cat([*misses]).quantile(0.5))
        measured |= {quantity: z, f"log2_{quantity}": log2(z) if z > 0 else nan}
    for place, layer in (("first", 0), ("last", -1)):
        batch = means[layer][:, 0]
        measured[f"{place}_ema"] = float(running[layer][0])
        measured[f"{place}_population"] = float(batch.mean())
        for percent in (5, 50, 95):
            measured[f"{place}_batch_p{percent:02}"] = float(batch.quantile(percent / 100))
    return measured


def _names(layers: dict[str, PopulationNorm]) -> list[str]:
    """By which names a `Population` has them."""
    return [name + key for name, layer in layers.items() for key in layer.populations()]


def _running(layer: PopulationNorm) -> Tensor:
    ((mean, _),) = layer.populations().values()
    return mean.double()


def _batches(context: Context) -> Iterator[Tensor]:
    """Normalization batches of training images, from as many passes as they take."""
    nbs = context.plan.nbs
    assert nbs is not None, "a norm with population statistics has an NBS"
    made = 0
    for order in count():
        for x, _ in context.batches("train", nbs, order=order, augment=True):
            yield x
            made += 1
            if made == BATCHES:
                return


def _misses(average: Tensor, means: Tensor) -> Tensor:
    """|average - population| / std(batch means) of the channels (C,) whose means (100, C) vary."""
    deviation = means.std(0)
    varies = deviation > 0
    return (average - means.mean(0)).abs()[varies] / deviation[varies]


def _corrected(layer: PopulationNorm, context: Context) -> Tensor:
    """The running mean without what it still holds of its initial value, 0."""
    left = _kept(layer, context) ** int(layer.num_batches_tracked)
    return _running(layer) / (1 - left) if left < 1 else _running(layer)


def _kept(layer: PopulationNorm, context: Context) -> float:
    """What an updating forward leaves of a mean: a step of the layer's own rule towards 0."""
    if getattr(layer, "cumulative", False):
        return 0.0  # the first forward leaves nothing
    nbs = context.plan.nbs or context.plan.micro_batch
    nothing = torch.zeros(max(1, context.plan.micro_batch // nbs), 1, dtype=torch.float64)
    mean, var = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    layer.ema_step(mean, var, BatchStatistics(nothing, nothing, count=2), layer.decay)
    return float(mean)
