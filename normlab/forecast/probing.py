"""What one run takes, from a few of its steps and evaluation batches in a scratch directory."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from normlab import agenda, allocator, build, kernels, perform, runs, worker
from normlab.checkpoint import Stop
from normlab.config import is_task
from normlab.data.base import Dataset
from normlab.protocols import Protocol

WARM, MOST = 2, 100
"""Steps that are not counted, and how many are made at most, in as many epochs as they need."""

SECONDS = 2.0
"""After which an epoch is broken off."""

BLOCK = 512
"""Images that an evaluation reads at a time."""


@dataclass(frozen=True)
class Cost:
    """What a run takes: seconds, bytes of memory at its peak, bytes of disk."""

    seconds: float
    memory: int
    disk: int


class _Few:
    """A data set of which only the first batches are delivered, with a note of when and how many.

    Everything else is the data set's own.
    """

    def __init__(self, data: Dataset, seed: int) -> None:
        self._data, self._seed = data, seed
        self.made = 0
        """Steps so far."""
        self.began = self.counted_from = self.counted_to = 0.0
        """When the first step began, the first counted one, and when the last one ended."""
        self.images = 0
        self.passed: dict[str, int] = {}
        """How many images of a split the longest pass over it had."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_batches(self, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        if how["seed"] != self._seed:  # forward-only images: their step waits for them
            yield from self._data.train_batches(**how)
            return
        began = time.perf_counter()
        if self.made == 0:
            self.began = self.counted_from = began
        for batch in self._data.train_batches(**how):
            yield batch
            self.made += 1
            if self.made == WARM:
                self.counted_from = _now()
            if self.made >= MOST or time.perf_counter() - began > SECONDS:
                break
        self.counted_to = _now()

    @property
    def counted(self) -> tuple[float, int]:
        """Seconds of the counted steps, and how many they are."""
        steps = self.made - WARM if self.made > WARM else self.made
        return self.counted_to - self.counted_from, steps

    def eval_batches(self, split: str, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen = 0
        for x, y in self._data.eval_batches(split, **how):
            seen += len(y)
            self.passed[split] = max(self.passed.get(split, 0), seen)
            yield x, y
            if seen >= self.images:
                break


def warm_up(config: dict[str, Any]) -> None:
    """Import and read what only the first run of a process waits for."""
    with suppress(ValueError, OSError):
        perform.construct(config) if is_task(config) else worker.construct(config)


def probe(config: dict[str, Any], *, threads: int | None) -> Cost | None:
    """`_probe` with the layers on the path that the run would take."""
    with kernels.use(config["kernels"]):
        return _probe(config, threads=threads)


def _probe(config: dict[str, Any], *, threads: int | None) -> Cost | None:
    """Some steps of a run and some batches of each of its evaluations, scaled to the whole.

    threads: as many as a run of the sweep has, where its config names none; None: torch's choice.
    None for a run of several ranks, and for a task. Raises ValueError or OSError for a run that
    cannot be built.
    """
    if config["world_size"] > 1 or is_task(config):
        return None
    if config["allocator"] == "keep":
        allocator.keep_freed_memory()
    if number := config["threads"] or threads:
        torch.set_num_threads(number)
    _forget_peak()
    began = time.perf_counter()
    per_epoch, _ = build.steps(config, build.data(config))
    epochs = min(config["epochs"], math.ceil(MOST / per_epoch))
    short = config | {"epochs": epochs, "eval_last": 1, "eval_at": []}
    job = worker.construct(short)
    few = _Few(job.data, config["seed"])
    data = cast(Dataset, few)
    with tempfile.TemporaryDirectory(prefix="normlab-probe-") as scratch:
        run = runs.RunDir(Path(scratch) / "run")
        run.path.mkdir()
        run.write_config(config)
        unmeasured = short | {"evals": [], "probes": []}
        worker.work(replace(job, data=data, config=unmeasured), run, Stop())
        once = time.perf_counter() - began - (few.counted_to - few.began)
        disk = sum(path.stat().st_size for path in run.path.iterdir())
    counted, steps = few.counted
    training = counted / steps * job.steps * config["epochs"]
    spent = [_evaluation(job, few, protocol) for protocol in agenda.protocols(config)]
    spent += [_measurement(job, name) for name in config["probes"]]
    measured = len(agenda.epochs(config))
    kept = sum(value.nbytes for value in job.model.state_dict().values())
    return Cost(
        seconds=once + training + measured * sum(spent),
        memory=_peak(),
        disk=disk + (measured - 1) * kept,
    )


def _evaluation(job: worker.Job, few: _Few, protocol: Protocol) -> float:
    """Seconds of an evaluation of the whole split."""
    if protocol.statistics == "augmented":
        return 0.0
    batch = protocol.batch or job.plan.nbs or 1
    few.images = BLOCK * math.ceil(2 * batch / BLOCK)
    few.passed.clear()
    began = time.perf_counter()
    evaluator = worker.evaluator(replace(job, data=cast(Dataset, few)), Stop())
    row = evaluator.run(protocol)
    seconds = _now() - began
    wanted = few.size(protocol.split) + (row.get("samples") or 0)
    return seconds * float(wanted) / sum(few.passed.values())


def _measurement(job: worker.Job, name: str) -> float:
    """Seconds of a probe, which is made whole: it may look at any number of images."""
    began = time.perf_counter()
    build.probe(name)(worker.context(job, 0))
    return _now() - began


def _now() -> float:
    """The time once all work that was begun is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak() -> None:
    """Let the peak of this process's memory be counted anew, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """Bytes: what is resident in this process at most, and on a GPU."""
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return 1024 * resident + on_gpu
