"""What a running average holds: how much of its initial value, and how old the rest is.

100 batches of which the t-th has the mean t in every channel (its values are t - 1 and t + 1) pass
through float64 copies of the network's first and last population norm, and two banks of averages
(`EmaBank`) follow them: one from the statistics that the training has left in the layer, one from 1
more. What the second has more in the end is the weight of the initial value; and since the average
of the batches' numbers is the number of the average batch, 100 minus the corrected mean is the mean
age of what it holds. For decays d = 0.9, 0.99 and 0.999, T = 100, with names that end in the
decay's digits (`weight_099`):

========================== =========================================================================
`weight`, `weight_closed`  what the initial value weighs, and d^T
`rest`                     what it weighs in the corrected average, of which nothing should be left
`age`, `age_closed`        the mean age of what the corrected average holds, in steps of which the
                           newest has 0, and d / (1 - d) - T d^T / (1 - d^T)
========================== =========================================================================

Of both layers, all channels, and mean and variance, the value that is furthest from its closed
form. No image is looked at: what is measured is the code that a run's averages go through.

Source: the talk "Devils in BatchNorm" (a large decay needs many iterations).
"""

import copy

import torch
from torch import Tensor, nn

from normlab.norms.base import normalization
from normlab.population import EmaBank, Population, ema_age
from normlab.probes.base import Context, averaging_layers, check_averages

__all__ = ["check", "measure"]

STEPS = 100
DECAYS = (0.9, 0.99, 0.999)


def check(context: Context) -> None:
    """Refuse a network without population statistics that move, with several in a layer, and with
    layers that keep another share of an average than its decay."""
    check_averages(context)
    for name, layer in averaging_layers(context).items():
        if getattr(layer, "population", None) == "sequential":
            raise ValueError(f"norm.population=sequential keeps more of {name} than its decay says")


def measure(context: Context) -> dict[str, float]:
    """The quantities of the module's description, by name."""
    found = [*averaging_layers(context).values()]
    copies = [copy.deepcopy(found[place]) for place in (0, -1)]
    layers = nn.ModuleList(copies).to("cpu", torch.float64)
    with torch.no_grad():
        bank = EmaBank(layers, DECAYS)
        for layer in copies:
            for mean, var in layer.populations().values():
                mean.add_(1)
                var.add_(1)
        above = EmaBank(layers, DECAYS)
        with normalization(layers, statistics="batch", update=True, group_size=2):
            for step in range(1, STEPS + 1):
                for layer in copies:
                    layer(_batch(layer.num_features, step))
    measured: dict[str, float] = {}
    for decay in DECAYS:
        name = str(decay).replace(".", "")
        corrected = bank.population(decay, corrected=True)
        left = _more(above.population(decay), bank.population(decay))
        rest = _more(above.population(decay, corrected=True), corrected)
        ages = STEPS - torch.cat([statistics.mean for statistics in corrected.values()])
        weight, age = decay**STEPS, ema_age(decay, STEPS, corrected=True)
        measured |= {
            f"weight_{name}": _furthest(left, weight),
            f"weight_closed_{name}": weight,
            f"rest_{name}": _furthest(rest, 0.0),
            f"age_{name}": _furthest(ages, age),
            f"age_closed_{name}": age,
        }
    return measured


def _batch(channels: int, step: int) -> Tensor:
    """Two groups of two samples, (4, C), each of mean `step`."""
    values = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    return (step + values).expand(4, channels)


def _more(one: Population, other: Population) -> Tensor:
    """By how much the statistics of one population are larger: of all layers and channels."""
    pairs = [(one[name], other[name]) for name in one]
    return torch.cat([t for a, b in pairs for t in (a.mean - b.mean, a.var - b.var)])


def _furthest(values: Tensor, closed: float) -> float:
    return float(values[(values - closed).abs().argmax()])
