"""One rank of a run: train what is left to train, evaluate what is left to evaluate.

``construct`` makes every object of a run and refuses what cannot work; ``work`` then runs in a
prepared run directory. ``python -m normlab.worker RUN_DIR`` does both, as one of the run's ranks.
"""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normlab import (
    adversarial,
    agenda,
    agreement,
    allocator,
    build,
    checkpoint,
    dist,
    freezing,
    kernels,
    logs,
    ranks,
)
from normlab.agenda import Due, Measurement
from normlab.batchplan import BatchPlan
from normlab.checkpoint import Stop
from normlab.config import with_later_keys
from normlab.data.base import Dataset
from normlab.evaluate import Evaluator
from normlab.lease import LeaseLost
from normlab.norms.base import population_layers
from normlab.population import EmaBank, freeze
from normlab.probes.base import Context
from normlab.protocols import Protocol
from normlab.runs import FINISHED, RunDir
from normlab.trackers import mirror
from normlab.train import Diverged, Trainer

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A run's objects, before anything is written."""

    config: dict[str, Any]
    plan: BatchPlan
    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    bank: EmaBank | None
    steps: int
    dropped: int


def construct(config: dict[str, Any]) -> Job:
    """Build everything a run needs. Raises ValueError or OSError with one clear line."""
    plan = build.plan(config)
    build.check_graphs(config)
    data = build.data(config)
    per_epoch, dropped = build.steps(config, data)
    extra = plan.virtual_extra * plan.accumulation * plan.world_size
    if extra > data.size("train"):
        raise ValueError(
            f"nbs={plan.nbs}: a step needs {extra} forward-only images (virtual_extra="
            f"{plan.virtual_extra}, accumulation={plan.accumulation}, world_size="
            f"{plan.world_size}), and there are only {data.size('train')} training images"
        )
    try:
        model = build.model(config, data)
    except RuntimeError as error:  # too large for the memory, or a shape the network cannot take
        raise ValueError(f"model={config['model']['name']}: {str(error).splitlines()[0]}") from None
    pools = all(layer.pools for layer in population_layers(model).values())
    if plan.world_size > 1 and config["buffers"] == "average" and not pools:
        raise ValueError(
            f"buffers=average pools means and variances, and the statistic of norm="
            f"{config['norm']['name']} is no variance: buffers=mean or buffers=broadcast"
        )
    data.check_domains(build.domains(config))
    adversarial.adversary(model, build.domains(config), data)
    bank = EmaBank(model, config["ema_bank"]) if config["ema_bank"] else None
    job = Job(config, plan, data, model, build.optimizer(config, model), bank, per_epoch, dropped)
    check = evaluator(job, Stop()).check
    for protocol in agenda.protocols(config):
        check(protocol)
    build.check_probes(config, context(job, 0))
    return job


def evaluator(job: Job, stop: Stop) -> Evaluator:
    """What evaluates the job's model as it now is; alone, it ends between batches when asked to
    stop, and several ranks go on to the end of an evaluation."""

    def lives() -> None:
        stop.looks += 1

    return Evaluator(
        job.model,
        job.data,
        nbs=job.plan.nbs,
        batch_size=job.plan.batch_size,
        order=build.settings(job.config).order,
        domains=build.domains(job.config),
        seed=job.config["seed"],
        device=build.device(job.config),
        channels_last=job.config["channels_last"],
        precision=job.config["precision"],
        bank=job.bank,
        tick=stop.raise_if_asked if dist.place()[1] == 1 else lives,
    )


def check_resumable(config: dict[str, Any], run: RunDir) -> None:
    """Refuse to continue an unfinished run that cannot give what the config asks for.

    Raises ValueError for an unreadable checkpoint, for evaluations of epochs whose weights were not
    kept, and for an EMA bank that was not tracked from the start.
    """
    if refusal := agenda.unobtainable(config, run, checkpoint.load(run.checkpoint)):
        raise ValueError(refusal)


def work(job: Job, run: RunDir, stop: Stop) -> dict[str, Any]:
    """Train and evaluate to the end; returns the status to record (done or diverged).

    Resumes from the run's checkpoint. When ``stop`` is asked for, saves and raises. All ranks of
    the run work together; the first alone writes into the directory.
    """
    config, device = job.config, build.device(job.config)
    measured = agenda.epochs(config)
    trainer = Trainer(
        model=job.model,
        optimizer=job.optimizer,
        data=job.data,
        plan=job.plan,
        steps=job.steps,
        settings=build.settings(config),
        path=run.checkpoint,
        stop=stop,
        bank=job.bank,
        forward=build.compiled(config, job.model),
        adversary=adversarial.adversary(job.model, build.domains(config), job.data),
    )
    if any(agreement.told([run.checkpoint.exists()], device)):
        trainer.load_state_dict(checkpoint.load(run.checkpoint))
        agreement.check_same({"epoch and step": trainer.position}, device)
        log.info("resumed at epoch %d, step %d", trainer.epoch + 1, trainer.step)
    elif begun := freezing.beginning(config, run, device, first_needed=min(measured)):
        trainer.load_state_dict(checkpoint.load(begun.kept(config["freeze_after"])))
        log.info("begins where %s was after epoch %d", begun.id, trainer.epoch)
    elif config["epochs"] == 0:
        trainer.save()  # what is measured from here on outlives a kill
    elif job.dropped:
        log.info("each epoch drops %d of %d samples", job.dropped, job.data.size("train"))
    try:
        while True:
            # Measure what is asked for after the epoch that has just ended, or before the first.
            if trainer.step == 0 and trainer.epoch in measured:
                due = [one for at, one in _missing(config, run, device) if at == trainer.epoch]
                evaluate_epoch(job, run, trainer.epoch, due, trainer.history, stop)
            if trainer.epoch == config["epochs"]:
                break
            if freezing.due(config, trainer):
                freezing.carry_out(config, trainer, evaluator(job, stop).precise)
            trainer.train_epoch()
            agreement.by_first(lambda: run.write_metrics(trainer.history), device)
            # The weights of an evaluated epoch must outlive a kill, and the epochs after it.
            if trainer.epoch == config["keep_after"]:
                state, path = trainer.state_dict(), run.kept(trainer.epoch)
                agreement.by_first(partial(checkpoint.save, path, state), device)
            if trainer.epoch in measured:
                if trainer.epoch < config["epochs"]:
                    kept = partial(checkpoint.save, run.snapshot(trainer.epoch), _snapshot(trainer))
                    agreement.by_first(kept, device)
                trainer.save()
    except Diverged as error:
        log.warning("diverged: %s", error)
        ended = {"status": "diverged", "reason": str(error), "seconds": trainer.elapsed}
        return ended | trainer.last
    return {"status": "done", "seconds": trainer.elapsed} | [{"epoch": 0}, *trainer.history][-1]


def _missing(config: dict[str, Any], run: RunDir, device: torch.device) -> list[Due]:
    """`agenda.missing` as the first rank finds it, whatever it has written since."""
    wanted, missing = agenda.wanted(config), agenda.missing(config, run)
    told = agreement.told([one in missing for one in wanted], device)
    return [one for one, lacks in zip(wanted, told, strict=True) if lacks]


def _snapshot(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    return {key: state[key] for key in ("model", "ema_bank", "position")}


def context(job: Job, epoch: int) -> Context:
    """What a probe is given: the job's model as it now is, which is that of an epoch."""
    return Context(
        model=job.model,
        data=job.data,
        plan=job.plan,
        seed=job.config["seed"],
        device=build.device(job.config),
        channels_last=job.config["channels_last"],
        precision=job.config["precision"],
        epoch=epoch,
    )


def evaluate_epoch(
    job: Job,
    run: RunDir,
    epoch: int,
    due: list[Measurement],
    history: list[dict[str, Any]],
    stop: Stop,
) -> None:
    """Make the evaluations and probes of an epoch that are due, with the weights the model holds.

    A probe is made by a process that is alone: that of several ranks are made once they have
    ended, of the weights they have kept.
    """
    evaluate, device = evaluator(job, stop), build.device(job.config)
    banked = job.bank.tensors() if job.bank else {}
    agreement.check_same(job.model.state_dict() | banked, device)
    for one in due:
        if stop.look():
            stop.end_if_settled()
        if isinstance(one, str):
            if dist.place()[1] == 1:
                _probe(job, run, epoch, one)
            continue
        trained = one.statistics == "augmented"
        row = _of_training(job, history[epoch - 1], one) if trained else evaluate.run(one)
        agreement.by_first(partial(run.add_eval, {"epoch": epoch, **row}), device)
        log.info("epoch %d, %s: error %.2f %% (n=%d)", epoch, one, row["error"], row["n"])


def _of_training(job: Job, epoch: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """The row of what training itself has measured in an epoch."""
    told = {"protocol": str(protocol), "split": "train", "statistics": "augmented"}
    seen = job.steps * job.plan.batch_size
    return told | {"n": seen, "error": epoch["train_error"], "loss": epoch["train_loss"]}


def _probe(job: Job, run: RunDir, epoch: int, name: str) -> None:
    """Measure a probe, and write its quantities together: it is made, or it is not."""
    measured = build.probe(name)(context(job, epoch))
    run.add_probe(name, [(epoch, quantity, value) for quantity, value in measured.items()])
    said = "  ".join(f"{quantity} {value:.4g}" for quantity, value in measured.items())
    log.info("epoch %d, %s: %s", epoch, name, said)


def evaluate_finished(job: Job, run: RunDir, stop: Stop) -> None:
    """Measure what a finished run lacks, as far as its checkpoint, its snapshots and its history
    can give it. The job's model is still that of epoch 0."""
    final = checkpoint.load(run.checkpoint)
    lost, device = agenda.lost(job.config, run, final), build.device(job.config)
    possible = [one for one in _missing(job.config, run, device) if one not in lost]
    for epoch in sorted({epoch for epoch, _ in possible}):
        last = epoch == final["position"]["epoch"]
        if last or run.snapshot(epoch).exists():
            state = final if last else checkpoint.load(run.snapshot(epoch))
            job.model.load_state_dict(state["model"])
            if job.bank:
                job.bank.load_state_dict(state["ema_bank"])
        if freezing.is_frozen(job.config, epoch):
            freeze(job.model)
        due = [one for e, one in possible if e == epoch]
        evaluate_epoch(job, run, epoch, due, final["history"], stop)


def finish(job: Job, run: RunDir, stop: Stop) -> None:
    """Do a run's work, and record that it has ended."""
    if dist.place()[0] > 0:
        work(job, run, stop)
        return
    with mirror.following(run, job.config) as followed:
        status = work(job, followed, stop)
        run.write_env(run.env() | {"ended": now()})
        run.write_status(status)
        if told := agenda.left_to_one_process(job.config, run):
            log.info(told)


def now() -> str:
    """The time, as run directories state it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_environment(job: Job, run: RunDir) -> None:
    """Refuse to continue or evaluate a run under what would make other numbers."""
    recorded = run.env()
    for key, name, here in (
        ("torch", "torch", torch.__version__),
        ("data_digest", "data", job.data.digest),
        ("device", "device", build.device(job.config).type),
    ):
        if recorded.get(key) != here:
            raise ValueError(
                f"run {run.id} was made with {name} {recorded.get(key)}, and this is "
                f"{here}: use that, or give another runs= to train it anew"
            )


def record_failure(run: RunDir, error: Exception) -> str:
    """Log an exception with its traceback and make it the run's status; returns it in a line."""
    log.error("%s failed", run.id, exc_info=error)
    reason = ranks.one_line(error)
    with suppress(OSError):  # what failed may be the disk
        if run.status().get("status") not in FINISHED:
            run.write_status({"status": "failed", "reason": reason})
    return reason


# -- one rank, as a process -----------------------------------------------------------------------


def main(run_dir: str, *, act: Callable[[Job, RunDir, Stop], None] = finish) -> None:
    """One rank of a prepared run, all of which are started alike; or the run's only process.

    act: what they do with the run, once they have joined. Raises ValueError, before anything is
    written, for a directory that holds no prepared run and for another number of ranks than its.
    """
    run = RunDir(Path(run_dir))
    config = with_later_keys(run.config(), run.path)
    rank, size = ranks.place()
    if size != config["world_size"]:
        raise ValueError(
            f"run {run.id} has world_size={config['world_size']}, and {size} ranks were started"
        )
    if not run.env():
        raise ValueError(f"run {run.id} is not prepared: normlab train ... launch=false does that")
    if run.status().get("status") in FINISHED:
        return
    ranks.prepare()
    with logs.logging_to(logging.StreamHandler()), ExitStack() as opened:
        if rank == 0:
            opened.enter_context(logs.logging_to(logs.LogFile(run.log, run.locked)))
        try:
            # Whoever has started the ranks hands its lease to the first one; else that takes it.
            with run.lock() if rank == 0 else nullcontext():
                try:
                    _take_part(config, run, rank, act)
                except LeaseLost:
                    raise  # the run is another process's now, and so is its status
                except Exception as error:
                    if rank == 0 and not ranks.launched():
                        record_failure(run, error)
                    raise
        except BaseException as error:
            ranks.ended_by(error)


def _take_part(
    config: dict[str, Any], run: RunDir, rank: int, act: Callable[[Job, RunDir, Stop], None]
) -> None:
    """Join the other ranks and do this one's part of the run."""
    if rank == 0:
        run.clear_status()
    if config["allocator"] == "keep":
        allocator.keep_freed_memory()
    torch.set_num_threads(run.env()["threads"])
    cuda, timeout = build.device(config).type == "cuda", config["stall_timeout"]
    with (
        ranks.watched(timeout=timeout) as follow,  # the first: some may never come
        ranks.joined(cuda=cuda, timeout=timeout) as control,
        checkpoint.deferred_signals(control) as stop,
    ):
        follow(stop)
        if ranks.restarts():
            log.warning("all ranks were started again after a failure: %d", ranks.restarts())
        with kernels.use(config["kernels"]):
            job = construct(config)
            check_environment(job, run)
            act(job, run, stop)


if __name__ == "__main__":
    from normlab import worker  # and not this module's copy of it

    try:
        worker.main(*sys.argv[1:])
    except (ValueError, OSError, TypeError) as refused:
        print(f"normlab: {refused}", file=sys.stderr)
        sys.exit(2)
