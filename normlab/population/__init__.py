"""Population statistics as a value: estimated, used during one evaluation, never left in a model.

The sources of the statistics that a batch norm tests with are protocols of evaluation of one
network: the running average it trained with (its buffers), averages with other decays (`EmaBank`),
or an estimate with fixed weights on any data (`estimate`: "precise" on training data, "adaptive" on
another domain's), made by all ranks together where there are several. `using` puts one into the
model for as long as an evaluation takes, `apply` for good, and `freeze` makes them constants of
what is left of a training. `AveragedWeights` averages a training's weights, with a named policy for
the statistics.
"""

from normlab.population.averaged import AveragedWeights, BufferPolicy
from normlab.population.bank import EmaBank
from normlab.population.ema import ema_age, ema_noise, ema_weights, iterations_needed
from normlab.population.estimators import Estimator, estimate
from normlab.population.freezing import FreezeAffine, freeze
from normlab.population.layerwise import check_layerwise
from normlab.population.values import Population, Statistics, apply, using

__all__ = [
    "AveragedWeights",
    "BufferPolicy",
    "EmaBank",
    "Estimator",
    "FreezeAffine",
    "Population",
    "Statistics",
    "apply",
    "check_layerwise",
    "ema_age",
    "ema_noise",
    "ema_weights",
    "estimate",
    "freeze",
    "iterations_needed",
    "using",
]
