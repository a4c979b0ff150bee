"""The training loop, top to bottom.

Data order and augmentation come from (seed, epoch, step), so the whole state of a run is its
weights, its optimizer, torch's generator (dropout) and its position: a run that is stopped
anywhere and resumed ends bit for bit where it would have.

With several ranks each takes its places of the same SGD batch, and what they share is said where it
is shared: gradients once a step, sums of losses where they are looked at, statistics and their
checks once an epoch. Between that, each rank has population statistics and a generator of its own.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from normlab import agreement, checkpoint, dist, parallel, schedule
from normlab.batchplan import BatchPlan
from normlab.data.base import Dataset
from normlab.domains import Domain
from normlab.orders import SHUFFLED, Order
from normlab.population import EmaBank

log = logging.getLogger(__name__)

LOOK_EVERY = 25
"""Steps between looks at the running loss: each look waits for a GPU."""

RANK_SEEDS = 2**40
"""Times its number, added to the seed, a rank's generator (dropout) is no other's."""

EXTRA_SEEDS = 2**31
"""Added to the seed, the order of forward-only images is no other run's order of training."""


class Diverged(Exception):
    """The loss is no longer a finite number; the message says when."""


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know besides its objects."""

    epochs: int
    lr: float
    """Peak learning rate after linear scaling."""
    seed: int
    device: torch.device
    schedule: dict[str, Any]
    """Keyword arguments of ``schedule.factor``."""
    order: Order = SHUFFLED
    domains: tuple[Domain, ...] = ()
    """How the images of a batch look, in turn; empty: as they are stored."""
    precision: str = "fp32"
    channels_last: bool = False
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""
    buffers: dist.How = "average"
    """What ranks make of their population statistics, see ``dist.average_statistics``."""


@dataclass
class Trainer:
    """One training run: objects, position and the history of its epochs."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Dataset
    plan: BatchPlan
    steps: int
    """Optimizer steps of an epoch."""
    settings: Settings
    path: Path
    """Where the checkpoint goes."""
    stop: checkpoint.Stop
    bank: EmaBank | None = None
    forward: nn.Module | None = None
    """What is called in place of ``model`` (a compiled twin); None: the model itself."""
    adversary: Callable[[Tensor, Tensor], Tensor] | None = None
    """Makes the images of adversarial domains, from those of a micro-batch and their labels."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    """The newest finite numbers: those to record when the run diverges."""
    _loss: Tensor = field(init=False)
    _wrong: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.world = dist.place()
        if self.world != self.plan.world_size:
            raise ValueError(
                f"world_size={self.plan.world_size}: this process is one of {self.world} ranks"
            )
        # From here on ranks draw apart; the weights they have drawn are the same.
        if self.rank > 0:
            torch.manual_seed(RANK_SEEDS * self.rank + self.settings.seed)
        self._network: nn.Module | None = None
        self._start_epoch()
        self._began = self._saved = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds this run has been at work, over all its starts."""
        return self.seconds + time.monotonic() - self._began

    @property
    def position(self) -> Tensor:
        """(epochs, steps of the next one) that are done."""
        return torch.tensor([self.epoch, self.step])

    # -- the loop ---------------------------------------------------------------------------------

    def network_changed(self) -> None:
        """Which parameters learn has changed: the ranks agree anew on gradients to average."""
        self._network = None

    def train_epoch(self) -> None:
        """Run the epoch's remaining steps and append its row to the history.

        Raises Diverged, and whatever the signal that asked to stop stands for, after saving.
        """
        started, first = time.monotonic(), self.step
        self.model.train()
        batches = self.data.train_batches(
            batch_size=self.plan.batch_size,
            seed=self.settings.seed,
            epoch=self.epoch,
            start_step=self.step,
            order=self.settings.order,
            places=self._places(),
            domains=self.settings.domains,
            device=self.settings.device,
            channels_last=self.settings.channels_last,
        )
        with (
            closing(self._extra_images()) as extras,
            tqdm(
                total=self.steps * self.plan.batch_size,
                initial=self.step * self.plan.batch_size,
                desc=f"epoch {self.epoch + 1}/{self.settings.epochs}",
                unit="img",
                leave=False,
                disable=True if self.rank > 0 else None,
            ) as bar,
        ):
            for x, y in batches:
                self._train_step(x, y, next(extras))
                bar.update(self.plan.batch_size)
                if self.step % LOOK_EVERY == 0 or self.step == self.steps:
                    row = self._row()
                    bar.set_postfix(
                        loss=f"{row['train_loss']:.3f}", error=f"{row['train_error']:.1f}%"
                    )
                self._save_if_due()
        elapsed = time.monotonic() - started
        row = self._row()
        log.info(
            "epoch %d: lr %.4g loss %.4f error %.2f %% %.0f img/s",
            row["epoch"], row["lr"], row["train_loss"], row["train_error"],
            (self.steps - first) * self.plan.batch_size / elapsed,
        )  # fmt: skip
        # The loss of a step comes before its update: the last updates have not been looked at.
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise Diverged(f"a weight is not finite after epoch {self.epoch + 1}")
        self._average_statistics()
        agreement.check_same(self._shared(), self.settings.device)
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self._start_epoch()

    def _extra_images(self) -> Generator[Tensor | None, None, None]:
        """The forward-only images of each step from the current one on, or None if it has none.

        They are augmented training images, in an order of their own, passed over again and again.
        """
        mine = self.plan.virtual_extra * self.plan.accumulation
        if mine == 0:
            yield from repeat(None)
        size = mine * self.world
        passing = self.data.size("train") // size
        at = self.epoch * self.steps + self.step
        while True:
            for x, _ in self.data.train_batches(
                batch_size=size,
                seed=self.settings.seed + EXTRA_SEEDS,
                epoch=at // passing,
                start_step=at % passing,
                places=range(mine * self.rank, mine * (self.rank + 1)),
                device=self.settings.device,
                channels_last=self.settings.channels_last,
            ):
                yield x
                at += 1

    def _train_step(self, x: Tensor, y: Tensor, extra: Tensor | None = None) -> None:
        """One optimizer step on this rank's part of an SGD batch, in micro-batches as planned.

        extra: as many forward-only images as the plan has for all its forward passes.
        """
        # Set the learning rate of this step.
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

        # Accumulate the gradient of the mean loss, one micro-batch at a time. The ranks' gradients
        # are averaged in the last backward pass: once a step.
        self.optimizer.zero_grad(set_to_none=True)
        size, count = self.plan.micro_batch, self.plan.accumulation
        besides = repeat(None, count) if extra is None else extra.split(self.plan.virtual_extra)
        parts = zip(x.split(size), y.split(size), besides, strict=True)
        for number, (part_x, part_y, beside) in enumerate(parts, start=1):
            together = part_x if beside is None else torch.cat([part_x, beside])
            with parallel.averaging(self._called(), number == count):
                self._accumulate(together, part_y, len(part_y) / len(y))

        # Update the weights.
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.step += 1

    def _accumulate(self, x: Tensor, y: Tensor, share: float) -> None:
        """Forward and backward of one micro-batch, of whose loss a share is the step's; images
        beyond the labels run forward only."""
        with self._autocast():
            x = self.adversary(x, y) if self.adversary else x
            logits = self._called()(x)
            logits = logits if len(logits) == len(y) else logits[: len(y)]
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(precise, y, label_smoothing=self.settings.label_smoothing)
        (loss * share).backward()
        self._loss += loss.detach() * len(y)
        self._wrong += (logits.detach().argmax(1) != y).sum()

    @property
    def lr(self) -> float:
        """The learning rate of the step at the current position."""
        s = self.settings
        at, total = self.epoch * self.steps + self.step, s.epochs * self.steps
        return s.lr * schedule.factor(at, total, **s.schedule)

    def _autocast(self) -> torch.autocast:
        on = self.settings.precision == "bf16"
        return torch.autocast(self.settings.device.type, dtype=torch.bfloat16, enabled=on)

    def _start_epoch(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self.settings.device)
        self._wrong = torch.zeros((), dtype=torch.int64, device=self.settings.device)

    # -- what ranks share -------------------------------------------------------------------------

    def _places(self) -> list[int] | None:
        """Where this rank's samples are in an SGD batch, micro-batch by micro-batch; None: all."""
        if self.world == 1:
            return None
        return [place for part in self.plan.parts(self.rank) for place in part]

    def _called(self) -> nn.Module:
        """What a training step calls: the model, or what also averages its gradients over ranks."""
        if self._network is None:
            self._network = self.forward or self.model
            if self.world > 1:
                self._network = parallel.wrapped(self._network, self.settings.device)
        return self._network

    def _average_statistics(self) -> None:
        """Make the population statistics of the ranks the same, as the settings say."""
        dist.average_buffers(self.model, how=self.settings.buffers)
        if self.bank and self.world > 1:
            self.bank.average(self.settings.buffers)

    def _shared(self) -> dict[str, Tensor]:
        """What all ranks have to hold alike once they have averaged their statistics."""
        return self.model.state_dict() | (self.bank.tensors() if self.bank else {})

    def _row(self) -> dict[str, Any]:
        """The epoch so far, in its training forwards, of all ranks.

        Raises Diverged, on all of them, on a non-finite loss.
        """
        seen = self.step * self.plan.batch_size
        total, wrong = self._totals()
        loss = total.item() / seen
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss is {loss} at epoch {self.epoch + 1}, step {self.step}"
            )
        self.last = {
            "epoch": self.epoch + 1,
            "step": self.epoch * self.steps + self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_error": 100 * wrong.item() / seen,
        }
        return self.last

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Sum of the losses (float64) and number of errors (int64) of the epoch, of all ranks."""
        return dist.stack(self._loss).sum(0), dist.stack(self._wrong).sum(0)

    # -- the checkpoint ---------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self.stop.look(time.monotonic() - self._saved >= self.settings.checkpoint_every):
            self.save()
            self.stop.end_if_settled()

    def save(self) -> None:
        """Write everything that the rest of the run depends on; the first rank writes, all wait."""
        state = self.state_dict()
        agreement.by_first(lambda: checkpoint.save(self.path, state), self.settings.device)
        self._saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The state of the run, which ranks make together.

        `ranks` has what each of several ranks has of its own; in its place in `model`, `running`
        and `ema_bank` stands what they would agree on now.
        """
        alone = self.world == 1
        ranks = [] if alone else agreement.gather(self._own_state(), self.settings.device)
        devices = torch.cuda.get_rng_state_all() if alone and torch.cuda.is_initialized() else []
        loss, wrong = self._totals()
        with self._statistics_averaged():
            return {
                "model": {k: v.clone() for k, v in self.model.state_dict().items()},
                "optimizer": self.optimizer.state_dict(),
                "rng": {"cpu": torch.get_rng_state(), "cuda": devices},
                "position": {"epoch": self.epoch, "step": self.step},
                "running": {"loss": loss.cpu(), "wrong": wrong.cpu()},
                "history": self.history,
                "seconds": self.elapsed,
                "ema_bank": self.bank.state_dict() if self.bank else None,
                "ranks": ranks,
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; every rank loads the same.

        The states of ranks are of use to as many. Otherwise all begin with the statistics that
        those agreed on, and only the first with a generator that goes on.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self.history, self.seconds = list(state["history"]), state["seconds"]
        if self.bank:
            self.bank.load_state_dict(state["ema_bank"])
        if self.rank == 0:
            torch.set_rng_state(state["rng"]["cpu"])
            for number, rng in enumerate(state["rng"]["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(rng, number)
        self._start_epoch()
        ranks = state.get("ranks", [])
        if len(ranks) == self.world > 1:
            self._load_own_state(ranks[self.rank])
        elif self.rank == 0:
            self._loss = state["running"]["loss"].to(self.settings.device)
            self._wrong = state["running"]["wrong"].to(self.settings.device)

    def _own_state(self) -> dict[str, Tensor]:
        """What differs between ranks in the middle of an epoch."""
        state = parallel.own_state(self.model, self.bank, self.settings.device)
        return state | {"loss": self._loss, "wrong": self._wrong}

    def _load_own_state(self, state: dict[str, Tensor]) -> None:
        parallel.load_own_state(state, self.model, self.bank, self.settings.device)
        self._loss.copy_(state["loss"])
        self._wrong.copy_(state["wrong"])

    @contextmanager
    def _statistics_averaged(self) -> Iterator[None]:
        """Within, the statistics are what the ranks would agree on now; afterwards their own."""
        if self.world == 1:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self._own_state().items()}
        self._average_statistics()
        try:
            yield
        finally:
            self._load_own_state(own)
