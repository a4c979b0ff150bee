"""From a checked config to a finished run directory, once.

Everything that can be refused is refused before the directory exists. A run that is finished
elsewhere is skipped, an unfinished one resumes, and two processes never work on the same run.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from normlab import experiment, runs
from normlab.config import cell_key, check, run_id, with_later_keys
from normlab.runs import FINISHED, RunDir

if TYPE_CHECKING:
    from normlab.checkpoint import Stop
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
    from normlab import allocator, build

    kept = config["allocator"] == "keep" and allocator.keep_freed_memory()
    device, data = build.device(config), build.data(config)
    directory = RunDir(Path(config["runs"]) / run_id(
        config, device=device.type, data_digest=data.digest, kernels=False
    ))  # fmt: skip
    return _committed_outcome(config, directory) or _run(config, directory, memory_kept=kept)


@cache
def _committed() -> dict[str, runs.Committed]:
    return runs.committed(RESULTS)


def _committed_outcome(config: dict[str, Any], directory: RunDir) -> Outcome | None:
    """The outcome of a run that the committed results already hold whole."""
    from normlab.worker import wanted_evals

    found = _committed().get(directory.id) if config["skip_done"] == "all" else None
    if found is None:
        return None
    wanted = {(str(protocol), epoch) for epoch, protocol in wanted_evals(config)}
    if found.status == "done" and not wanted <= found.evals:
        return None
    log.info("%s is among the committed results: skipped", directory.id)
    return Outcome(directory.id, found.status, True, directory.path, {})


def _run(config: dict[str, Any], directory: RunDir, *, memory_kept: bool) -> Outcome:
    from normlab import checkpoint, worker

    status = directory.status().get("status")
    if status == "diverged" or (status == "done" and not worker.missing_evals(config, directory)):
        return _outcome(directory, skipped=True)
    job = worker.construct(config)
    environment = _environment(job) | {"memory_kept": memory_kept}
    if directory.checkpoint.exists():
        worker.check_resumable(job, directory)
        _check_environment(directory, environment)
    with directory.lock(), _logging_to(directory), checkpoint.deferred_signals() as stop:
        status = directory.status().get("status")  # another process may have run it meanwhile
        if status not in FINISHED:
            _prepare(directory, config, environment)
            log.info("%s: %s, freed memory is kept: %s", directory.id, job.plan, memory_kept)
            _guarded(directory, lambda: _work(job, directory, stop))
        elif status == "done" and worker.missing_evals(config, directory):
            _set_threads(directory)
            _guarded(directory, lambda: worker.evaluate_finished(job, directory, stop))
        else:
            return _outcome(directory, skipped=True)
    return _outcome(directory, skipped=False)


def _work(job: "Job", directory: RunDir, stop: "Stop") -> None:
    from normlab import worker

    status = worker.work(job, directory, stop)
    directory.write_env(directory.env() | {"ended": _now()})
    directory.write_status(status)


def evaluate(run: str, specs: list[str], *, root: str, data_root: str | None = None) -> Outcome:
    """Evaluate a finished run under further protocols; appends to its ``evals.csv``.

    Raises ValueError in one line for an unknown run, one that is not finished, an unknown protocol,
    an unreadable checkpoint, and for another data set, torch or kind of device than the run's.
    """
    directory = runs.find(run, Path(root))
    config = with_later_keys(directory.config()) | {"evals": specs}
    config["data_root"] = data_root or config["data_root"]
    config["device"] = directory.env().get("device", config["device"])
    check(config)
    status = directory.status().get("status", "unfinished")
    if status != "done":
        raise ValueError(f"run {directory.id} is {status}: only a finished run can be evaluated")
    from normlab import checkpoint, worker

    job = worker.construct(config)
    worker.check_resumable(job, directory)
    _check_environment(directory, _environment(job))
    with directory.lock(), _logging_to(directory), checkpoint.deferred_signals() as stop:
        _set_threads(directory)
        _guarded(directory, lambda: worker.evaluate_finished(job, directory, stop))
    return _outcome(directory, skipped=False)


def _prepare(directory: RunDir, config: dict[str, Any], environment: dict[str, Any]) -> None:
    """Write what describes the run, and set its threads; a resumed run keeps its first start's."""
    recorded = directory.env()
    if not recorded or not directory.checkpoint.exists():  # nothing of it is left to continue
        directory.clear()
        directory.write_config(config)
        _set_threads(directory, environment["threads"])
        directory.write_env(environment)
        return
    directory.clear_status()
    _set_threads(directory)
    if environment["source"] not in recorded["source"].split("+"):
        # Half of the run comes from other code: neither digest alone would be true.
        recorded["source"] += "+" + environment["source"]
        recorded["dirty"] = recorded["dirty"] or environment["dirty"]
        directory.write_env(recorded)


def _check_environment(directory: RunDir, environment: dict[str, Any]) -> None:
    """Refuse to continue or evaluate a run under what would make other numbers."""
    recorded = directory.env()
    for key, name in (("torch", "torch"), ("data_digest", "data"), ("device", "device")):
        if recorded.get(key) != environment[key]:
            raise ValueError(
                f"run {directory.id} was made with {name} {recorded.get(key)}, and this is "
                f"{environment[key]}: use that, or give another runs= to train it anew"
            )


@cache
def _default_threads() -> int:
    """What torch would use in this process, before any run set a number."""
    import torch

    return torch.get_num_threads()


def _set_threads(directory: RunDir, number: int | None = None) -> None:
    """As many threads as the run began with: sums depend on how they are split."""
    import torch

    _default_threads()
    torch.set_num_threads(number or directory.env()["threads"])


def _guarded(directory: RunDir, action: Callable[[], T]) -> T:
    """Run; an exception is logged with its traceback, recorded, and becomes one line."""
    try:
        return action()
    except Exception as error:
        log.exception("%s failed", directory.id)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        with suppress(OSError):  # what failed may be the disk
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
        "threads": job.config["threads"] or _default_threads(),
        "normlab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "dropped_per_epoch": job.dropped,
        "started": _now(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


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
