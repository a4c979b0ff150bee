"""What the options of a command stand for."""

import sys
from argparse import ArgumentParser

import numpy as np
import pytest
import torch

from normlab.subject import add_arguments, from_arguments

CODE = """
import torch
from torch import nn

def make_model(width=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))

def forward(model, batch):
    return model(2 * batch[0])

def loss(outputs, batch):
    return outputs.square().mean(), 0.25
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "arguments_of_mine.py").write_text(CODE)
    x = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(12, dtype=int))
    scope = {}
    exec(CODE, scope)
    for number in (1, 2):
        model = scope["make_model"](width=4)
        torch.nn.init.constant_(model[0].bias, number)
        torch.save({"state_dict": model.state_dict()}, tmp_path / f"{number}.pt")
    yield tmp_path
    sys.modules.pop("arguments_of_mine", None)


def subject(here, *words):
    parser = ArgumentParser()
    add_arguments(parser)
    given = ["--model", f"{here}/arguments_of_mine.py:make_model", "--device", "cpu"]
    return from_arguments(
        parser.parse_args([*given, *(w.replace("HERE", str(here)) for w in words)])
    )


def test_all_that_was_named_is_there(here):
    found = subject(
        here, "--model-arg", "width=4", "--checkpoint", "HERE/1.pt", "HERE/2.pt",
        "--data", "HERE/a.npz", "--target", "HERE/a.npz", "--test", "HERE/a.npz",
        "--batch-size", "4", "--samples", "9",
        "--forward", "HERE/arguments_of_mine.py:forward",
        "--loss", "HERE/arguments_of_mine.py:loss",
    )  # fmt: skip
    assert not found.model.training
    assert torch.equal(found.model[0].bias, torch.ones(4))
    assert [c.path.name for c in (found.checkpoint, *found.others)] == ["1.pt", "2.pt"]
    assert [b.samples for b in (found.train, found.target, found.test)] == [9, 9, 12]
    assert found.device == torch.device("cpu")
    batch = next(iter(found.train))
    outputs = found.scoring.forward(found.model, batch)
    assert torch.equal(outputs, found.model(2 * batch[0]))
    assert found.scoring.score(outputs, batch).error_sum == 1.0


def test_a_model_may_come_with_weights_of_its_own(here):
    found = subject(here, "--data", "HERE/a.npz")
    assert found.checkpoint is found.target is found.test is None
    assert found.model[0].weight.shape == (2, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--data says what the statistics are to be of"),
        (("--data", "HERE/a.npz", "--model-arg", "width"), "--model-arg is NAME=VALUE"),
        (("--data", "HERE/a.npz", "--checkpoint", "HERE/1.pt"), "does not fit the model: 0.weight"),
        (("--data", "HERE/a.npz", "--device", "meta"), "--device is cpu, cuda or cuda:N"),
        (("--data", "HERE/a.npz", "--forward", "forward"), "'forward' does not name a function"),
        (("--data", "HERE/a.npz", "--mean", "1", "2"), "mean has 2 values, and the data 3"),
    ],
)
def test_what_does_not_fit_is_refused(here, words, said):
    with pytest.raises(ValueError, match=said) as refused:
        subject(here, *words)
    assert len(str(refused.value).splitlines()) == 1
