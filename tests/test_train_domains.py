"""Training on several domains: whose samples share statistics, and whose population moves (3 s)."""

import copy

import pytest
import torch
import whole

from normlab import config, worker
from normlab.domains import Domain
from normlab.norms.base import population_layers
from normlab.norms.separate import domains

TWO = "domains=[none,invert-5]"


def step_of(job):
    """One step of a copy of the job's network, by hand: the labels of each sample are said."""
    model = copy.deepcopy(job.model).train()
    (x, y), *_ = job.data.train_batches(
        batch_size=64, seed=3, epoch=0, domains=[Domain(), Domain("invert", 5)]
    )
    size = job.plan.micro_batch
    for part_x, part_y in zip(x.split(size), y.split(size), strict=True):
        with domains(model, torch.arange(size) % 2):
            loss = torch.nn.functional.cross_entropy(model(part_x), part_y)
        (loss * size / 64).backward()
    return model


@pytest.mark.parametrize(
    "switches",
    [
        [],
        ["norm.share_statistics=true"],
        ["norm.share_population=true"],
        ["norm.share_affine=false", "nbs=16"],
    ],
)
def test_a_step_is_that_of_samples_whose_domains_are_said(switches):
    job = whole.made(["norm=separate", "norm.num_domains=2", TWO, *switches])
    twin = step_of(job)
    ours = whole.trainer(job)
    (x, y), *_ = job.data.train_batches(
        batch_size=64, seed=3, epoch=0, domains=ours.settings.domains
    )
    ours._train_step(x, y)
    for mine, theirs in zip(job.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(job.model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_specific_populations_move_apart_and_shared_statistics_are_batch_norms():
    job = whole.made(["norm=separate", "norm.num_domains=2", TWO])
    whole.trainer(job).train_epoch()
    first = next(iter(population_layers(job.model).values()))
    assert not torch.allclose(first.running_mean[0], first.running_mean[1], rtol=0.1)
    shared = ["norm.share_statistics=true", "norm.share_population=true"]
    apart = whole.made(["norm=separate", "norm.num_domains=2", TWO, *shared])
    plain = whole.made(["norm=bn", TWO])
    for one in (apart, plain):
        whole.trainer(one).train_epoch()
    for mine, theirs in zip(apart.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_an_epoch_counts_the_images_that_make_no_full_turn():
    job = whole.made(["norm=bn", "domains=[none,invert-5,tint-1]", "batch_size=48"])
    assert job.steps == 200 // 3 * 3 // 48
    assert job.dropped == 200 - job.steps * 48
    whole.trainer(job).train_epoch()


def test_adversarial_images_are_made_for_the_forward_that_follows():
    """As many as the batch has of that domain, within reach, against the labels' layers."""
    job = whole.made(
        ["norm=separate", "norm.num_domains=2", "domains=[none,pgd-8]", "evals=[val:ema]"]
    )
    ours = whole.trainer(job)
    seen = []
    job.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    (x, y), *_ = job.data.train_batches(batch_size=64, seed=3, epoch=0)
    ours._train_step(x, y)
    assert len(seen) == 5 + 1  # the attack's steps, and training
    assert torch.equal(seen[-1][::2], x[::2])
    low, high = job.data.extremes()
    reached = (seen[-1][1::2] - x[1::2]).abs().amax((1, 2, 3))
    assert (reached > 0).all()
    assert reached.max() <= 8 / 255 * (high - low).max() + 1e-6
    assert all(n == 1 for layer in population_layers(job.model).values()
               for n in layer.num_batches_tracked.tolist())  # fmt: skip


def test_ranks_train_on_domains_as_one_process(ranks):
    run = ["norm=separate", "norm.num_domains=2", TWO, "nbs=16", "evals=[val:ema/shift:invert-5]"]
    found = ranks.run(_trained, run, 4, timeout=120)
    alone = _trained(0, run, 1)
    for name, value in alone["model"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(found[0]["model"][name], value, rtol=1e-6, atol=1e-9)


def _trained(_rank, run, world_size):
    return whole.trained([*run, f"world_size={world_size}", "buffers=mean"])


def test_what_a_run_cannot_do_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match="no precise statistics of images that are made for"):
        worker.construct(config.compose(["scale=demo", "domains=[none,pgd-4]"]))
