"""Four ranks evaluate together: one process's numbers, each sample once, the same row on all."""

import pytest
import torch
import whole

from normlab import agenda, checkpoint, worker
from normlab.norms.base import population_layers

PROTOCOLS = [
    "val:ema", "val:ema/decay:0.5", "val:batch", "val:batch/batch:7", "val:batch/batch:32/order:2",
    "val:batch/pattern:2x4", "train:batch", "val:precise", "val:precise/samples:24/batch:8",
    "val:precise_mean/batch:20", "val:precise_layerwise/samples:48/batch:16", "test:ema",
    "val:ema/decay:0.5/corrected:true",
]  # fmt: skip


def rows(_rank, norm, world_size):
    """All protocols, of a network with other statistics than those of its start."""
    evals = f"evals=[{','.join(PROTOCOLS)}]"
    job = whole.made([*norm, f"world_size={world_size}", "ema_bank=[0.5]", evals])
    for number, layer in enumerate(population_layers(job.model).values()):
        layer.running_mean.add_(0.1 * number)
        layer.running_var.mul_(2.0)
    whole.trainer(job)._train_step(*first(job))
    if job.bank and world_size > 1:
        job.bank.average("mean")
        worker.dist.average_buffers(job.model, how="mean")
    evaluate = worker.evaluator(job, checkpoint.Stop())
    state = torch.get_rng_state()
    found = [evaluate.run(protocol) for protocol in agenda.protocols(job.config)]
    assert torch.equal(torch.get_rng_state(), state)
    return found


def first(job):
    rank, _ = worker.dist.place()
    places = [place for part in job.plan.parts(rank) for place in part]
    return next(iter(job.data.train_batches(batch_size=64, seed=3, epoch=0, places=places)))


@pytest.mark.parametrize(
    ("over_ranks", "alone"),
    [(["norm=bn", "nbs=16"], ["norm=ghost", "nbs=16"]), (["norm=sync"], ["norm=bn"])],
)
def test_ranks_evaluate_as_one_process(ranks, over_ranks, alone):
    """P34, P36: shares that are unequal, and empty where there are fewer batches than ranks."""
    found = ranks.run(rows, over_ranks, 4, timeout=120)
    assert found[1:] == found[:-1]
    for row, expected in zip(found[0], rows(0, alone, 1), strict=True):
        close = pytest.approx(expected["loss"], rel=1e-12)
        assert row == {**expected, "loss": close}, row["protocol"]
