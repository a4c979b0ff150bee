"""One rank of a run: train what is left to train, evaluate what is left to evaluate.

``construct`` makes every object of a run and refuses what cannot work; ``work`` then runs in a
prepared run directory.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normlab import build, checkpoint
from normlab.batchplan import BatchPlan
from normlab.checkpoint import Stop
from normlab.data.base import Dataset
from normlab.evaluate import Evaluator
from normlab.population import EmaBank
from normlab.protocols import Protocol
from normlab.runs import RunDir
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
    data = build.data(config)
    per_epoch, dropped = build.steps(config, data)
    extra = plan.virtual_extra * plan.accumulation
    if extra > data.size("train"):
        raise ValueError(
            f"nbs={plan.nbs}: a step needs {extra} forward-only images (virtual_extra="
            f"{plan.virtual_extra}, accumulation={plan.accumulation}), and there are only"
            f" {data.size('train')} training images"
        )
    try:
        model = build.model(config, data)
    except RuntimeError as error:  # too large for the memory, or a shape the network cannot take
        raise ValueError(f"model={config['model']['name']}: {str(error).splitlines()[0]}") from None
    bank = EmaBank(model, config["ema_bank"]) if config["ema_bank"] else None
    job = Job(config, plan, data, model, build.optimizer(config, model), bank, per_epoch, dropped)
    check = evaluator(job, Stop()).check
    for protocol in protocols(config):
        check(protocol)
    return job


def evaluator(job: Job, stop: Stop) -> Evaluator:
    """What evaluates the job's model as it now is; it ends between batches when asked to stop."""
    return Evaluator(
        job.model,
        job.data,
        nbs=job.plan.nbs,
        batch_size=job.plan.batch_size,
        seed=job.config["seed"],
        device=build.device(job.config),
        channels_last=job.config["channels_last"],
        precision=job.config["precision"],
        bank=job.bank,
        tick=stop.raise_if_asked,
    )


def protocols(config: dict[str, Any]) -> list[Protocol]:
    """The evaluations a config asks for."""
    return [Protocol.parse(spec) for spec in config["evals"]]


def wanted_evals(config: dict[str, Any]) -> list[tuple[int, Protocol]]:
    """The evaluations a run shall have in the end, by epoch."""
    epochs = range(max(1, config["epochs"] - config["eval_last"] + 1), config["epochs"] + 1)
    return [(epoch, protocol) for epoch in epochs for protocol in protocols(config)]


def missing_evals(config: dict[str, Any], run: RunDir) -> list[tuple[int, Protocol]]:
    """The evaluations a run asks for and has not made, by epoch."""
    have = {(row["protocol"], int(row["epoch"])) for row in run.evals()}
    return [(epoch, p) for epoch, p in wanted_evals(config) if (str(p), epoch) not in have]


def check_resumable(job: Job, run: RunDir) -> None:
    """Refuse to continue a run that cannot give what the config asks for.

    Raises ValueError for an unreadable checkpoint, for evaluations of epochs whose weights were not
    kept, and for an EMA bank that was not tracked from the start.
    """
    state = checkpoint.load(run.checkpoint)
    anew = f"delete {run.path} to train it anew, or give another runs="
    if job.bank and (not state["ema_bank"] or state["ema_bank"]["decays"] != list(job.bank.decays)):
        tracked = state["ema_bank"]["decays"] if state["ema_bank"] else []
        raise ValueError(
            f"ema_bank={job.config['ema_bank']}: run {run.id} has tracked {tracked}; {anew}"
        )
    passed = state["position"]["epoch"]
    lost = {
        e for e, _ in missing_evals(job.config, run) if e < passed and not run.snapshot(e).exists()
    }
    if lost:
        raise ValueError(
            f"eval_last={job.config['eval_last']}: run {run.id} has not kept the weights of "
            f"epoch {min(lost)}; {anew}"
        )


def work(job: Job, run: RunDir, stop: Stop) -> dict[str, Any]:
    """Train and evaluate to the end; returns the status to record (done or diverged).

    Resumes from the run's checkpoint. When ``stop`` is asked for, saves and raises.
    """
    config = job.config
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
        forward=torch.compile(job.model) if config["compile"] else None,
    )
    if run.checkpoint.exists():
        trainer.load_state_dict(checkpoint.load(run.checkpoint))
        log.info("resumed at epoch %d, step %d", trainer.epoch + 1, trainer.step)
    elif job.dropped:
        log.info("each epoch drops %d of %d samples", job.dropped, job.data.size("train"))
    first_evaluated = config["epochs"] - config["eval_last"] + 1
    try:
        while True:
            # Evaluate the epoch that has just ended, if it is one of the last ones.
            if trainer.step == 0 and trainer.epoch >= max(1, first_evaluated):
                evaluate_epoch(job, run, trainer.epoch, trainer.history, stop)
            if trainer.epoch == config["epochs"]:
                break
            trainer.train_epoch()
            run.write_metrics(trainer.history)
            # The weights of an evaluated epoch must outlive a kill, and the epochs after it.
            if trainer.epoch >= first_evaluated:
                if trainer.epoch < config["epochs"]:
                    checkpoint.save(run.snapshot(trainer.epoch), _snapshot(trainer))
                trainer.save()
    except Diverged as error:
        log.warning("diverged: %s", error)
        ended = {"status": "diverged", "reason": str(error), "seconds": trainer.elapsed}
        return ended | trainer.last
    return {"status": "done", "seconds": trainer.elapsed} | trainer.history[-1]


def _snapshot(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    return {key: state[key] for key in ("model", "ema_bank", "position")}


def evaluate_epoch(
    job: Job, run: RunDir, epoch: int, history: list[dict[str, Any]], stop: Stop
) -> None:
    """Make the evaluations that this epoch still lacks, with the weights the model holds."""
    evaluate = evaluator(job, stop)
    for due, protocol in missing_evals(job.config, run):
        if due != epoch:
            continue
        if protocol.statistics == "augmented":
            row = history[epoch - 1]
            seen = job.steps * job.plan.batch_size
            numbers = {"n": seen, "error": row["train_error"], "loss": row["train_loss"]}
            row = {
                "protocol": str(protocol),
                "split": "train",
                "statistics": "augmented",
                **numbers,
            }
        else:
            row = evaluate.run(protocol)
        run.add_eval({"epoch": epoch, **row})
        log.info("epoch %d, %s: error %.2f %% (n=%d)", epoch, protocol, row["error"], row["n"])


def evaluate_finished(job: Job, run: RunDir, stop: Stop) -> None:
    """Make the evaluations that a finished run lacks, from its checkpoint and snapshots."""
    final = checkpoint.load(run.checkpoint)
    for epoch in sorted({epoch for epoch, _ in missing_evals(job.config, run)}):
        last = epoch == final["position"]["epoch"]
        state = final if last else checkpoint.load(run.snapshot(epoch))
        job.model.load_state_dict(state["model"])
        if job.bank:
            job.bank.load_state_dict(state["ema_bank"])
        evaluate_epoch(job, run, epoch, final["history"], stop)
