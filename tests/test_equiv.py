"""All ways to form one batch, to 1e-12 in float64 (E21), and a command that can say no."""

import copy
import os
import re
import signal
from dataclasses import replace
from multiprocessing import parent_process

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from normlab import cli, equiv
from normlab.equiv import steps
from normlab.models.cifar_resnet import build
from normlab.norms import BatchNorm, GhostBatchNorm
from normlab.surgery import convert


def network() -> nn.Module:
    torch.manual_seed(0)
    return build(BatchNorm, num_classes=10, shape=(3, 8, 8), depth=8)


def test_every_route_gives_the_same_steps():
    """P35: accumulated gradients are ghost's, and those of as many processes, and so are weights,
    after one step and after some; synchronized ranks are one batch. Dropout is off."""
    samples, nbs = 8, 2
    x, y = torch.randn(samples, 3, 8, 8), torch.arange(samples) % 10
    model = nn.Sequential(nn.Dropout(0.3), network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = equiv.compare(model, x, y, nbs=nbs, steps=2)
    for routes in (
        "ghost = accumulation", "ghost = ranks", "one batch = sync", "ghost, nbs=4 = sync in pairs",
        "ghost, nbs=4 = sync in two micro-batches",
    ):  # fmt: skip
        found = {(row.quantity, row.steps) for row in rows if row.routes == routes}
        assert found == {(q, s) for q in ("outputs", "gradients", "weights") for s in (1, 2)}
    assert sum(row.quantity == "buffers" for row in rows) == 14
    for row in rows:
        assert row.holds, row
        assert row.difference <= 1e-12 or not row.equal
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_partial_last_group_weighs_its_samples():
    """P35: 4, 4 and 2 samples, each part with statistics of its own, make one mean over the ten."""
    model = network().double()
    x, y = torch.randn(10, 3, 8, 8).double(), torch.arange(10)
    parts = [range(4), range(4, 8), range(8, 10)]
    done = steps.train(copy.deepcopy(model), [(x, y)], parts)[1]
    logits = torch.cat([model(part) for part in x.split(4)])
    F.cross_entropy(logits, y).backward()
    torch.testing.assert_close(done.outputs, logits)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(done.gradients[name], parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(value):
    """In any place of any quantity, and where routes have to differ too."""
    fine, broken = ({"a": torch.zeros(2), "b": torch.tensor([b, 0.0])} for b in (0.0, value))
    for ours, theirs in ((fine, broken), (broken, fine), (broken, broken)):
        whole = steps.Outcome(torch.zeros(2), fine, fine, fine)
        for kind, quantity in (("buffers", None), ("gradients", 1), ("weights", 2)):
            one, other = ({1: replace(whole, **{kind: g})} for g in (ours, theirs))
            if quantity is None:
                assert not equiv._buffers("", one, other, 1).holds
                continue
            rows = equiv._differences("", one, other, 1)
            assert [row.holds for row in rows] == [row is not rows[quantity] for row in rows]
        assert not equiv.Row("", "", equiv._largest(ours, theirs), equal=False).holds


def test_accumulation_and_ghost_forget_by_their_own_rule():
    """E21: after k micro-batches decay**k of the old buffers is left, after k chunks decay."""
    x = torch.randn(12, 4, 3, 3, dtype=torch.float64)
    plain, ghost = BatchNorm(4).double(), GhostBatchNorm(4, nbs=4).double()
    for layer in (plain, ghost):
        layer.running_mean.fill_(100)
    ghost(x)
    for part in x.split(4):
        plain(part)
    means = [part.mean((0, 2, 3)) for part in x.split(4)]
    torch.testing.assert_close(ghost.running_mean, 90 + 0.1 * sum(means) / 3, rtol=1e-13, atol=0)
    expected = 72.9 + 0.1 * (0.81 * means[0] + 0.9 * means[1] + means[2])
    torch.testing.assert_close(plain.running_mean, expected, rtol=1e-13, atol=0)


def test_a_wrong_route_is_seen(monkeypatch):
    """The comparison fails for a ghost norm whose chunks interleave: other samples, other batch."""

    def wrong(model, norm, **options):
        other = {"grouping": "interleaved"} if norm == "ghost" else {}
        return convert(model, norm, **options, **other)

    monkeypatch.setattr(steps, "convert", wrong)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    rows = equiv.compare(network(), x, y, nbs=4, steps=1)
    for row in rows:
        if row.quantity != "buffers":
            assert row.holds == (row.routes == "one batch = sync")


@pytest.mark.parametrize(
    ("model", "nbs", "said"),
    [
        (network(), 3, "does not divide 8 samples"),
        (network(), 8, "two chunks"),
        (nn.Linear(2, 2), 4, "no layer with population statistics"),
    ],
)
def test_refusals(model, nbs, said):
    with pytest.raises(ValueError, match=said):
        equiv.compare(model, torch.randn(8, 3, 8, 8), torch.arange(8), nbs=nbs)


def test_the_command_prints_the_table(capsys):
    assert cli.main(["equiv", "batch_size=32", "nbs=16"]) == 0
    said = capsys.readouterr().out
    assert "tiny, 32 samples, nbs 16" in said
    assert " 1 step " in said
    assert "20 steps" in said
    assert said.count(" equal") == 2 * (4 * 3 + 4)
    assert said.count("differ, as they must") == 2 * 2


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("norm=bn", "norm=bn"),
        ("batch_size=16", "one chunk"),
        ("nsb=4", "did you mean 'nbs'"),
        ("nbs=24", "does not divide batch_size"),
        ("norm.grouping=interleaved", "leave norm.grouping out"),
        ("norm.population=pooled", "leave norm.population out"),
        ("micro_batch=16", "micro_batch=16: equiv compares micro-batches of one chunk"),
        ("world_size=2", "world_size=2"),
        ("order=4x4", "leave order out"),
        ("norm.statistics=population", "leave norm.statistics out"),
        ("norm.update=false", "leave norm.update out"),
        ("domains=[none,contrast-5]", "equiv compares the routes on images as they are stored"),
        ("freeze_after=1", "leave freeze_after out"),
        ("buffers=mean", "buffers=mean: equiv compares what ranks may do with their buffers"),
        ("precision=bf16", "equiv compares the routes in float64; leave precision out"),
        ("batch_size=544", "batch_size=544 nbs=16: 34 chunks"),
    ],
)
def test_the_command_refuses_in_one_line(argument, said, capsys):
    assert cli.main(["equiv", argument]) == 2
    assert said in capsys.readouterr().err


def test_sixteen_processes_are_the_most(capsys, monkeypatch):
    compared, fine = [], [equiv.Row("", "outputs", 0.0)]
    monkeypatch.setattr(equiv, "compare", lambda *_, nbs, **__: compared.append(nbs) or fine)
    assert cli.main(["equiv", "batch_size=64", "nbs=2"]) == 2
    said = capsys.readouterr().err
    assert "32 chunks, and equiv starts a process for each, at most 16" in said
    assert "batch_size=32 or less, or nbs=4 or more" in said
    for allowed in (["batch_size=32", "nbs=2"], ["batch_size=64", "nbs=4"]):
        assert cli.main(["equiv", *allowed]) == 0
    assert compared == [2, 4]


class Fails(nn.Linear):
    """Raises, or is killed, where it runs in a process of its own."""

    def forward(self, x):
        if parent_process() is None:
            return super().forward(x)
        if not self.killed:
            raise ArithmeticError("a rank\nhas failed")
        if distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.mark.parametrize(
    ("killed", "said"),
    [
        (False, r"rank [01] of 2: ArithmeticError: a rank$"),
        (True, "rank 1 of 2: killed by SIGKILL"),
    ],
)
def test_a_rank_that_fails_is_said_in_one_line(killed, said, capfd, monkeypatch):
    failing = Fails(64, 10)
    failing.killed = killed
    model = nn.Sequential(BatchNorm(1), nn.Flatten(), failing)
    monkeypatch.setattr(equiv.build, "model", lambda *_: model)
    assert cli.main(["equiv", "batch_size=8", "nbs=4"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match("normlab: " + said, line)
