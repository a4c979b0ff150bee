"""The schedules against the formulas written out, and against torch's own schedulers."""

import math

import pytest
import torch

from normlab.schedule import factor, scaled


def torch_factors(make, total):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    values = []
    for _ in range(total):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_cosine_is_torchs_cosine_annealing():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50), 50)
    got = [factor(s, 50, schedule="cosine", warmup=0.0) for s in range(50)]
    assert got == pytest.approx(expected, abs=1e-12)


def test_step_is_torchs_multi_step():
    make = lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [30, 60, 90], 0.1)  # noqa: E731
    got = [
        factor(s, 100, schedule="step", warmup=0.0, milestones=[0.3, 0.6, 0.9], gamma=0.1)
        for s in range(100)
    ]
    assert got == pytest.approx(torch_factors(make, 100), rel=1e-9)


def test_warm_up_rises_to_the_peak_at_its_last_step():
    got = [factor(s, 100, schedule="constant", warmup=0.05) for s in range(7)]
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_cosine_after_warm_up_starts_at_the_peak_and_ends_near_zero():
    assert factor(5, 100, schedule="cosine", warmup=0.05) == 1.0
    assert factor(99, 100, schedule="cosine", warmup=0.05) == pytest.approx(
        (1 + math.cos(math.pi * 94 / 95)) / 2
    )


def test_linear_scaling():
    assert scaled(0.1, batch_size=1024, lr_batch=256) == pytest.approx(0.4)
    assert scaled(0.1, batch_size=1024, lr_batch=None) == 0.1


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="linear"):
        factor(5, 10, schedule="linear", warmup=0.0)
