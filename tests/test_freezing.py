"""Batch norms that become constant in the middle of a training, as values and in whole runs."""

import csv
import re

import numpy as np
import pytest
import torch
from oracles import frozen
from populations import everything, network
from torch import nn

from normlab import config, launch, runs, worker
from normlab.norms import BatchNorm, BatchRenorm, GhostBatchNorm, normalization
from normlab.norms.base import population_layers
from normlab.population import Statistics, freeze

JOB = ["scale=demo", "norm=ghost", "nbs=8", "batch_size=64", "epochs=4", "device=cpu", "threads=1",
       "allocator=system", "evals=[train:augmented,val:ema,val:precise,val:batch]"]  # fmt: skip


def given(channels):
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(channels, dtype=torch.float64, generator=generator)
    return Statistics(mean, mean.abs() + 0.5, 10)


@pytest.mark.parametrize(
    "made", [lambda: BatchNorm(3), lambda: GhostBatchNorm(3, nbs=2), lambda: BatchRenorm(3, nbs=2)]
)
@pytest.mark.parametrize("affine", ["trainable", "frozen"])
def test_a_frozen_layer_is_the_formula(made, affine):
    layer = made().double().train()
    values = given(3)
    freeze(layer, {"": values}, affine=affine)
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    layer.train()(x).backward(dy)
    y, dx, dweight, dbias = frozen.forward_backward(
        x.detach().numpy(), dy.numpy(), values.mean.numpy(), values.var.numpy(),
        layer.weight.detach().numpy(), layer.bias.detach().numpy(), layer.eps,
    )  # fmt: skip
    np.testing.assert_allclose(layer(x).detach().numpy(), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=1e-12, atol=1e-12)
    if affine == "frozen":
        assert layer.weight.grad is layer.bias.grad is None
    else:
        np.testing.assert_allclose(layer.weight.grad.numpy(), dweight, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(layer.bias.grad.numpy(), dbias, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.running_mean, values.mean)
    assert torch.equal(layer.running_var, values.var)
    assert layer.num_batches_tracked == 0


def test_it_stays_so_through_contexts_and_keeps_what_it_has():
    model = network()
    held = {name: layer.running_var.clone() for name, layer in population_layers(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freeze(model)
    x = torch.randn(4, 2, 9, 9)
    with normalization(model, statistics="batch", update=True):
        model.train()(x).sum().backward()
    optimizer.step()
    for name, layer in population_layers(model).items():
        assert torch.equal(layer.running_var, held[name])
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == known


@pytest.mark.parametrize(
    ("model", "population", "affine", "says"),
    [
        (network(), {}, "none", "'trainable' or 'frozen', not 'none'"),
        (network(), {"1": given(3)}, "trainable", "1 has 4 channels"),
        (nn.Sequential(BatchNorm(3), nn.BatchNorm2d(3)), {}, "trainable", "1 is torch's"),
    ],
)
def test_refusals_change_nothing(model, population, affine, says):
    before = everything(model)[0]
    with pytest.raises(ValueError, match=says):
        freeze(model, population, affine=affine)
    assert everything(model)[0] == before


# -- whole runs ------------------------------------------------------------------------------------


def start(*overrides):
    return launch.run(config.compose([*JOB, *overrides]))


def state(outcome, name="checkpoint.pt"):
    return torch.load(outcome.path / name, weights_only=True)


def rows(outcome, name):
    with (outcome.path / name).open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_end(one, other):
    assert rows(one, "metrics.csv") == rows(other, "metrics.csv")
    assert rows(one, "evals.csv") == rows(other, "evals.csv")
    ours, theirs = state(one), state(other)
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in ours["model"])
    momenta = [s["optimizer"]["state"] for s in (ours, theirs)]
    assert all(
        torch.equal(momenta[0][key]["momentum_buffer"], momenta[1][key]["momentum_buffer"])
        for key in momenta[0]
    )


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("affine", ["trainable", "frozen"])
def test_statistics_and_affine_are_constants_from_the_switch_on(affine):
    whole = start("keep_after=2")
    ours = start("freeze_after=2", f"freeze_affine={affine}")
    assert re.match(r"tiny-ghost-nbs8-frozen2-s0-", ours.id)
    kept, end = state(whole, "state-2.pt")["model"], state(ours)["model"]
    moved = {key for key in kept if not torch.equal(kept[key], end[key])}
    statistics = {key for key in kept if key.endswith(("running_mean", "running_var"))}
    assert statistics <= moved, "they were estimated at the switch"
    counts = {key for key in kept if key.endswith("num_batches_tracked")}
    assert not counts & moved
    layers = {key.removesuffix("running_mean") for key in kept if key.endswith("running_mean")}
    norms = {layer + part for layer in layers for part in ("weight", "bias")}
    assert (not norms & moved) if affine == "frozen" else norms <= moved
    # There is one set of statistics: every protocol is the network's plain forward.
    errors = {row["protocol"]: row["loss"] for row in rows(ours, "evals.csv")}
    assert errors["val:ema"] == errors["val:precise"] == errors["val:batch"]
    assert rows(ours, "metrics.csv")[:2] == rows(whole, "metrics.csv")[:2]
    assert rows(ours, "metrics.csv")[2] != rows(whole, "metrics.csv")[2]


@pytest.mark.usefixtures("elsewhere")
def test_the_statistics_of_the_ema_are_those_of_the_switch():
    whole = start("keep_after=2")
    end = state(start("freeze_after=2", "freeze_statistics=ema"))["model"]
    kept = state(whole, "state-2.pt")["model"]
    same = [torch.equal(kept[key], end[key]) for key in kept if "running" in key]
    assert same
    assert all(same)


@pytest.mark.usefixtures("elsewhere")
def test_a_run_that_begins_where_another_was_ends_as_if_it_had_trained_all(monkeypatch):
    made = []
    step = worker.Trainer._train_step
    monkeypatch.setattr(worker.Trainer, "_train_step", lambda *a: (made.append(1), step(*a))[1])
    alone = start("freeze_after=2", "runs=alone", "eval_last=2")
    assert len(made) == 4 * (per_epoch := len(made) // 4)
    start("keep_after=2")
    made.clear()
    ours = start("freeze_after=2", "eval_last=2")
    assert len(made) == 2 * per_epoch
    assert "begins where tiny-ghost-nbs8-s0-" in (ours.path / "log.txt").read_text()
    assert_same_end(ours, alone)
    # Evaluations from before the switch need weights that the other run does not hold.
    made.clear()
    start("freeze_after=2", "freeze_affine=frozen", "eval_last=4")
    assert len(made) == 4 * per_epoch


@pytest.mark.usefixtures("elsewhere")
def test_no_run_begins_where_other_ranks_have_been():
    """They have added in another order, and may have moved its running statistics otherwise."""
    other = runs.RunDir(start("keep_after=2").path)
    other.write_env(other.env() | {"world_sizes": ["1 from epoch 1, step 0"]})
    assert "begins where" not in (start("freeze_after=2").path / "log.txt").read_text()


@pytest.mark.usefixtures("elsewhere")
def test_a_run_stopped_among_its_frozen_epochs_resumes_frozen(monkeypatch):
    alone = start("freeze_after=2", "runs=alone")
    step, seen = worker.Trainer._train_step, []

    def stop_once(trainer, *args):
        step(trainer, *args)
        seen.append(trainer.epoch)
        if seen.count(2) == 3:
            trainer.stop.signal = trainer.stop.settled = 15

    with monkeypatch.context() as patched:
        patched.setattr(worker.Trainer, "_train_step", stop_once)
        with pytest.raises(SystemExit):
            start("freeze_after=2", "checkpoint_every=0")
    assert_same_end(start("freeze_after=2", "checkpoint_every=0"), alone)


@pytest.mark.usefixtures("elsewhere")
def test_evaluating_later_is_evaluating_at_once():
    at_once = start("freeze_after=2", "eval_last=2", "runs=a")
    later = start("freeze_after=2", "eval_last=2", "evals=[val:ema]")
    later = launch.evaluate(later.id, ["train:augmented", "val:precise", "val:batch"], root="runs")

    def errors(outcome):
        return {(r["epoch"], r["protocol"]): r["loss"] for r in rows(outcome, "evals.csv")}

    assert errors(later) == errors(at_once)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["freeze_after=4"], "freeze_after must be below epochs=4, got freeze_after=4"),
        (["keep_after=9"], "keep_after must be below epochs=4, got keep_after=9"),
        (["freeze_after=0"], "freeze_after must be at least 1"),
        (["freeze_after=2", "norm=gn", "nbs=null"], "norm=gn has none that batches move"),
        (["freeze_after=2", "norm=frozen", "nbs=null"], "norm=frozen has none that batches move"),
        (["freeze_affine=none"], "freeze_affine must be one of trainable, frozen"),
        (["freeze_statistics=batch"], "freeze_statistics must be one of precise, ema"),
    ],
)
def test_what_cannot_be_frozen_is_refused(overrides, says):
    with pytest.raises(config.ConfigError, match=says):
        config.check(config.compose([*JOB, *overrides]))


def test_only_what_is_frozen_enters_the_identity():
    def known(*overrides):
        composed = config.compose([*JOB, *overrides])
        return config.run_id(composed, device="cpu", data_digest="aa", kernels=False)

    assert known("freeze_statistics=ema", "freeze_affine=frozen", "keep_after=1") == known()
    ways = [
        known(f"freeze_after={after}", f"freeze_statistics={how}", f"freeze_affine={affine}")
        for after in (1, 2)
        for how in ("precise", "ema")
        for affine in ("trainable", "frozen")
    ]
    assert len({*ways, known()}) == 9
