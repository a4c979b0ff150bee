"""A model's forwards under chosen statistics: scored, and watched where asked.

The user's model is copied and its norms become normlab's, whose choices can be set from outside:
the model itself stays as it is, to the bit.
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from normlab.diagnose.thresholds import CHANCE
from normlab.norms.base import PopulationNorm, normalization, population_layers
from normlab.population import Population, using
from normlab.subject import Score, Scoring
from normlab.surgery import convert

__all__ = ["Forwards", "Losses", "Watch", "half", "rows", "size_of", "take"]

Watch = Callable[[str, Tensor], None]
"""Called with a layer's name and its input in every forward."""


@dataclass
class Losses:
    """Loss and error of one pass, batch by batch: three numbers each."""

    n: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, scored: Score) -> None:
        self.n.append(scored.n)
        self.losses.append(math.nan if scored.loss_sum is None else float(scored.loss_sum))
        self.errors.append(math.nan if scored.error_sum is None else float(scored.error_sum))

    def extend(self, other: "Losses") -> None:
        """Include another pass."""
        self.n += other.n
        self.losses += other.losses
        self.errors += other.errors

    @property
    def samples(self) -> int:
        return sum(self.n)

    @property
    def loss(self) -> float:
        """Mean loss of a sample; NaN without labels, and where the model's outputs are."""
        return sum(self.losses) / self.samples if self.n else math.nan

    @property
    def error(self) -> float:
        """Share of samples that are wrong, in [0, 1]; NaN without labels."""
        return sum(self.errors) / self.samples if self.n else math.nan

    def excess(self, other: "Losses") -> tuple[float, float]:
        """The loss above `other`'s on the same batches, and its standard error over the batches."""
        return self._excess(self.losses, other.losses)

    def _excess(self, mine: list[float], others: list[float]) -> tuple[float, float]:
        total = self.samples
        each = [a - b for a, b in zip(mine, others, strict=True)]
        mean = sum(each) / total
        if len(each) < 2:
            return mean, math.inf
        left = sum((d - mean * n) ** 2 for d, n in zip(each, self.n, strict=True))
        return mean, math.sqrt(left * len(each) / (len(each) - 1)) / total

    def more_errors_than(self, other: "Losses") -> bool:
        """Whether the error is above `other`'s by more than its scatter over the batches."""
        if math.isnan(self.error) or math.isnan(other.error):
            return False
        return self._is_above(*self._excess(self.errors, other.errors))

    def beyond_chance(self, other: "Losses") -> bool:
        """Whether the loss is above `other`'s by more than its scatter over the batches.

        As a difference or, where a few batches have most of it, as a factor.
        """
        if math.isnan(other.loss):
            return False
        if math.isnan(self.loss):
            return True
        if self._is_above(*self.excess(other)):
            return True
        if min(self.losses + other.losses) <= 0 or self.loss == math.inf:
            return False
        logs = [
            [n * math.log(loss / n) for loss, n in zip(one, self.n, strict=True)]
            for one in (self.losses, other.losses)
        ]
        return self._is_above(*self._excess(*logs))

    def _is_above(self, mean: float, error: float) -> bool:
        """Whether a mean over the batches with this standard error is above 0 beyond CHANCE."""
        return len(self.n) > 1 and mean > error * float(student.isf(CHANCE, len(self.n) - 1))


def size_of(batch: Any) -> int:
    """The samples of a batch: the first dimension of its first tensor.

    Raises ValueError for a batch without a tensor.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.size(0)
    raise ValueError(f"a batch holds no tensor with samples: {type(batch).__name__}")


def half(place: int) -> int:
    """Which of two halves the batch at this place is of: its binary digits' sum, even or odd.

    The Thue-Morse sequence, 0110 1001 ...: both halves have as many of any batches in turn.
    """
    return place.bit_count() % 2


def take(batch: Any, places: Tensor | slice) -> Any:
    """These samples of a batch: of every tensor in it that has as many rows as it has samples."""
    size = size_of(batch)

    def one(leaf: Any) -> Any:
        rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == size
        return leaf[places] if rows else leaf

    return pytree.tree_map(one, batch)


def rows(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    """The first batches, until they hold `samples`; the last one cut to fit."""
    left = samples
    for batch in batches:
        size = size_of(batch)
        yield batch if size <= left else take(batch, slice(left))
        left -= size
        if left <= 0:
            return


class Forwards:
    """Runs a copy of `model` under stored, batch or given statistics, one bar over all forwards.

    layers: its batch norms by name, those with statistics of their own or without (untracked).
    kept: names of layers that hold running statistics and are of no class that can be converted;
    they stay as they are.
    """

    def __init__(self, model: nn.Module, scoring: Scoring, *, progress: bool) -> None:
        self.model = _own(model)
        self.layers: dict[str, PopulationNorm] = population_layers(self.model)
        self.scoring = scoring
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.bar = tqdm(
            desc="diagnose", unit="batch", total=0, leave=False, disable=None if progress else True
        )

    @property
    def estimated(self) -> dict[str, PopulationNorm]:
        """The layers whose statistics an estimate may replace: those that are not frozen."""
        return {name: layer for name, layer in self.layers.items() if not layer.frozen}

    def expect(self, batches: int) -> None:
        """Tell the bar of so many further forwards."""
        self.bar.total = (self.bar.total or 0) + batches
        self.bar.refresh()

    @torch.no_grad()
    def run(
        self,
        batches: Iterable[Any],
        *,
        statistics: Population | Sequence[Population] | None = None,
        batch: bool = False,
        group_size: int | None = None,
        watch: Watch | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> Losses:
        """Score a pass: with the stored statistics, given ones, or those of each batch.

        statistics: of two, the one of a batch's `half`.
        group_size: with `batch`, the samples that share one set; a rest that it does not divide
        is left out. after: called with every batch when it is done.
        """
        found = Losses()
        self.model.eval()
        given = [statistics] if isinstance(statistics, Mapping) else statistics or []
        with ExitStack() as restore:
            if given:
                restore.enter_context(
                    normalization(self.model, statistics="population", update=False)
                )
            elif batch:
                restore.enter_context(normalization(self.model, statistics="batch", update=False))
            if watch is not None:
                restore.enter_context(_watched(self.layers, watch))
            for turn, one in enumerate(batches):
                ready, groups = self._grouped(one, group_size) if batch else (one, None)
                self.bar.update()
                if ready is None:
                    continue
                with ExitStack() as chosen:
                    if given:
                        chosen.enter_context(using(self.model, given[half(turn) % len(given)]))
                    chosen.enter_context(normalization(self.model, group_size=groups))
                    outputs = self.scoring.forward(self.model, ready)
                found.add(self.scoring.score(outputs, ready))
                if after is not None:
                    after(ready)
        return found

    @staticmethod
    def _grouped(batch: Any, group_size: int | None) -> tuple[Any, int | None]:
        size = size_of(batch)
        if group_size is None or group_size >= size:
            return batch, None
        whole = size - size % group_size
        return (batch if whole == size else take(batch, slice(whole))), group_size

    def eps(self, eps: float | Mapping[str, float]) -> None:
        """Give every layer this eps, or each its own."""
        for name, layer in self.layers.items():
            layer.eps = eps if isinstance(eps, float) else eps[name]


@contextmanager
def _watched(layers: Mapping[str, PopulationNorm], watch: Watch) -> Iterator[None]:
    handles = []
    for name, layer in layers.items():

        def hook(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            watch(name, inputs[0])

        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(model: nn.Module) -> nn.Module:
    """A copy in eval() whose batch norms are normlab's."""
    mine = copy.deepcopy(model).eval()
    for module in mine.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # torch takes what normlab's norm refuses, and neither matters where nothing is updated.
            module.momentum = module.momentum if module.momentum else 0.1
            module.eps = module.eps if module.eps > 0 else 1e-12
            if module.momentum > 1 or module.momentum < 0:
                module.momentum = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of small decays, which a finding of its own is about
        if any(_is_foreign(name, module) for name, module in mine.named_modules()):
            mine = convert(mine, "bn", only=_is_foreign, unknown="keep")
    return mine


def _is_foreign(_: str, module: nn.Module) -> bool:
    """Whether this is a batch norm, frozen or not, whose choices cannot be set from outside."""
    running = module._buffers.get("running_mean") is not None
    of_batches = isinstance(module, nn.modules.batchnorm._BatchNorm) or running
    return of_batches and not isinstance(module, PopulationNorm)
