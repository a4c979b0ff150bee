"""Running averages with further decays, beside each layer's own, during one training."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normlab import dist
from normlab.norms.base import BatchStatistics, PopulationNorm, population_layers
from normlab.population.values import Population, Statistics

__all__ = ["EmaBank"]


class EmaBank:
    """Running averages with further decays, beside each layer's own, during one training.

    For every decay d and layer: r = d r + (1 - d) b at each forward that moves the layer's own
    buffers, b by the layer's own rule (`PopulationNorm.ema_step`), from the buffers' values at
    construction on, in float64. After T steps batch t weighs (1 - d) d^(T-t) and the initial value
    d^T, of which an average can be corrected. With the layer's own decay the bank follows its
    buffers up to their float32 rounding. Watching changes nothing in the training, to the bit.

    A layer is who has its name in `model`: what `normlab.convert` puts there is followed on, by its
    own rule. Only a `model` that is itself a norm cannot change: attach the bank to what convert
    returns.

    Raises ValueError for decays that repeat or lie outside [0, 1).
    """

    def __init__(self, model: nn.Module, decays: Iterable[float]) -> None:
        self.decays = tuple(float(decay) for decay in decays)
        for decay in self.decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_bank: a decay must be in [0, 1), not {decay}")
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"ema_bank: decays repeat: {list(self.decays)}")
        self._model = model
        self._names = list(population_layers(model))
        self._count: dict[str, int] = {}
        self._mean: dict[str, Tensor] = {}
        self._var: dict[str, Tensor] = {}
        self._initial: dict[str, tuple[Tensor, Tensor]] = {}
        self._left: dict[str, Tensor] = {}  # what the initial value weighs, by decay
        self._observers: dict[str, Callable[[BatchStatistics], None]] = {}
        for name, layer in population_layers(model).items():
            rows = (len(self.decays), 1)
            for key, (mean, var) in layer.populations().items():
                self._count[name + key] = 0
                self._mean[name + key] = mean.detach().double().repeat(rows)
                self._var[name + key] = var.detach().double().repeat(rows)
                self._initial[name + key] = (
                    mean.detach().to(torch.float64, copy=True),
                    var.detach().to(torch.float64, copy=True),
                )
                self._left[name + key] = self._mean[name + key].new_ones(rows)
            self._observers[name] = partial(self._follow, name)
            layer.observers.append(self._observers[name])

    def _layer(self, name: str) -> PopulationNorm:
        """The layer that has the name now, with the populations it had."""
        layer = self._model.get_submodule(name)
        if not isinstance(layer, PopulationNorm) or not all(
            name + key in self._count for key in layer.populations()
        ):
            raise ValueError(
                f"ema_bank: {name or 'the model'} no longer is the batch norm that it was, nor one "
                "with the same populations: make the bank after the model's layers are final"
            )
        return layer

    def _follow(self, name: str, batch: BatchStatistics) -> None:
        layer = self._layer(name)
        if not layer.updates:  # an evaluation with batch statistics, not training
            return
        key = name + batch.population
        # What a rule keeps of an average is what a step towards 0 leaves of 1: not every rule keeps
        # the decay (`norms.ghost`, population="sequential").
        zeros = torch.zeros_like(batch.mean[:, :1], dtype=torch.float64)
        nothing = BatchStatistics(zeros, zeros, batch.count)
        rows = zip(self.decays, self._mean[key], self._var[key], self._left[key], strict=True)
        for decay, mean, var, left in rows:
            layer.ema_step(mean, var, batch, decay)
            layer.ema_step(left, left.clone(), nothing, decay)
        self._count[key] += batch.count * batch.mean.size(0)

    def population(self, decay: float, *, corrected: bool = False) -> Population:
        """The averages with `decay`; `corrected`: without what is left in them of the start.

        With w what the initial value r_0 weighs, d^T after T updates by any rule that keeps d, a
        corrected average is (r_T - w r_0) / (1 - w): batch t weighs (1 - d) d^(T-t) / (1 - d^T).
        A variance that rounding takes below 0 is 0.

        Layers that have not been updated yet are absent, and those that have been frozen since:
        theirs are constants.

        Raises ValueError for a decay that the bank does not follow.
        """
        if decay not in self.decays:
            raise ValueError(f"ema_bank has the decays {list(self.decays)}, not {decay}")
        row = self.decays.index(decay)
        names = [
            name + key
            for name in self._names
            if not (layer := self._layer(name)).frozen
            for key in layer.populations()
        ]
        return {
            name: self._statistics(name, row, corrected) for name in names if self._count[name] > 0
        }

    def _statistics(self, name: str, row: int, corrected: bool) -> Statistics:
        mean, var = self._mean[name][row].clone(), self._var[name][row].clone()
        left = self._left[name][row]
        if corrected and left < 1:  # a decay of 1 - 1e-13 is one of 1, and moves nothing
            initial_mean, initial_var = self._initial[name]
            mean = (mean - left * initial_mean) / (1 - left)
            var = ((var - left * initial_var) / (1 - left)).clamp_(min=0)
        return Statistics(mean, var, self._count[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings only (loads with weights_only=True)."""
        return {
            "decays": list(self.decays),
            "layers": {
                name: {
                    "count": count,
                    "mean": self._mean[name].clone(),
                    "var": self._var[name].clone(),
                    "left": self._left[name].clone(),
                    "initial": [value.clone() for value in self._initial[name]],
                }
                for name, count in self._count.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError if it is of other decays or layers, or of a
        version that did not keep what an average is corrected by."""
        if tuple(state["decays"]) != self.decays:
            raise ValueError(
                f"ema_bank has the decays {list(self.decays)}, the state {state['decays']}"
            )
        shapes = {name: values["mean"].shape for name, values in state["layers"].items()}
        if shapes != {name: mean.shape for name, mean in self._mean.items()}:
            raise ValueError("ema_bank: the state is of a model with other layers")
        if not all("left" in values for values in state["layers"].values()):
            raise ValueError(
                "ema_bank: the state is of an older version, which did not keep what is left of "
                "the initial statistics: train the run anew"
            )
        for name, values in state["layers"].items():
            self._count[name] = values["count"]
            self._mean[name].copy_(values["mean"])
            self._var[name].copy_(values["var"])
            self._left[name].copy_(values["left"])
            for own, value in zip(self._initial[name], values["initial"], strict=True):
                own.copy_(value)

    def average(self, how: dist.How) -> None:
        """Make the averages of all ranks the same, as `dist.average_statistics` does the layers'.

        Every rank must call it. Layers that are synchronized have them the same already.
        """
        counts = {
            name: torch.tensor(count, dtype=torch.float64) for name, count in self._count.items()
        }
        layers: list[dist.Statistic] = [
            (self._mean[name], self._var[name], counts[name]) for name in counts
        ]
        # What is left of the start is averaged as the means are; it has no spread of its own.
        layers += [(left, torch.zeros_like(left), None) for left in self._left.values()]
        dist.average_statistics(layers, how=how, device=dist.home(self._model))
        self._count = {name: int(count) for name, count in counts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """All that moves, by name: what one rank has and another may have otherwise."""
        counts = {f"{name}.count": torch.tensor(count) for name, count in self._count.items()}
        moving = (("mean", self._mean), ("var", self._var), ("left", self._left))
        return counts | {
            f"{name}.{kind}": tensor for kind, held in moving for name, tensor in held.items()
        }

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` gave."""
        for name in self._count:
            self._count[name] = int(state[f"{name}.count"])
            self._mean[name].copy_(state[f"{name}.mean"])
            self._var[name].copy_(state[f"{name}.var"])
            self._left[name].copy_(state[f"{name}.left"])

    def detach(self) -> None:
        """Stop watching; the averages stay. Further calls do nothing."""
        for name, observer in self._observers.items():
            layer = self._model.get_submodule(name)
            if isinstance(layer, PopulationNorm):
                layer.observers = [other for other in layer.observers if other is not observer]
        self._observers = {}
