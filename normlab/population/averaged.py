"""Averages of a training's weights (SWA, EMA of the weights), and what becomes of their buffers."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from normlab.population.estimators import Estimator, estimate
from normlab.population.together import Group
from normlab.population.values import apply

__all__ = ["AveragedWeights", "BufferPolicy"]

BufferPolicy = Literal["estimate", "average", "last"]


class AveragedWeights:
    """An average of `model`'s weights over the calls of `update`, kept beside the model.

    After T updates the weights are, in float64:

    - `decay` None: (w_1 + ... + w_T) / T, the plain average of SWA (Izmailov et al., 2018).
    - else: a_1 = w_1, a_t = decay a_(t-1) + (1 - decay) w_t, so that w_1 weighs decay^(T-1) and w_t
      (1 - decay) decay^(T-t). No initial value has to be forgotten.

    All parameters are averaged, a shared one once; one that does not train comes out bitwise as it
    is. Buffers belong to weights that saw data, which an average of weights never did: `model` asks
    what to do with them. Taking the average changes nothing in the model that is watched.

    Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, *, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.updates = 0
        self.decay = decay
        self._model = model
        self._averages: dict[str, Tensor] = {}

    def update(self) -> None:
        """Include the model's weights, and its floating-point buffers, as they are now."""
        self.updates += 1
        weight = 1 / self.updates if self.decay is None else 1 - self.decay
        for name, value in _floating(self._model).items():
            if self.updates == 1:
                self._averages[name] = value.detach().to(torch.float64, copy=True)
            else:
                average = self._averages[name]
                average += weight * (value.detach().to(torch.float64) - average)

    def model(
        self,
        *,
        buffers: BufferPolicy,
        batches: Iterable[Any] | None = None,
        estimator: Estimator = "pooled",
        forward: Callable[[nn.Module, Any], object] | None = None,
        group: Group = None,
    ) -> nn.Module:
        """A copy of the model with the averaged weights, rounded to their dtype.

        `buffers`, always to be chosen:

        - "estimate": population statistics of the averaged weights on `batches`
          (`normlab.population.estimate` with `estimator`, `forward` and `group`: by all ranks, if
          there are any), what the authors of SWA ask for. Other buffers, and those of frozen
          layers, as in "last".
        - "average": each floating-point buffer averaged as the weights are (timm's ModelEma). The
          averages of the variances leave out the spread of the means, and neither are statistics of
          what the averaged weights compute.
        - "last": the buffers of the model as it is now, those of other weights (the default of
          torch's AveragedModel).

        Raises ValueError before the first update, for an unknown policy, and for `batches` without
        "estimate" or the reverse.
        """
        if buffers not in get_args(BufferPolicy):
            raise ValueError(f"buffers is one of {get_args(BufferPolicy)}, not {buffers!r}")
        if (batches is not None) != (buffers == "estimate"):
            raise ValueError("batches belong to buffers='estimate', which needs them")
        if self.updates == 0:
            raise ValueError("there is no average before the first update")
        result = copy.deepcopy(self._model)
        parameters = dict(result.named_parameters())
        with torch.no_grad():
            for name, value in _floating(result).items():
                if name in parameters or buffers == "average":
                    value.copy_(self._averages[name])
        if batches is not None:
            found = estimate(result, batches, estimator=estimator, forward=forward, group=group)
            apply(result, found)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only (loads with weights_only=True)."""
        averages = {name: value.clone() for name, value in self._averages.items()}
        return {"decay": self.decay, "updates": self.updates, "averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError if it is of another decay or another model."""
        if state["decay"] != self.decay:
            raise ValueError(f"the decay is {self.decay}, that of the state {state['decay']}")
        current = _floating(self._model)
        shapes = {name: value.shape for name, value in state["averages"].items()}
        if state["updates"] and shapes != {name: value.shape for name, value in current.items()}:
            raise ValueError("the state is of a model with other weights")
        self.updates = state["updates"]
        self._averages = {
            name: value.to(current[name].device, torch.float64, copy=True)
            for name, value in state["averages"].items()
        }


def _floating(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name, a shared one once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value for name, value in named.items() if value.is_floating_point()}
