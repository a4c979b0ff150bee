"""A running average with the weights fixed: "cheap" precise statistics."""

import torch
from torch import Tensor

from normlab.norms.base import BatchStatistics, PopulationNorm
from normlab.population.accumulate import split
from normlab.population.values import Statistics

__all__ = ["Cheap"]


class Cheap:
    """A running average over a layer's forwards, by the layer's own rule (`ema_step`), in float64.

    - `decay` None: (b_1 + ... + b_T) / T, the plain average over the forwards, where b_t is what
      the rule moves towards: r' = k r + (1 - k) b_t, with the layer's own decay. Nothing is left of
      the layer's buffers, and the order of the forwards does not matter: several ranks' averages
      merge, weighted by their forwards.
    - Else the buffers that the layer would have after its forwards, had each updated them with this
      decay: r_0, its buffers now, keeps the weight decay^T.
    """

    def __init__(self, layer: PopulationNorm, decay: float | None, population: str = "") -> None:
        self._layer = layer
        self._decay = decay
        self._forwards = 0
        self._count = 0
        mean, var = layer.populations()[population]
        self._mean = mean.detach().to(torch.float64, copy=True)
        self._var = var.detach().to(torch.float64, copy=True)

    def observe(self, batch: BatchStatistics) -> None:
        count = batch.count * batch.mean.size(0)
        if self._decay is None:
            self._include(*self._target(batch), 1, count)
        else:
            self._layer.ema_step(self._mean, self._var, batch, self._decay)
            self._forwards += 1
            self._count += count

    def _target(self, batch: BatchStatistics) -> tuple[Tensor, Tensor]:
        """b_t. A step from 0 is (1 - k) b_t, and one from 1 towards 0 is k."""
        mean, var = torch.zeros_like(self._mean), torch.zeros_like(self._var)
        self._layer.ema_step(mean, var, batch, self._layer.decay)
        kept = torch.ones_like(mean), torch.ones_like(var)
        nothing = BatchStatistics(torch.zeros_like(batch.mean), torch.zeros_like(batch.var), 2)
        self._layer.ema_step(*kept, nothing, self._layer.decay)
        return mean / (1 - kept[0]), var / (1 - kept[1])

    def _include(self, mean: Tensor, var: Tensor, forwards: int, count: int) -> None:
        """The average of so many forwards more."""
        if forwards == 0:
            return
        self._forwards += forwards
        self._count += count
        weight = forwards / self._forwards
        self._mean = mean if weight == 1 else self._mean + (mean - self._mean) * weight
        self._var = var if weight == 1 else self._var + (var - self._var) * weight

    def state(self) -> Tensor:
        numbers = self._mean.new_tensor([self._forwards, self._count])
        return torch.cat([numbers, self._mean, self._var])

    def load(self, states: Tensor) -> None:
        self._forwards = self._count = 0
        for (forwards, count), mean, var in split(states, 2, self._mean):
            self._include(mean, var, forwards, count)

    def result(self) -> Statistics | None:
        """The average, or None without a forward."""
        if self._forwards == 0:
            return None
        return Statistics(self._mean, self._var, self._count)
