"""The contract of a probe: a measurement of the network as training has left it after an epoch.

A module of this room has

    def measure(context: Context) -> dict[str, float]

which gives a number for each of its quantities (an identifier), and, where not every network or
data set will do, `check(context)`, which raises ValueError with what it needs: it is called before
anything is trained. A probe runs in a process that is alone. It leaves the model's parameters,
buffers, modes and settings and every generator as they were.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normlab.batchplan import BatchPlan
from normlab.data.base import Dataset
from normlab.norms.base import PopulationNorm, population_layers
from normlab.protocols import ORDERS

__all__ = ["Context", "averaging_layers", "check_averages"]


@dataclass(frozen=True)
class Context:
    """What a probe is given.

    model       the network, with the weights and the running averages of the epoch
    data        its data set
    plan        how its batches are formed
    epoch       0: before training
    """

    model: nn.Module
    data: Dataset
    plan: BatchPlan
    seed: int
    device: torch.device
    channels_last: bool
    precision: str
    epoch: int

    def batches(
        self,
        split: str,
        batch: int,
        *,
        samples: int | None = None,
        order: int = 0,
        augment: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole batches (x, y) of the first `samples` images of a split (None: all), in an order
        that seed and `order` (0..999) draw: the same after every epoch, and as an evaluation of
        that order has them. The remainder is dropped.

        Raises ValueError for an unknown split and for more images than it has.
        """
        return self.data.eval_batches(
            split, batch_size=batch, samples=samples, order=self.seed * ORDERS + order,
            augment=augment, drop_last=True, device=self.device, channels_last=self.channels_last,
        )  # fmt: skip

    def autocast(self) -> torch.autocast:
        """The precision that the network is trained in."""
        on = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)


def averaging_layers(context: Context) -> dict[str, PopulationNorm]:
    """The layers whose running averages move, by name."""
    found = population_layers(context.model)
    return {name: layer for name, layer in found.items() if not layer.frozen}


def check_averages(context: Context) -> None:
    """Refuse a network without running averages that move, or with several in a layer."""
    layers = averaging_layers(context)
    if not layers:
        raise ValueError("needs a norm with population statistics that move, as norm=bn has")
    for name, layer in layers.items():
        if len(layer.populations()) > 1:
            raise ValueError(f"looks at one running average a layer, and {name} has several")
