"""From a checked config to a finished run directory, once.

Everything that can be refused is refused before the directory exists. A run that is finished
elsewhere is skipped, an unfinished one resumes, and two processes never work on the same run.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
    """What became of a run; ``summary``: error in % by protocol at the last evaluated epoch.

    ``lacking``: in one line, what was asked for and a finished run cannot give any more.
    ``recorded``: the committed table that the numbers are read from; then ``path`` need not exist.
    """

    id: str
    status: str
    skipped: bool
    path: Path
    summary: dict[str, float]
    lacking: str = ""
    recorded: Path | None = None

    @property
    def place(self) -> str:
        """Where the run lies, in words."""
        if self.recorded is None:
            return str(self.path)
        return f"recorded in {self.recorded}; skip_done=local runs it here"


def run(config: dict[str, Any]) -> Outcome:
    """Run, resume or skip what the config describes.

    Raises ValueError or OSError before anything is written when the config cannot work, JobError
    when the run itself fails.
    """
    check(config)
    from normlab import allocator, build, kernels

    kept = config["allocator"] == "keep" and allocator.keep_freed_memory()
    device, data = build.device(config), build.data(config)
    fused = _fused(config, device.type)
    directory = RunDir(Path(config["runs"]) / run_id(
        config, device=device.type, data_digest=data.digest, kernels=fused
    ))  # fmt: skip
    with kernels.use(fused):
        return _committed_outcome(config, directory) or _run(config, directory, memory_kept=kept)


def _fused(config: dict[str, Any], device: str) -> bool:
    """Whether norms use the fused kernels; ValueError where they are asked for and not there."""
    from normlab import kernels

    if not config["kernels"]:
        return False
    if device != "cpu":
        raise ValueError(f"kernels=true: the fused kernels are for the CPU, not for {device}")
    why = kernels.unavailable() if kernels.enabled() else "NORMLAB_KERNELS=0 turns them off"
    if why:
        raise ValueError(f"kernels=true: no fused kernels here: {why}")
    return True


@cache
def _committed() -> dict[str, runs.Committed]:
    return runs.committed(RESULTS)


def _committed_outcome(config: dict[str, Any], directory: RunDir) -> Outcome | None:
    """The outcome of a run that the committed results already hold whole, and ``runs=`` not."""
    from normlab import worker

    found = _committed().get(directory.id) if config["skip_done"] == "all" else None
    here = directory.status().get("status")
    if found is None or here == "diverged":
        return None
    if here == "done" and not worker.missing_evals(config, directory):
        return None
    wanted = worker.wanted_evals(config)
    if found.status == "done" and not {(str(p), epoch) for epoch, p in wanted} <= set(found.evals):
        return None
    log.info("%s is among the committed results: skipped", directory.id)
    outcome = Outcome(
        directory.id, found.status, True, directory.path, _summary(found.evals), recorded=found.path
    )
    if not set(config["ema_bank"]) <= {protocol.decay for _, protocol in wanted}:
        return replace(
            outcome,
            lacking=f"ema_bank={config['ema_bank']}: {outcome.id} is "
            f"{outcome.place}, without its weights",
        )
    return outcome


def _run(config: dict[str, Any], directory: RunDir, *, memory_kept: bool) -> Outcome:
    from normlab import checkpoint, worker

    if directory.status().get("status") in FINISHED:
        return _completed(config, directory)
    config = _with_tracked(config, directory)
    job = worker.construct(config)
    environment = _environment(job) | {"memory_kept": memory_kept}
    if directory.checkpoint.exists():
        worker.check_resumable(config, directory)
        _check_environment(directory, environment)
    with directory.lock(), _logging_to(directory), checkpoint.deferred_signals() as stop:
        ours = directory.status().get("status") not in FINISHED
        if ours:  # and no other process has run it meanwhile
            _prepare(directory, config, environment)
            log.info("%s: %s, freed memory is kept: %s", directory.id, job.plan, memory_kept)
            _guarded(directory, lambda: _work(job, directory, stop))
    outcome = _completed(config, directory)
    return replace(outcome, skipped=outcome.skipped and not ours)


def _completed(config: dict[str, Any], directory: RunDir) -> Outcome:
    """A finished run, once it has the evaluations that it lacked and can still make."""
    from normlab import checkpoint, worker

    missing, bank = worker.missing_evals(config, directory), set(config["ema_bank"])
    if directory.status()["status"] == "diverged":
        return _outcome(directory, skipped=True)
    if not missing and (not bank or bank <= set(directory.config()["ema_bank"])):
        return _outcome(directory, skipped=True)
    state = checkpoint.load(directory.checkpoint)
    lost = worker.lost_evals(config, directory, state)
    lacking = worker.unobtainable(config, directory, state)
    possible = {str(protocol) for epoch, protocol in missing if (epoch, protocol) not in lost}
    if not possible:
        return replace(_outcome(directory, skipped=True), lacking=lacking)
    asked = [str(protocol) for protocol in worker.protocols(config)]
    job = worker.construct(
        config
        | {"evals": [spec for spec in asked if spec in possible]}
        | {"ema_bank": worker.tracked_decays(state)}
    )
    _check_environment(directory, _environment(job))
    with directory.lock(), _logging_to(directory), checkpoint.deferred_signals() as stop:
        _set_threads(directory)
        _guarded(directory, lambda: worker.evaluate_finished(job, directory, stop))
    return replace(_outcome(directory, skipped=False), lacking=lacking)


def _with_tracked(config: dict[str, Any], directory: RunDir) -> dict[str, Any]:
    """The config with the EMA bank of the run it continues, which must not be dropped half-way."""
    from normlab import checkpoint, worker

    if not directory.checkpoint.exists():
        return config
    tracked = worker.tracked_decays(checkpoint.load(directory.checkpoint))
    return config | {"ema_bank": tracked} if set(config["ema_bank"]) <= set(tracked) else config


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
    try:
        directory = runs.find(run, Path(root))
    except ValueError:
        if held := _committed_as(run, Path(root)):
            raise ValueError(held) from None
        raise
    config = with_later_keys(directory.config()) | {"evals": specs}
    config["data_root"] = data_root or config["data_root"]
    config["device"] = directory.env().get("device", config["device"])
    check(config)
    status = directory.status().get("status", "unfinished")
    if status != "done":
        raise ValueError(f"run {directory.id} is {status}: only a finished run can be evaluated")
    return _completed(config, directory)


def _committed_as(run: str, root: Path) -> str:
    """What to say of a run that is not under a root and is in the committed results; else ""."""
    found = _committed()
    matches = [run] if run in found else [known for known in found if known.startswith(run)]
    if len(matches) != 1 or any(local.id.startswith(run) for local in runs.listed(root)):
        return ""
    return (
        f"run {matches[0]} is recorded in {found[matches[0]].path} without its weights: "
        "skip_done=local runs it here"
    )


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
    errors = {(r["protocol"], int(r["epoch"])): float(r["error"]) for r in directory.evals()}
    status = directory.status()["status"]
    return Outcome(directory.id, status, skipped, directory.path, _summary(errors))


def _summary(errors: dict[tuple[str, int], float]) -> dict[str, float]:
    """The errors of the last evaluated epoch, from those by protocol and epoch."""
    last = max((epoch for _, epoch in errors), default=0)
    return {protocol: error for (protocol, epoch), error in errors.items() if epoch == last}


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
        "kernels": job.config["kernels"],
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
