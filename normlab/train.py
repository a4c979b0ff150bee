"""The training loop, top to bottom.

Data order and augmentation come from (seed, epoch, step), so the whole state of a run is its
weights, its optimizer, torch's generator (dropout) and its position: a run that is stopped
anywhere and resumed ends bit for bit where it would have.
"""

import logging
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from normlab import checkpoint, schedule
from normlab.batchplan import BatchPlan
from normlab.data.base import Dataset
from normlab.orders import SHUFFLED, Order
from normlab.population import EmaBank

log = logging.getLogger(__name__)

LOOK_EVERY = 25
"""Steps between looks at the running loss: each look waits for a GPU."""

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
    precision: str = "fp32"
    channels_last: bool = False
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""


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
    forward: Callable[[Tensor], Tensor] | None = None
    """What is called in place of ``model`` (a compiled twin); None: the model itself."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    last: dict[str, Any] = field(default_factory=dict)
    """The newest finite numbers: those to record when the run diverges."""
    _loss: Tensor = field(init=False)
    _wrong: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._start_epoch()
        self._began = self._saved = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds this run has been at work, over all its starts."""
        return self.seconds + time.monotonic() - self._began

    # -- the loop ---------------------------------------------------------------------------------

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
                disable=None,
            ) as bar,
        ):
            for x, y in batches:
                self._train_step(x, y, next(extras))
                bar.update(len(y))
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
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self._start_epoch()

    def _extra_images(self) -> Generator[Tensor | None, None, None]:
        """The forward-only images of each step from the current one on, or None if it has none.

        They are augmented training images, in an order of their own, passed over again and again.
        """
        size = self.plan.virtual_extra * self.plan.accumulation
        if size == 0:
            yield from repeat(None)
        passing = self.data.size("train") // size
        at = self.epoch * self.steps + self.step
        while True:
            for x, _ in self.data.train_batches(
                batch_size=size,
                seed=self.settings.seed + EXTRA_SEEDS,
                epoch=at // passing,
                start_step=at % passing,
                device=self.settings.device,
                channels_last=self.settings.channels_last,
            ):
                yield x
                at += 1

    def _train_step(self, x: Tensor, y: Tensor, extra: Tensor | None = None) -> None:
        """One optimizer step on one SGD batch, in micro-batches as planned.

        extra: as many forward-only images as the plan has for all its forward passes.
        """
        # Set the learning rate of this step.
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

        # Accumulate the gradient of the mean loss, one micro-batch at a time.
        self.optimizer.zero_grad(set_to_none=True)
        size = self.plan.micro_batch
        none = repeat(None, self.plan.accumulation)
        besides = none if extra is None else extra.split(self.plan.virtual_extra)
        for part_x, part_y, beside in zip(x.split(size), y.split(size), besides, strict=True):
            together = part_x if beside is None else torch.cat([part_x, beside])
            with self._autocast():
                logits = (self.forward or self.model)(together)
                logits = logits if beside is None else logits[: len(part_y)]
                loss = F.cross_entropy(
                    logits.float(), part_y, label_smoothing=self.settings.label_smoothing
                )
            (loss * (len(part_y) / len(y))).backward()
            self._loss += loss.detach() * len(part_y)
            self._wrong += (logits.detach().argmax(1) != part_y).sum()

        # Update the weights.
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.step += 1

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

    def _row(self) -> dict[str, Any]:
        """The epoch so far, in its training forwards. Raises Diverged on a non-finite loss."""
        seen = self.step * self.plan.batch_size
        loss = self._loss.item() / seen
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss is {loss} at epoch {self.epoch + 1}, step {self.step}"
            )
        self.last = {
            "epoch": self.epoch + 1,
            "step": self.epoch * self.steps + self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_error": 100 * self._wrong.item() / seen,
        }
        return self.last

    # -- the checkpoint ---------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self.stop.look(time.monotonic() - self._saved >= self.settings.checkpoint_every):
            self.save()
            self.stop.end_if_settled()

    def save(self) -> None:
        """Write everything that the rest of the run depends on."""
        checkpoint.save(self.path, self.state_dict())
        self._saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": devices},
            "position": {"epoch": self.epoch, "step": self.step},
            "running": {"loss": self._loss.cpu(), "wrong": self._wrong.cpu()},
            "history": self.history,
            "seconds": self.elapsed,
            "ema_bank": self.bank.state_dict() if self.bank else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        for number, rng in enumerate(state["rng"]["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng, number)
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self._loss = state["running"]["loss"].to(self.settings.device)
        self._wrong = state["running"]["wrong"].to(self.settings.device)
        self.history, self.seconds = list(state["history"]), state["seconds"]
        if self.bank:
            self.bank.load_state_dict(state["ema_bank"])
