"""One rank of a run, here in the test's process: which path its layers take, whose the run is."""

import json
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from normlab import config, kernels, lease, ranks, runs, worker
from normlab.lease import LeaseLost

SOME = {"world_size": 1, "device": "cpu", "allocator": "system", "stall_timeout": 9.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A prepared run of one rank, which ends by raising."""

    def raised(error):
        raise error

    monkeypatch.setattr(ranks, "prepare", lambda: None)
    monkeypatch.setattr(ranks, "ended_by", raised)
    run = runs.RunDir(tmp_path / "run")
    run.path.mkdir()
    run.write_config(config.compose([]) | SOME)
    run.write_env({"threads": torch.get_num_threads()})
    return run


def test_who_lost_the_run_to_another_process_records_no_failure(run, monkeypatch):
    def outrun(_config, run, *_):
        assert lease._take(run.path, lease._newest(run.path) + 1)
        run.write_metrics([{"epoch": 1}])

    monkeypatch.setattr(worker, "_take_part", outrun)
    with pytest.raises(LeaseLost, match="was taken over by another process"):
        worker.main(str(run.path))
    assert run.status() == {}
    assert not (run.path / "metrics.csv").exists()
    assert "failed" not in run.log.read_text()


def test_a_failure_is_recorded_while_the_run_is_held(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("a rank's own trouble")

    held = []
    write = runs.RunDir.write_status
    monkeypatch.setattr(worker, "_take_part", broken)
    monkeypatch.setattr(
        runs.RunDir,
        "write_status",
        lambda run, status: (held.append(run.locked()), write(run, status)),
    )
    with pytest.raises(RuntimeError, match="own trouble"):
        worker.main(str(run.path))
    assert held == [True]
    assert json.loads((run.path / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(("launch", "status", "told"), [
    (False, "done", True), (True, "done", False), (False, "diverged", False),
])  # fmt: skip
def test_ranks_that_nobody_waits_for_say_how_their_probes_are_made(
    run, monkeypatch, caplog, launch, status, told
):
    asked = config.compose(["probes=[ema_trace,feature_evolution]"]) | {"launch": launch}
    monkeypatch.setattr(worker, "work", lambda *_: {"status": status})
    with caplog.at_level(logging.INFO), run.lock():
        worker.finish(SimpleNamespace(config=asked), run, None)
    says = f"the probes (ema_trace, feature_evolution): normlab train resume={run.path}"
    assert (says in caplog.text) == told


@pytest.mark.parametrize("fused", [False, True])
def test_layers_take_the_path_that_the_run_is_made_with(run, monkeypatch, fused):
    """Whatever the process is set to."""
    taken = []
    monkeypatch.setattr(ranks, "joined", lambda **_: nullcontext())
    monkeypatch.setattr(ranks, "watched", lambda **_: nullcontext(lambda _: None))
    monkeypatch.setattr(worker, "construct", lambda _: None)
    monkeypatch.setattr(worker, "check_environment", lambda *_: None)
    with kernels.use(not fused):
        worker._take_part(
            SOME | {"kernels": fused}, run, 0, lambda *_: taken.append(kernels.enabled())
        )
    assert taken == [fused]
    assert logging.getLogger("normlab").handlers == []
