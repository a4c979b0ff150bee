"""One run's training as ranks do it and as one process does, in float64, for tests."""

import hashlib
from pathlib import Path

from normlab import adversarial, agenda, build, checkpoint, config, worker
from normlab.train import Trainer


class Doubled:
    """A data set whose images are float64."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def train_batches(self, **options):
        return ((x.double(), y) for x, y in self._dataset.train_batches(**options))

    def eval_batches(self, *arguments, **options):
        batches = self._dataset.eval_batches(*arguments, **options)
        return ((x.double(), y) for x, y in batches)


def resolved(*overrides):
    """A run of one epoch on the digits, on the CPU."""
    fixed = ["scale=demo", "device=cpu", "threads=1", "epochs=1", "batch_size=64", "seed=3"]
    return config.compose([*fixed, "data.augment=crop", "data.subset=200", *overrides])


def made(overrides, double=True):
    """The job that the overrides describe, in float64."""
    job = worker.construct(resolved(*overrides))
    if double:
        job.model.double()
        job.data = Doubled(job.data)
    return job


def trainer(job, path=Path("never-written")):
    return Trainer(
        model=job.model, optimizer=job.optimizer, data=job.data, plan=job.plan, steps=job.steps,
        settings=build.settings(job.config), path=path, stop=checkpoint.Stop(), bank=job.bank,
        forward=build.compiled(job.config, job.model),
        adversary=adversarial.adversary(job.model, build.domains(job.config), job.data),
    )  # fmt: skip


def trained(overrides):
    """What an epoch leaves behind: the network, its history, and its evaluations."""
    job = made(overrides)
    ours = trainer(job)
    ours.train_epoch()
    evaluate = worker.evaluator(job, checkpoint.Stop())
    rows = [evaluate.run(protocol) for protocol in agenda.protocols(job.config)]
    return {
        "model": {name: value.clone() for name, value in job.model.state_dict().items()},
        "bank": job.bank.tensors() if job.bank else {},
        "history": ours.history,
        "rows": rows,
    }


def digest(state):
    """A fingerprint of tensors by name, in bits."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(name.encode() + value.contiguous().numpy().tobytes())
    return total.hexdigest()
