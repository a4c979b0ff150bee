"""Evaluation protocols: which statistics one trained network is tested with.

``normlab.protocols`` defines and reads the protocols. Sums are taken over samples and divided once.
Evaluating changes neither the model nor any global random state.

Several ranks evaluate together: each has its share of the samples, of which none is counted twice,
and all get the same row. What shares statistics is dealt whole, and augmented as one process would.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from normlab import dist
from normlab.data.base import Dataset
from normlab.norms.base import normalization, population_layers, refuse_strangers
from normlab.orders import SHUFFLED, Order
from normlab.population import (
    EmaBank,
    Estimator,
    Population,
    check_layerwise,
    estimate,
    using,
)
from normlab.protocols import ORDERS, Protocol

PRECISE_SAMPLES = 10_000
"""How many training images estimate population statistics, as in the paper's figures."""

_ESTIMATORS: dict[str, Estimator] = {
    "precise": "pooled",
    "precise_mean": "mean",
    "precise_layerwise": "layerwise",
}

_BLOCK = 512
"""Samples that are read, and where asked augmented, together: the same whatever the groups are."""


@dataclass(frozen=True)
class _Anew:
    """What `start` yields, from the start at every pass."""

    start: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.start()


@dataclass
class Evaluator:
    """Evaluates one model on one data set; remembers the population statistics it has estimated.

    ``nbs`` is the run's normalization batch size (None for norms without one), ``batch_size`` its
    SGD batch (for sorted ones), ``bank`` the tracked EMA bank if there is one, and ``tick`` is
    called once a batch: it may raise to stop (among several ranks it must not: others wait).
    Every rank makes one, of the same model, and calls it alike.
    """

    model: nn.Module
    data: Dataset
    nbs: int | None
    seed: int
    device: torch.device
    batch_size: int = 0
    channels_last: bool = False
    precision: str = "fp32"
    bank: EmaBank | None = None
    tick: Callable[[], None] = lambda: None
    _populations: dict[tuple[Any, ...], Population] = field(default_factory=dict)

    def run(self, protocol: Protocol) -> dict[str, Any]:
        """Evaluate: a row with protocol, split, statistics, batch, samples, order, n, error, loss.

        ``error`` in %, ``loss`` in nats per sample. Raises ValueError as ``check`` does.
        """
        self.check(protocol)
        row: dict[str, Any] = {
            "protocol": str(protocol),
            "split": protocol.split,
            "statistics": protocol.statistics,
        }
        has_population = self._has_population()
        if has_population and protocol.statistics == "batch":
            batch = self._batch(protocol)
            row |= {"batch": batch, "order": protocol.order}
            pattern = Order.parse(protocol.pattern or "shuffled")
            batches = self._groups(protocol.split, batch, order=protocol.order, pattern=pattern)
            with normalization(self.model, statistics="batch", update=False, group_size=batch):
                return row | self._score(batches, protocol)
        statistics: AbstractContextManager[Any] = nullcontext()
        if has_population and protocol.statistics.startswith("precise"):
            batch, samples = self._batch(protocol), self._samples(protocol)
            row |= {"batch": batch, "samples": samples, "order": protocol.order}
            statistics = using(self.model, self._population(protocol, batch, samples))
        elif has_population and protocol.decay is not None:
            assert self.bank is not None, "check() has seen to it"
            statistics = using(self.model, self.bank.population(protocol.decay))
        batches = self.data.eval_batches(
            protocol.split, batch_size=_BLOCK, order=None, share=dist.place(),
            device=self.device, channels_last=self.channels_last,
        )  # fmt: skip
        with statistics, self._on_population():
            return row | self._score(batches, protocol)

    def precise(self) -> Population:
        """The population statistics that the protocol ``precise`` tests with."""
        protocol = Protocol("train", "precise")
        self.check(protocol)
        return self._population(protocol, self._batch(protocol), self._samples(protocol))

    def check(self, protocol: Protocol) -> None:
        """Refuse what cannot be evaluated, before anything is trained for it.

        Raises ValueError for a batch larger than what it is taken from, for an untracked decay, for
        batch norms of torch's, and for layers that cannot be measured layer by layer.
        """
        decays = self.bank.decays if self.bank else ()
        if protocol.decay is not None and protocol.decay not in decays:
            raise ValueError(f"evals: '{protocol}' needs ema_bank=[{protocol.decay}]")
        if not self._has_population() or protocol.statistics in ("augmented", "ema"):
            return
        precise = protocol.statistics.startswith("precise")
        split = "train" if precise else protocol.split
        available = self.data.size(split)
        if protocol.samples is not None:
            if protocol.samples > available:
                raise ValueError(f"evals: '{protocol}': {split} has {available} images")
            available = protocol.samples
        if protocol.pattern:
            self._check_pattern(protocol)
        if self._batch(protocol) > available:
            raise ValueError(
                f"evals: '{protocol}' takes batches of {self._batch(protocol)}, and {split} "
                f"offers {available}: write /batch:<n>, or choose a smaller nbs"
            )
        try:
            refuse_strangers(self.model, "chosen")
            if protocol.statistics == "precise_layerwise":
                check_layerwise(self.model)
        except ValueError as error:
            raise ValueError(f"evals: '{protocol}': {error}") from None

    def _check_pattern(self, protocol: Protocol) -> None:
        """Refuse a pattern that its batches would cut in pieces, or that the labels do not allow.

        A sorted SGD batch is cut into them; whole groups of labels fill them.
        """
        batch, pattern = self._batch(protocol), Order.parse(str(protocol.pattern))
        if pattern.patterned and batch % pattern.group:
            raise ValueError(
                f"evals: '{protocol}': groups of {pattern.group} do not fill batches of {batch}"
            )
        if not pattern.patterned and self.batch_size % batch:
            raise ValueError(
                f"evals: '{protocol}': batches of {batch} do not fill batch_size={self.batch_size}"
            )
        try:
            self.data.eval_batches(
                protocol.split, batch_size=_BLOCK, order=0,
                pattern=pattern, within=self._within(pattern, batch),
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"evals: '{protocol}': {error}") from None

    def _on_population(self) -> AbstractContextManager[None]:
        """Population statistics, where layers that were made for others would not take them."""
        layers = population_layers(self.model).values()
        if any(layer.own.statistics == "batch" or layer.own.update for layer in layers):
            return normalization(self.model, statistics="population", update=False)
        return nullcontext()

    def _has_population(self) -> bool:
        """Whether any layer has statistics to choose; those of a frozen one are constants."""
        return any(not layer.frozen for layer in population_layers(self.model).values())

    def _batch(self, protocol: Protocol) -> int:
        """Samples that share one set of statistics in an evaluation: the run's NBS unless given."""
        batch = protocol.batch or self.nbs
        assert batch is not None, "a norm with population statistics has an NBS"
        return batch

    def _samples(self, protocol: Protocol) -> int:
        """Training images that estimate population statistics, whole groups of them."""
        samples = min(protocol.samples or PRECISE_SAMPLES, self.data.size("train"))
        return samples - samples % self._batch(protocol)

    def _population(self, protocol: Protocol, batch: int, samples: int) -> Population:
        key = (protocol.statistics, batch, samples, protocol.order)
        if key not in self._populations:

            def batches() -> Iterator[tuple[Tensor, Tensor]]:
                groups = self._groups("train", batch, protocol.order, samples, augment=True)
                return self._shown(groups, protocol)

            with self._autocast():
                self._populations[key] = estimate(
                    self.model,
                    _Anew(batches),
                    estimator=_ESTIMATORS[protocol.statistics],
                    group_size=batch,
                )
        return self._populations[key]

    def _within(self, pattern: Order, batch: int) -> int:
        """What is arranged at a time: an evaluation's batch, or the SGD batch that is sorted."""
        return batch if pattern.patterned else self.batch_size

    def _groups(
        self,
        split: str,
        batch: int,
        order: int,
        samples: int | None = None,
        augment: bool = False,
        pattern: Order = SHUFFLED,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's whole groups of ``batch`` samples, several a forward; a last partial one is
        dropped."""
        waiting: list[tuple[Tensor, Tensor]] = []
        for read in self.data.eval_batches(
            split, batch_size=_BLOCK, samples=samples,
            order=self.seed * ORDERS + order,  # every seed has orders of its own
            share=dist.place(), unit=batch,
            augment=augment, device=self.device, channels_last=self.channels_last,
            pattern=pattern, within=self._within(pattern, batch),
        ):  # fmt: skip
            waiting.append(read)
            held = sum(len(y) for _, y in waiting)
            if held < batch:
                continue
            x, y = (torch.cat(parts) for parts in zip(*waiting, strict=True))
            whole = held - held % batch
            yield x[:whole], y[:whole]
            waiting = [(x[whole:], y[whole:])]

    def _autocast(self) -> torch.autocast:
        on = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def _shown(
        self, batches: Iterator[tuple[Tensor, Tensor]], protocol: Protocol
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in tqdm(
            batches, desc=f"eval {protocol}", unit="batch", leave=False, disable=None
        ):
            self.tick()
            yield batch

    @torch.inference_mode()
    def _score(
        self, batches: Iterator[tuple[Tensor, Tensor]], protocol: Protocol
    ) -> dict[str, Any]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        wrong = torch.zeros((), dtype=torch.float64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        n = 0
        try:
            for x, y in self._shown(batches, protocol):
                with self._autocast():
                    logits = self.model(x)
                precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss += F.cross_entropy(precise, y, reduction="sum")
                wrong += (logits.argmax(1) != y).sum()
                n += len(y)
        finally:
            for module, training in modes.items():
                module.training = training
        n, wrong, loss = dist.stack(torch.stack([torch.full_like(loss, n), wrong, loss])).sum(0)
        return {"n": int(n), "error": 100 * wrong.item() / n.item(), "loss": loss.item() / n.item()}
