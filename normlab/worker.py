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
from normlab.batchplan import BatchPlan, steps
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
    per_epoch, dropped = steps(data.size("train"), plan, config["remainder"])
    model = build.model(config, data)
    bank = EmaBank(model, config["ema_bank"]) if config["ema_bank"] else None
    return Job(config, plan, data, model, build.optimizer(config, model), bank, per_epoch, dropped)


def missing_evals(config: dict[str, Any], run: RunDir) -> list[tuple[int, Protocol]]:
    """The evaluations a run asks for and has not made, by epoch."""
    have = {(row["protocol"], int(row["epoch"])) for row in run.evals()}
    wanted = [Protocol.parse(spec) for spec in config["evals"]]
    epochs = range(max(1, config["epochs"] - config["eval_last"] + 1), config["epochs"] + 1)
    return [(e, p) for e in epochs for p in wanted if (str(p), e) not in have]


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
        last = trainer.history[-1] if trainer.history else {}
        return {"status": "diverged", "reason": str(error), "seconds": trainer.elapsed} | last
    return {"status": "done", "seconds": trainer.elapsed} | trainer.history[-1]


def _snapshot(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state_dict()
    return {key: state[key] for key in ("model", "ema_bank", "position")}


def evaluate_epoch(
    job: Job, run: RunDir, epoch: int, history: list[dict[str, Any]], stop: Stop
) -> None:
    """Make the evaluations that this epoch still lacks, with the weights the model holds."""
    evaluator = Evaluator(
        job.model,
        job.data,
        nbs=job.plan.nbs,
        seed=job.config["seed"],
        device=build.device(job.config),
        channels_last=job.config["channels_last"],
        precision=job.config["precision"],
        bank=job.bank,
        tick=stop.raise_if_asked,
    )
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
            row = evaluator.run(protocol)
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
            if not state["ema_bank"]:
                raise ValueError(f"run {run.id} tracked no ema_bank: train it anew to have one")
            job.bank.load_state_dict(state["ema_bank"])
        evaluate_epoch(job, run, epoch, final["history"], stop)
