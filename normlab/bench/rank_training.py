"""Training on two ranks with a thread each, against one rank with two threads: two cores each time.

Both train a ResNet-20 on the same SGD batches, with the trainer that runs have; gradients travel
over gloo. Images per second are those by the clock, waits for the other rank included.
"""

import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normlab import allocator
from normlab.bench import ranks, training
from normlab.bench.measure import Spread, Together
from normlab.train import Trainer
from normlab.turns import take_turns

NORMS = ("bn", "sync")
"""What the ranks train with. The one rank has `bn`, which is what `sync` computes on both."""

ALONE = "alone"


@dataclass(frozen=True)
class TrainingRow:
    """Training on `ranks` ranks; rates are images per second."""

    norm: str
    network: str
    batch: int
    """Images behind a step, on all ranks together."""
    ranks: int
    clock: str
    rounds: int
    rate: Spread
    alone: Spread
    """The rate of one rank with as many threads as there are ranks, and `bn`."""
    ratio: Spread
    """The ranks' rate over that: above 1 they are faster."""
    synchronized: int
    """Layers that exchange statistics."""
    exchanges: int
    """Between the ranks in a step, counted."""

    @property
    def expected(self) -> int:
        """Exchanges: one for all gradients, and one per synchronized layer and direction."""
        return 1 + 2 * self.synchronized

    @property
    def met(self) -> bool:
        return self.exchanges <= self.expected


def rows(*, quick: bool) -> Generator[TrainingRow]:
    """Both norms, taking turns: half a minute to a minute.

    The processes end with the generator. Raises RuntimeError if one of them fails.
    """
    rounds, steps = (3, 4) if quick else (9, 8)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        with (
            Together([_code(rank, meeting) for rank in range(ranks.RANKS)]) as together,
            Together([_code(None, meeting)]) as alone,
        ):
            yield from measured(together, alone, rounds=rounds, steps=steps)


def _code(rank: int | None, meeting: Path) -> str:
    return f"from normlab.bench import rank_training; rank_training.serve({rank}, {str(meeting)!r})"


def measured(together: Together, alone: Together, *, rounds: int, steps: int) -> list[TrainingRow]:
    """A row for each of NORMS, of that many rounds with that many steps in each."""
    made = {norm: together.ask(["make", norm, steps])[0] for norm in NORMS}
    alone.ask(["make", NORMS[0], steps])
    taken: dict[str, list[float]] = {name: [] for name in (*NORMS, ALONE)}

    def turn(name: str) -> None:
        asked = alone if name == ALONE else together
        norm = NORMS[0] if name == ALONE else name
        taken[name].append(max(asked.ask(["turn", norm])))  # the slower rank has the step done

    take_turns({name: partial(turn, name) for name in taken}, rounds)
    counted = {name: seconds[1:] for name, seconds in taken.items()}  # the first round warms up
    return [row(norm, counted, steps * training.BATCH, **made[norm]) for norm in NORMS]


def row(
    norm: str,
    seconds: Mapping[str, Sequence[float]],
    images: int,
    *,
    synchronized: int,
    exchanges: int,
) -> TrainingRow:
    """Of seconds per contestant and round, in each of which it trains on so many images."""

    def rate(name: str) -> Spread:
        return Spread.of([images / each for each in seconds[name]])

    pairs = zip(seconds[ALONE], seconds[norm], strict=True)
    return TrainingRow(
        norm=norm,
        network=ranks.NETWORK,
        batch=training.BATCH,
        ranks=ranks.RANKS,
        clock="elapsed time",
        rounds=len(seconds[norm]),
        rate=rate(norm),
        alone=rate(ALONE),
        ratio=Spread.of([one / two for one, two in pairs]),
        synchronized=synchronized,
        exchanges=exchanges,
    )


# -- in the processes -----------------------------------------------------------------------------


def serve(rank: int | None, meeting: str) -> None:
    """One of the ranks, or with None the process that is alone with a thread for each of them."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Trained(Path(folder)).answer
        if rank is None:
            torch.set_num_threads(ranks.RANKS)
            allocator.keep_freed_memory()
            ranks.answer_all(answer)
        else:
            with ranks.joined(rank, meeting):
                ranks.answer_all(answer)


class Trained:
    """A process's runs, by norm. Every rank must be asked the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trainers: dict[str, Trainer] = {}

    def answer(self, what: str, *details: Any) -> Any:
        tasks: dict[str, Callable[..., Any]] = {"make": self.make, "turn": self.turn}
        return tasks[what](*details)

    def make(self, norm: str, steps: int) -> dict[str, int]:
        """Make a run; how many of its layers are synchronized, and the exchanges of a step."""
        made = self._trainers[norm] = training.trainer(steps, self._folder, norm)
        batches = made.data.train_batches(
            batch_size=training.BATCH, seed=0, epoch=0, places=made._places(), channels_last=True
        )
        x, y = next(batches)
        made._train_step(x, y)  # torch arranges gradients anew after the first one
        exchanges = ranks.collectives(partial(made._train_step, x, y))
        made.step = 0
        layers = made.model.modules()
        synchronized = sum(getattr(layer, "batch", "") == "sync" for layer in layers)
        return {"synchronized": synchronized, "exchanges": exchanges}

    def turn(self, norm: str) -> float:
        """Seconds of an epoch, by the clock."""
        started = time.perf_counter()
        self._trainers[norm].train_epoch()
        return time.perf_counter() - started
