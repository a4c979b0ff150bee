"""Evaluation protocols: which statistics one trained network is tested with.

``normlab.protocols`` defines and reads the protocols. Sums are taken over samples and divided once.
Evaluating changes neither the model nor any global random state.

Several ranks evaluate together: each has its share of the samples, of which none is counted twice,
and all get the same row. What shares statistics is dealt whole, and augmented as one process would.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from normlab import dist
from normlab.adversarial import adversary
from normlab.data.base import Dataset, half
from normlab.domains import CLEAN, Domain
from normlab.norms.base import normalization, population_layers, refuse_strangers
from normlab.norms.separate import domains, in_turn, num_domains
from normlab.orders import SHUFFLED, Order
from normlab.population import (
    EmaBank,
    Estimator,
    Population,
    check_layerwise,
    estimate,
    using,
)
from normlab.protocols import EACH, ORDERS, TRAINED, Protocol

PRECISE_SAMPLES = 10_000
"""How many training images estimate population statistics, as in the paper's figures."""

_ESTIMATORS: dict[str, Estimator] = {
    "adapted": "pooled",
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
    SGD batch (for sorted ones), ``order`` and ``domains`` those that it is trained in, ``bank`` the
    tracked EMA bank if there is one, and ``tick`` is called once a batch: it may raise to stop
    (among several ranks it must not: others wait).
    Every rank makes one, of the same model, and calls it alike.
    """

    model: nn.Module
    data: Dataset
    nbs: int | None
    seed: int
    device: torch.device
    batch_size: int = 0
    order: Order = SHUFFLED
    domains: tuple[Domain, ...] = (CLEAN,)
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
        if protocol.shift == EACH:
            rows = [self.run(one) for one in protocol.of_each(self.domains)]
            n = sum(one["n"] for one in rows)
            means = {k: sum(one["n"] * one[k] for one in rows) / n for k in ("error", "loss")}
            return rows[0] | row | {"n": n} | means
        has_population = self._has_population()
        with ExitStack() as stack:
            stack.enter_context(self._known(_domain(protocol.shift)))
            if has_population and protocol.statistics == "batch":
                batch = self._batch(protocol)
                row |= {"batch": batch, "order": protocol.order}
                stack.enter_context(
                    normalization(self.model, statistics="batch", update=False, group_size=batch)
                )
                pattern = self._pattern(protocol)
                return row | self._score(
                    self._groups(
                        protocol.split, batch, protocol.order, pattern=pattern,
                        **_counted(protocol),
                    ),
                    protocol,
                )  # fmt: skip
            if has_population and protocol.estimated:
                batch, samples = self._batch(protocol), self._samples(protocol)
                row |= {"batch": batch, "samples": samples, "order": protocol.order}
                stack.enter_context(using(self.model, self._population(protocol, batch, samples)))
            elif has_population and protocol.decay is not None:
                assert self.bank is not None, "check() has seen to it"
                held = self.bank.population(protocol.decay, corrected=protocol.corrected)
                stack.enter_context(using(self.model, held))
            stack.enter_context(self._on_population())
            batches = self.data.eval_batches(
                protocol.split, batch_size=_BLOCK, order=None, share=dist.place(),
                device=self.device, channels_last=self.channels_last, **_counted(protocol),
            )  # fmt: skip
            return row | self._score(batches, protocol)

    def precise(self) -> Population:
        """The population statistics that the protocol ``precise`` tests with."""
        protocol = Protocol("train", "precise")
        self.check(protocol)
        return self._population(protocol, self._batch(protocol), self._samples(protocol))

    def check(self, protocol: Protocol) -> None:
        """Refuse what cannot be evaluated, before anything is trained for it.

        Raises ValueError for a batch larger than what it is taken from, for an untracked decay, for
        batch norms of torch's, for layers that cannot be measured layer by layer, for images that
        the data set does not show so or of a domain that the layers do not know, and for precise
        statistics of domains whose images are made for statistics.
        """
        if protocol.shift == EACH:
            for one in protocol.of_each(self.domains):
                self.check(one)
            return
        self.data.size(protocol.split)  # one that the data set does not have
        decays = self.bank.decays if self.bank else ()
        if protocol.decay is not None and protocol.decay not in decays:
            raise ValueError(f"evals: '{protocol}' needs ema_bank=[{protocol.decay}]")
        try:
            self._check_domains(protocol)
            if not self._has_population() or protocol.statistics in ("augmented", "ema"):
                return
            refuse_strangers(self.model, "chosen")
            if protocol.statistics == "precise_layerwise":
                check_layerwise(self.model)
        except ValueError as error:
            raise ValueError(f"evals: '{protocol}': {error}") from None
        available = self._available(protocol)
        split = "train" if protocol.statistics.startswith("precise") else protocol.split
        if protocol.samples is not None:
            if protocol.samples > available:
                raise ValueError(f"evals: '{protocol}': {split} has {available} images")
            available = protocol.samples
        if self._pattern(protocol) != SHUFFLED:
            self._check_pattern(protocol)
        if self._batch(protocol) > available:
            raise ValueError(
                f"evals: '{protocol}' takes batches of {self._batch(protocol)}, and {split} "
                f"offers {available}: write /batch:<n>, or choose a smaller nbs"
            )

    def _check_domains(self, protocol: Protocol) -> None:
        """Refuse images that cannot be shown, or whose domain the layers would have to know."""
        evaluated = _domain(protocol.shift)
        named = {evaluated, *self._of_statistics(protocol)}
        for domain in named if num_domains(self.model) > 1 else ():
            if domain not in self.domains:
                known = ", ".join(map(str, self.domains))
                raise ValueError(f"the run has no statistics of {domain}, only of {known}")
        several = len(self._of_statistics(protocol))
        if several > 1 and self._has_population():
            if any(domain.adversarial for domain in self.domains):
                raise ValueError("no precise statistics of images that are made for statistics")
            if self._batch(protocol) % several:
                raise ValueError(f"a batch must be a multiple of the {several} domains")
        if evaluated.adversarial:
            self.data.extremes()
        for domain in named:
            self.data.check_domains([domain])

    def _of_statistics(self, protocol: Protocol) -> tuple[Domain, ...]:
        """How the images look, in turn, of which statistics are estimated; () if none are."""
        if protocol.statistics == "adapted":
            return (_domain(protocol.stats or protocol.shift),)
        if protocol.estimated:
            return self.domains if protocol.stats is None else (_domain(protocol.stats),)
        return ()

    def _available(self, protocol: Protocol) -> int:
        """The images of which an evaluation can form batches with statistics of their own."""
        if protocol.statistics.startswith("precise"):
            size, several = self.data.size("train"), len(self._of_statistics(protocol))
            return size - size % several
        size = self.data.size(protocol.split)
        if protocol.statistics == "adapted":
            return len(half(size, 0))
        return size if protocol.shift is None else len(half(size, 1))

    def _known(self, domain: Domain) -> AbstractContextManager[None]:
        """Tell layers that have statistics or weights of each domain which one is shown."""
        if num_domains(self.model) == 1:
            return nullcontext()
        return domains(self.model, self.domains.index(domain))

    def _check_pattern(self, protocol: Protocol) -> None:
        """Refuse a pattern that its batches would cut in pieces, or that the labels do not allow.

        A sorted SGD batch is cut into them; whole groups of labels fill them.
        """
        batch, pattern = self._batch(protocol), self._pattern(protocol)
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
                pattern=pattern, within=self._within(pattern, batch), **_counted(protocol),
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
        """Images that estimate population statistics, whole groups of them."""
        samples = min(protocol.samples or PRECISE_SAMPLES, self._available(protocol))
        return samples - samples % self._batch(protocol)

    def _population(self, protocol: Protocol, batch: int, samples: int) -> Population:
        shown = self._of_statistics(protocol)
        adapted = protocol.statistics == "adapted"
        split, part = (protocol.split, 0) if adapted else ("train", None)
        key = (protocol.statistics, split, shown, batch, samples, protocol.order)
        if key in self._populations:
            return self._populations[key]

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            groups = self._groups(
                split, batch, protocol.order, samples, augment=not adapted, part=part,
                domains=shown,
            )  # fmt: skip
            return self._shown(groups, protocol)

        turning = in_turn(self.model, len(shown))
        network = turning or self.model
        with self._autocast(), nullcontext() if turning else self._known(shown[0]):
            self._populations[key] = estimate(
                self.model,
                _Anew(batches),
                estimator=_ESTIMATORS[protocol.statistics],
                group_size=batch,
                forward=lambda _, given: network(given[0]),
            )
        return self._populations[key]

    def _pattern(self, protocol: Protocol) -> Order:
        """How images come together in the batches of an evaluation."""
        if protocol.pattern == TRAINED:
            return self.order
        return Order.parse(protocol.pattern or "shuffled")

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
        **images: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's whole groups of ``batch`` samples, several a forward; a last partial one is
        dropped. images: which ones, and how they look (``part`` and ``domains`` of a data set).
        """
        waiting: list[tuple[Tensor, Tensor]] = []
        for read in self.data.eval_batches(
            split, batch_size=_BLOCK, samples=samples,
            order=self.seed * ORDERS + order,  # every seed has orders of its own
            share=dist.place(), unit=batch,
            augment=augment, device=self.device, channels_last=self.channels_last,
            pattern=pattern, within=self._within(pattern, batch), **images,
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
        attack = adversary(self.model, [_domain(protocol.shift)], self.data)
        try:
            for x, y in self._shown(batches, protocol):
                with self._autocast():
                    x = attack(x, y) if attack else x
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


def _domain(name: str | None) -> Domain:
    """How images look that a protocol names so; without a name, as they are."""
    return CLEAN if name is None else Domain.parse(name)


def _counted(protocol: Protocol) -> dict[str, Any]:
    """Which images an evaluation counts and how they look, as a data set takes it."""
    return {} if protocol.shift is None else {"part": 1, "domains": (_domain(protocol.shift),)}
