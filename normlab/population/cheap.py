"""A running average with the weights fixed: "cheap" precise statistics."""

import torch

from normlab.norms.base import BatchStatistics, PopulationNorm
from normlab.population.values import Statistics

__all__ = ["Cheap"]


class Cheap:
    """The buffers that a layer would have after its forwards, had each updated them.

    r_t = l_t r_(t-1) + (1 - l_t) b_t at the t-th forward, b_t by the layer's own rule
    (`PopulationNorm.ema_step`), in float64. `decay` None: l_t = 1 - 1/t, the plain average over the
    forwards, of which the first forgets r_0. Else l_t = decay, and r_0, the layer's buffers, keeps
    the weight decay^T.
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
        self._forwards += 1
        self._count += batch.count * batch.mean.size(0)
        decay = 1 - 1 / self._forwards if self._decay is None else self._decay
        self._layer.ema_step(self._mean, self._var, batch, decay)

    def result(self) -> Statistics | None:
        """The average, or None without a forward."""
        if self._forwards == 0:
            return None
        return Statistics(self._mean, self._var, self._count)
