"""From a checked config to a finished run directory, once.

Everything that can be refused is refused before the directory exists. A run that is finished
elsewhere is skipped, an unfinished one resumes, and two processes never work on the same run.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from normlab import experiment, runs
from normlab.config import cell_key, check, run_id, with_later_keys
from normlab.runs import FINISHED, RunDir

if TYPE_CHECKING:
    from normlab.worker import Job

log = logging.getLogger(__name__)

RESULTS = Path("results")
"""Where committed results lie, from the working directory."""


T = TypeVar("T")


class JobError(RuntimeError):
    """A run that failed; picklable, so that it crosses joblib, submitit and Ray."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run; ``summary``: error in % by protocol at the last evaluated epoch."""

    id: str
    status: str
    skipped: bool
    path: Path
    summary: dict[str, float]


def run(config: dict[str, Any]) -> Outcome:
    """Run, resume or skip what the config describes.

    Raises ValueError or OSError before anything is written when the config cannot work, JobError
    when the run itself fails.
    """
    check(config)
    from normlab import allocator

    if config["allocator"] == "keep":
        allocator.keep_freed_memory()
    from normlab import build

    device, data = build.device(config), build.data(config)
    directory = RunDir(Path(config["runs"]) / run_id(
        config, device=device.type, data_digest=data.digest, kernels=False
    ))  # fmt: skip
    committed = _committed().get(directory.id) if config["skip_done"] == "all" else None
    if committed is not None and set(config["evals"]) <= committed:
        log.info("%s is among the committed results: skipped", directory.id)
        return Outcome(directory.id, "done", True, directory.path, {})
    return _run(config, directory)


@cache
def _committed() -> dict[str, set[str]]:
    return runs.committed(RESULTS)


def _run(config: dict[str, Any], directory: RunDir) -> Outcome:
    import torch

    from normlab import checkpoint, worker

    if directory.env():  # as many threads as it began with: sums depend on how they are split
        torch.set_num_threads(directory.env()["threads"])
    elif config["threads"]:
        torch.set_num_threads(config["threads"])
    job = worker.construct(config)
    if directory.checkpoint.exists():
        checkpoint.load(directory.checkpoint)  # refuse a spoilt one before touching anything
    with directory.lock(), _logging_to(directory), checkpoint.deferred_signals() as stop:
        status = directory.status().get("status")
        if status in FINISHED:
            lacking = status == "done" and worker.missing_evals(config, directory)
            if lacking:
                _guarded(directory, lambda: worker.evaluate_finished(job, directory, stop))
            return _outcome(directory, skipped=not lacking)
        if not directory.env():
            directory.write_config(config)
            directory.write_env(_environment(job))
        log.info("%s: %s", directory.id, job.plan)
        directory.write_status(_guarded(directory, lambda: worker.work(job, directory, stop)))
    return _outcome(directory, skipped=False)


def evaluate(run: str, specs: list[str], *, root: str, device: str) -> Outcome:
    """Evaluate a finished run under further protocols; appends to its ``evals.csv``.

    Raises ValueError in one line for an unknown run, one that is not finished, an unknown protocol
    or an unreadable checkpoint.
    """
    directory = runs.find(run, Path(root))
    config = with_later_keys(directory.config()) | {"device": device, "evals": specs}
    check(config)
    status = directory.status().get("status", "unfinished")
    if status != "done":
        raise ValueError(f"run {directory.id} is {status}: only a finished run can be evaluated")
    from normlab import checkpoint, worker

    checkpoint.load(directory.checkpoint)
    job = worker.construct(config)
    with directory.lock(), _logging_to(directory), checkpoint.deferred_signals() as stop:
        worker.evaluate_finished(job, directory, stop)
    return _outcome(directory, skipped=False)


def _guarded(directory: RunDir, action: Callable[[], T]) -> T:
    """Run; an exception is logged with its traceback, recorded, and becomes one line."""
    try:
        return action()
    except Exception as error:
        log.exception("%s failed", directory.id)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if directory.status().get("status") not in FINISHED:
            directory.write_status({"status": "failed", "reason": reason})
        raise JobError(f"{directory.id} failed: {reason} (log: {directory.log})") from None


def _outcome(directory: RunDir, *, skipped: bool) -> Outcome:
    rows = directory.evals()
    last = max((int(row["epoch"]) for row in rows), default=0)
    summary = {row["protocol"]: float(row["error"]) for row in rows if int(row["epoch"]) == last}
    status = directory.status()["status"]
    return Outcome(directory.id, status, skipped, directory.path, summary)


def _environment(job: "Job") -> dict[str, Any]:
    """What the numbers depend on besides the config; no names of hosts or users."""
    import numpy
    import torch
    import torchvision

    from normlab import __version__, build

    device = build.device(job.config)
    commit, dirty = runs.commit()
    return {
        "cell": cell_key(job.config),
        "nbs": job.plan.nbs,
        "commit": commit,
        "dirty": dirty,
        "source": runs.source_digest(),
        "claims": _claims(job.config["scale"]),
        "data_digest": job.data.digest,
        "data_note": job.data.note,
        "chance": 100 * (1 - 1 / job.data.num_classes),
        "device": device.type,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "normlab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "dropped_per_epoch": job.dropped,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _claims(scale: str | None) -> str:
    """``experiment:digest`` of every experiment that judges at this scale, as declared now."""
    loaded = [experiment.load(name) for name in experiment.names()]
    return " ".join(f"{e.name}:{e.claims_digest(scale)}" for e in loaded if scale in e.scales)


def _processor() -> str:
    """The processor's model, for the record of a measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.machine()


@contextmanager
def _logging_to(directory: RunDir) -> Iterator[None]:
    """Append what normlab logs to the run's ``log.txt``."""
    root = logging.getLogger("normlab")
    handler = logging.FileHandler(directory.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
