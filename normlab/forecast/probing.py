"""What one run takes, from a few of its steps and evaluation batches in a scratch directory."""

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from normlab import (
    agenda,
    allocator,
    build,
    dist,
    environment,
    kernels,
    launch,
    logs,
    perform,
    runs,
    worker,
)  # fmt: skip
from normlab.checkpoint import Stop
from normlab.config import is_task
from normlab.data.base import Dataset, dealt
from normlab.protocols import Protocol
from normlab.ranks import RankFailed, agent

WARM, MOST = 2, 100
"""Steps that are not counted, and how many are made at most, in as many epochs as they need."""

SECONDS = 2.0
"""After which an epoch is broken off."""

BLOCK = 512
"""Images that an evaluation reads at a time."""


RANK = ("-u", "-m", "normlab.forecast.rank")
"""What a rank of a probe is, after the Python it runs in and before the run's directory."""


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

    def __init__(self, data: Dataset, seed: int, stop: Stop) -> None:
        self._data, self._seed, self._stop = data, seed, stop
        self.made = 0
        """Steps so far."""
        self.began = self.counted_from = self.counted_to = 0.0
        """When the first step began, the first counted one, and when the last one ended."""
        self.images = 0
        self.passed: dict[str, int] = {}
        """How many images of a split the longest pass over it had."""
        self.whole: dict[str, int] = {}
        """How many images it would have had, of which a rank has its share."""

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
            # All ranks break off at the same step, whichever finds it time.
            if self._stop.look(time.perf_counter() - began > SECONDS) or self.made >= MOST:
                break
        self.counted_to = _now()

    @property
    def counted(self) -> tuple[float, int]:
        """Seconds of the counted steps, and how many they are."""
        steps = self.made - WARM if self.made > WARM else self.made
        return self.counted_to - self.counted_from, steps

    def eval_batches(self, split: str, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen, images = 0, how.get("samples") or self._data.size(split)
        unit, share = how.get("unit") or how["batch_size"], how["share"]
        self.whole[split] = max(self.whole.get(split, 0), len(dealt(images, unit, share)))
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


def probe(config: dict[str, Any], *, threads: int | None) -> Cost | str:
    """Some steps of a run and some batches of each of its evaluations, scaled to the whole.

    Several ranks are started as those of a run are, in the scratch directory; what they take is
    the time of the slowest, and the memory of all of them and of the process that starts them.

    threads: as many as a run of the sweep has, where its config names none; None: torch's choice.
    Returns why, in words, where this machine cannot run it, and of a task. Raises ValueError or
    OSError for a run that cannot be built.
    """
    if is_task(config):
        return "a task runs from its beginning to its end"
    try:
        build.check_gpus(config | {"launch": True})
    except ValueError as refused:
        return str(refused)
    with kernels.use(config["kernels"]):  # the path that the run would take
        try:
            return _probe(config, threads=threads)
        except RankFailed as failed:
            return str(failed)


def _probe(config: dict[str, Any], *, threads: int | None) -> Cost:
    if config["allocator"] == "keep":
        allocator.keep_freed_memory()
    _forget_peak()
    began = time.perf_counter()
    per_epoch, _ = build.steps(config, build.data(config))
    epochs = min(config["epochs"], math.ceil(MOST / max(1, per_epoch)))
    short = config | {"epochs": epochs, "eval_last": 1, "eval_at": []}
    with tempfile.TemporaryDirectory(prefix="normlab-probe-") as scratch:
        run = runs.RunDir(Path(scratch) / "run")
        run.path.mkdir()
        run.write_config(short)
        if config["world_size"] == 1:
            if number := config["threads"] or threads:
                torch.set_num_threads(number)
            job = worker.construct(short)
            taken = [measure(job, run, Stop())]
            memory = _peak()
        else:
            job = launch.constructed(short)
            taken = _of_ranks(job, run, threads=threads)
            memory = _peak() + sum(one.memory for one in taken)
        once = time.perf_counter() - began - max(one.scaled for one in taken)
        disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    training = max(one.step for one in taken) * job.steps * config["epochs"]
    measured = len(agenda.epochs(config))
    kept = sum(value.nbytes for value in job.model.state_dict().values())
    return Cost(
        seconds=once + training + measured * max(one.measurements for one in taken),
        memory=memory,
        disk=disk + (measured - 1) * kept,
    )


@dataclass(frozen=True)
class Taken:
    """What a probe has taken in one process, a rank or the only one."""

    step: float
    """Seconds of an optimizer step."""
    measurements: float
    """Seconds of what is measured after an epoch: evaluations of whole splits, and probes."""
    scaled: float
    """Seconds of the forecast itself that went into these steps and measurements."""
    memory: int
    """Bytes of this process at its peak."""


def measure(job: worker.Job, run: runs.RunDir, stop: Stop) -> Taken:
    """Train and evaluate a little; all ranks do it together."""
    few = _Few(job.data, job.config["seed"], stop)
    data = cast(Dataset, few)
    unmeasured = job.config | {"evals": [], "probes": []}
    worker.work(replace(job, data=data, config=unmeasured), run, stop)
    began = _now()
    spent = [_evaluation(job, few, protocol, stop) for protocol in agenda.protocols(job.config)]
    spent += [_measurement(job, name) for name in job.config["probes"]]
    scaled = few.counted_to - few.began + _now() - began
    counted, steps = few.counted
    return Taken(counted / steps if steps else 0.0, sum(spent), scaled, _peak())


def take_part(job: worker.Job, run: runs.RunDir, stop: Stop) -> None:
    """What a rank does in a probe: it measures, and leaves the result beside the run."""
    _told(run, dist.place()[0]).write_text(json.dumps(asdict(measure(job, run, stop))))


def _of_ranks(job: worker.Job, run: runs.RunDir, *, threads: int | None) -> list[Taken]:
    """What each rank of a prepared run takes. Raises RankFailed."""
    ranks, described = job.plan.world_size, environment.describe(job)
    if threads and not job.config["threads"]:
        described["threads"] = max(1, threads // ranks)
    run.write_env(described)
    with logs.logging_to(logging.NullHandler()):
        agent.start(
            run.path, ranks, threads=described["threads"], max_restarts=0, handed={},
            command=RANK,
        )  # fmt: skip
    return [Taken(**json.loads(_told(run, rank).read_text())) for rank in range(ranks)]


def _told(run: runs.RunDir, rank: int) -> Path:
    return run.path.parent / f"rank-{rank}.json"


def _evaluation(job: worker.Job, few: _Few, protocol: Protocol, stop: Stop) -> float:
    """Seconds of an evaluation of the whole split; a rank without a share of it just waits."""
    if protocol.statistics == "augmented":
        return 0.0
    batch = protocol.batch or job.plan.nbs or 1
    few.images = BLOCK * math.ceil(2 * batch / BLOCK)
    few.passed.clear()
    few.whole.clear()
    began = time.perf_counter()
    evaluator = worker.evaluator(replace(job, data=cast(Dataset, few)), stop)
    evaluator.run(protocol)
    seconds = _now() - began
    passed = sum(few.passed.values())
    return seconds * sum(few.whole.values()) / passed if passed else seconds


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
