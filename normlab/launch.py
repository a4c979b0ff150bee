"""From a checked config to a finished run directory, once.

Everything that can be refused is refused before the directory exists. A run that is finished
elsewhere is skipped, an unfinished one resumes, and two processes never work on the same run.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from normlab import environment, lease, logs, runs, trackers
from normlab.config import (
    OF_THE_PLACE,
    ConfigError,
    check,
    check_taken,
    continued,
    is_task,
    other_statistics,
    run_id,
    with_later_keys,
)
from normlab.lease import LeaseLost
from normlab.outcome import Outcome, last, outcome_of
from normlab.runs import FINISHED, RunDir
from normlab.trackers import mirror

if TYPE_CHECKING:
    from normlab.perform import Task
    from normlab.worker import Job

log = logging.getLogger(__name__)

RESULTS = Path("results")
"""Where committed results lie, from the working directory."""


T = TypeVar("T")


class JobError(RuntimeError):
    """A run that failed; picklable, so that it crosses joblib, submitit and Ray."""


def run(config: dict[str, Any], named: Collection[str] = OF_THE_PLACE) -> Outcome:
    """Run, resume or skip what the config describes.

    named: the keys that were asked for by name. With ``resume``, what the run recorded holds for
    the others.

    Raises ValueError or OSError before anything is written when the config cannot work, JobError
    when the run itself fails.
    """
    taken_up: RunDir | None = None
    if config["resume"] is not None:
        taken_up = runs.find(config["resume"], Path(config["runs"]))
        config = _taken_up(taken_up, config, named)
    else:
        check(config)
        check_taken(config, named)
        config = identified(config)
    trackers.check(config)
    if is_task(config):
        config = config | {"world_size": 1}
    from normlab import allocator

    kept = config["allocator"] == "keep" and allocator.keep_freed_memory()
    with _kernels(config):
        if taken_up is not None:
            return _run(config, taken_up, memory_kept=kept)
        directory = directory_of(config)
        return committed_outcome(config, directory) or _run(config, directory, memory_kept=kept)


def _taken_up(directory: RunDir, asked: dict[str, Any], named: Collection[str]) -> dict[str, Any]:
    """The config with which a run goes on. Raises ValueError for one that cannot as is asked: not
    with what it has yet to measure, either."""
    from normlab import agenda

    recorded = with_later_keys(directory.config(), directory.path)
    if not directory.checkpoint.exists():
        raise ValueError(f"run {directory.id} has no checkpoint to go on from")
    config = continued(recorded, asked, named)
    check(config)
    reading = agenda.reading(config, directory)
    if reading and (why := other_statistics(recorded, config)):
        raise ConfigError(
            f"world_size={config['world_size']}: the run has world_size={recorded['world_size']},"
            f" and the running statistics that {reading[0][1]} reads would be others: {why}"
        )
    return config


def identified(config: dict[str, Any]) -> dict[str, Any]:
    """A checked config with ``weights``, by which a run with those of a file is known. Raises
    ValueError for a file that is none of weights, or holds others than are asked for."""
    if config["init_from"] is None:
        return config
    from normlab import weights

    return config | {"weights": weights.known(config["init_from"], config["weights"])}


def directory_of(config: dict[str, Any]) -> RunDir:
    """Where the run of a checked and identified config lies. Raises ValueError or OSError for a
    device or data that are not there."""
    from normlab import build

    device, data = build.device(config), build.data_of(config)
    digest = data.digest if data else ""
    name = run_id(config, device=device.type, data_digest=digest, kernels=config["kernels"])
    return RunDir(Path(config["runs"]) / name)


def _kernels(config: dict[str, Any]) -> AbstractContextManager[None]:
    """Within, norms use the fused kernels or not, as the config says; ValueError where it asks for
    kernels that are not there."""
    from normlab import build, kernels

    if config["kernels"]:
        if (device := build.device(config).type) != "cpu":
            raise ValueError(f"kernels=true: the fused kernels are for the CPU, not for {device}")
        why = kernels.unavailable() if kernels.enabled() else "NORMLAB_KERNELS=0 turns them off"
        if why:
            raise ValueError(f"kernels=true: no fused kernels here: {why}")
    return kernels.use(config["kernels"])


@cache
def _committed() -> dict[str, runs.Committed]:
    return runs.committed(RESULTS)


def committed_outcome(config: dict[str, Any], directory: RunDir) -> Outcome | None:
    """The outcome of a run that the committed results already hold whole, and ``runs=`` not."""
    from normlab import agenda

    found = _committed().get(directory.id) if config["skip_done"] == "all" else None
    here = directory.status().get("status")
    if found is None or here == "diverged":
        return None
    if here == "done" and not agenda.missing(config, directory):
        return None
    wanted = {(str(one), epoch) for epoch, one in agenda.wanted(config)}
    if found.status == "done" and not wanted <= found.measured():
        return None
    log.info("%s is among the committed results: skipped", directory.id)
    outcome = Outcome(
        directory.id, found.status, True, directory.path, last(found.evals), recorded=found.path,
        values=last(found.values),
    )  # fmt: skip
    if not set(config["ema_bank"]) <= {protocol.decay for protocol in agenda.protocols(config)}:
        return replace(
            outcome,
            lacking=f"ema_bank={config['ema_bank']}: {outcome.id} is "
            f"{outcome.place}, without its weights",
        )
    return outcome


def _run(config: dict[str, Any], directory: RunDir, *, memory_kept: bool) -> Outcome:
    from normlab import build, perform, worker

    if directory.status().get("status") in FINISHED:
        return _completed(config, directory)
    build.check_gpus(config)
    config = _with_tracked(config, directory)
    job = perform.construct(config) if is_task(config) else constructed(config)
    described = environment.describe(job) | {"memory_kept": memory_kept}
    if directory.checkpoint.exists():
        worker.check_resumable(config, directory)
        assert isinstance(job, worker.Job), "a task leaves no checkpoint"
        worker.check_environment(job, directory)
    with _locked(directory), _logging_to(directory):
        ours = directory.status().get("status") not in FINISHED
        if ours:  # and no other process has run it meanwhile
            _prepare(directory, config, described)
            formed = getattr(job, "plan", "a task")
            log.info("%s: %s, freed memory is kept: %s", directory.id, formed, memory_kept)
            if not config["launch"]:
                return _prepared(config, directory)
            _guarded(directory, lambda: _start(job, directory))
    outcome = _completed(config, directory)
    return replace(outcome, skipped=outcome.skipped and not ours)


def constructed(config: dict[str, Any]) -> "Job":
    """The objects of a run, or its refusal. The parent of ranks makes them on the CPU: the memory
    of a GPU is its rank's."""
    from normlab import build, worker

    if config["world_size"] == 1:
        return worker.construct(config)
    build.check_graphs(config)
    return replace(worker.construct(config | {"device": "cpu", "compile": False}), config=config)


def _completed(config: dict[str, Any], directory: RunDir) -> Outcome:
    """A finished run, once it has the measurements that it lacked and can still make, and its
    trackers what they lacked of them."""
    outcome = _measured(config, directory)
    if mirror.behind(directory, config):
        with _locked(directory), _logging_to(directory), mirror.following(directory, config):
            pass  # they are told at once
    return outcome


def _measured(config: dict[str, Any], directory: RunDir) -> Outcome:
    from normlab import agenda, checkpoint, worker

    missing, bank = agenda.missing(config, directory), set(config["ema_bank"])
    if directory.status()["status"] == "diverged":
        return outcome_of(directory, skipped=True)
    if not missing and (not bank or bank <= set(directory.config()["ema_bank"])):
        return outcome_of(directory, skipped=True)
    state = checkpoint.load(directory.checkpoint)
    lost = agenda.lost(config, directory, state)
    lacking = agenda.unobtainable(config, directory, state)
    possible = {str(one) for epoch, one in missing if (epoch, one) not in lost}
    if not possible:
        return replace(outcome_of(directory, skipped=True), lacking=lacking)
    asked = [str(protocol) for protocol in agenda.protocols(config)]
    job = worker.construct(
        config
        | ({} if config["epochs"] else {"init_from": None})  # the checkpoint holds them
        | {"evals": [spec for spec in asked if spec in possible]}
        | {"probes": [name for name in config["probes"] if name in possible]}
        | {"ema_bank": agenda.tracked_decays(state)}
    )
    worker.check_environment(job, directory)
    with _locked(directory), _logging_to(directory), checkpoint.deferred_signals() as stop:
        _set_threads(directory)
        _guarded(directory, lambda: worker.evaluate_finished(job, directory, stop))
    return replace(outcome_of(directory, skipped=False), lacking=lacking)


@contextmanager
def _locked(directory: RunDir) -> Iterator[None]:
    """Hold the run. To lose it to another process is a failure of this one, and writes nothing."""
    try:
        with directory.lock():
            yield
    except LeaseLost as error:
        raise JobError(str(error)) from None


def _with_tracked(config: dict[str, Any], directory: RunDir) -> dict[str, Any]:
    """The config with the EMA bank of the run it continues, which must not be dropped half-way."""
    from normlab import agenda, checkpoint

    if not directory.checkpoint.exists():
        return config
    tracked = agenda.tracked_decays(checkpoint.load(directory.checkpoint))
    return config | {"ema_bank": tracked} if set(config["ema_bank"]) <= set(tracked) else config


def _prepared(config: dict[str, Any], directory: RunDir) -> Outcome:
    from normlab.ranks import agent

    path, size = directory.path.resolve(), config["world_size"]
    line = agent.torchrun(path, size, max_restarts=config["max_restarts"])
    return Outcome(directory.id, "prepared", False, directory.path, {}, command=line)


def _start(job: "Job | Task", directory: RunDir) -> None:
    """The work of a run, in this process or by ranks that this process starts."""
    from normlab import checkpoint, perform, worker
    from normlab.ranks import agent

    config = job.config
    if config["world_size"] == 1:
        with checkpoint.deferred_signals() as stop:
            if isinstance(job, perform.Task):
                perform.perform(job, directory, stop)
            else:
                worker.finish(job, directory, stop)
        return
    threads, restarts = directory.env()["threads"], config["max_restarts"]
    agent.start(
        directory.path, config["world_size"], threads=threads, max_restarts=restarts,
        handed=lease.environment(directory.path),
    )  # fmt: skip


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
    recorded = with_later_keys(directory.config(), directory.path)
    config = recorded | {"evals": specs, "probes": []}
    if is_task(config):
        raise ValueError(f"run {directory.id} is of a task and left no network to evaluate")
    config["data_root"] = data_root or config["data_root"]
    config["device"] = directory.env().get("device", config["device"])
    check(config)
    status = directory.status().get("status", "unfinished")
    if status != "done":
        raise ValueError(f"run {directory.id} is {status}: only a finished run can be evaluated")
    with _kernels(config):
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


def _prepare(directory: RunDir, config: dict[str, Any], described: dict[str, Any]) -> None:
    """Write what describes the run, and set its threads; a resumed run keeps its first start's."""
    recorded = directory.env()
    if not recorded or not directory.checkpoint.exists():  # nothing of it is left to continue
        directory.clear()
        mirror.clear(directory)
        directory.write_config(config)
        _set_threads(directory, described["threads"])
        directory.write_env(described)
        return
    directory.clear_status()
    _set_threads(directory)
    if directory.config()["world_size"] != config["world_size"]:
        recorded |= {key: described[key] for key in ("world_size", "backend", "threads")}
        _record_ranks(directory, config, recorded)
        _set_threads(directory)
    if config["world_size"] > 1 or not config["launch"]:
        directory.write_config(config)  # where its ranks read what was asked for this time
    if described["source"] not in recorded["source"].split("+"):
        # Half of the run comes from other code: neither digest alone would be true.
        recorded["source"] += "+" + described["source"]
        recorded["dirty"] = recorded["dirty"] or described["dirty"]
        directory.write_env(recorded)


def _record_ranks(directory: RunDir, config: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Note from where on a run has another number of ranks, and make it what is planned."""
    from normlab import checkpoint

    at = checkpoint.load(directory.checkpoint)["position"]
    before = with_later_keys(directory.config())
    recorded.setdefault("world_sizes", [f"{before['world_size']} from epoch 1, step 0"])
    where = f"epoch {at['epoch'] + 1}, step {at['step']}"
    recorded["world_sizes"].append(f"{config['world_size']} from {where}")
    if why := other_statistics(before, config):
        recorded.setdefault("other_statistics", why)
    directory.write_config(config)
    directory.write_env(recorded)


def _set_threads(directory: RunDir, number: int | None = None) -> None:
    """As many threads as the run began with: sums depend on how they are split."""
    import torch

    environment.default_threads()
    torch.set_num_threads(number or directory.env()["threads"])


def _guarded(directory: RunDir, action: Callable[[], T]) -> T:
    """Run; an exception is logged with its traceback, recorded, and becomes one line."""
    try:
        return action()
    except LeaseLost:
        raise
    except Exception as error:
        from normlab import worker

        reason = worker.record_failure(directory, error)
        raise JobError(f"{directory.id} failed: {reason} (log: {directory.log})") from None


def _logging_to(directory: RunDir) -> AbstractContextManager[None]:
    """Append what normlab logs to the run's ``log.txt``."""
    return logs.logging_to(logs.LogFile(directory.log, directory.locked))
