"""Runs with and without the fused kernels: which path they take, and what they are called."""

import pytest
import torch

from normlab import config, kernels, launch
from normlab.kernels import _switch

QUICK = ["scale=demo", "norm=ghost", "nbs=8", "batch_size=64", "epochs=1", "device=cpu",
         "threads=1", "allocator=system", "evals=[val:ema]"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels computed something."""
    made = []
    original = _switch.kernels
    monkeypatch.setattr(_switch, "kernels", lambda: (made.append(1), original())[1])
    return made


def start(*overrides):
    return launch.run(config.compose([*QUICK, *overrides]))


@pytest.mark.skipif(not kernels.available(), reason=kernels.unavailable())
def test_a_run_takes_the_path_of_its_config(calls):
    """Whatever the process is set to; the two are different runs, of which each says what it is."""
    with kernels.use(True):
        without = start()
        assert not calls
        fused = start("kernels=true")
        assert calls
        assert kernels.enabled()
        calls.clear()
        launch.evaluate(without.id, ["val:batch"], root="runs")
        assert not calls
        launch.evaluate(fused.id, ["val:batch"], root="runs")
        assert calls
    assert without.id != fused.id
    assert without.id.rpartition("-")[0] == fused.id.rpartition("-")[0]
    assert [launch.RunDir(o.path).env()["kernels"] for o in (without, fused)] == [False, True]
    errors = [outcome.summary["val:ema"] for outcome in (without, fused)]
    assert abs(errors[0] - errors[1]) < 10


def test_kernels_that_are_not_there_are_refused(monkeypatch, tmp_path):
    for name, value in (("_on", True), ("_ready", False), ("_why", "there is no C++ compiler")):
        monkeypatch.setattr(_switch, name, value)
    with pytest.raises(ValueError, match=r"kernels=true: no .* here: there is no C\+\+ compiler$"):
        start("kernels=true")
    monkeypatch.setattr(_switch, "_on", False)
    with pytest.raises(ValueError, match="NORMLAB_KERNELS=0 turns them off"):
        start("kernels=true")
    assert list(tmp_path.iterdir()) == []
    assert start().status == "done"


def test_kernels_are_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="for the CPU, not for cuda"):
        launch._kernels({"kernels": True, "device": "cuda"})
