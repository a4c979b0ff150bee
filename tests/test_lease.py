"""One process at a time writes in a run directory; whoever is outrun publishes nothing."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import leasing
import pytest
from leasing import await_, count_up, publish_handed, publish_when_told, started

from normlab import lease, runs
from normlab.lease import LeaseLost
from normlab.runs import RunDir


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("EXPIRY", "INTERVAL", "LOOK"):
        monkeypatch.setattr(lease, name, getattr(lease, name))
    leasing.quick()


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def holding(run: RunDir, name: str, expiry: float = 3600.0):
    """A process that holds the run, or will once it can be had."""
    return started(publish_when_told, str(run.path), name, expiry)


def ended(process, patience: float = leasing.PATIENCE) -> int:
    process.join(patience)
    return process.exitcode


def taken_over(run: RunDir) -> None:
    """What another process does that takes the lease."""
    assert lease._take(run.path, lease._newest(run.path) + 1)


def test_the_second_process_waits_for_the_first_and_says_so(run, caplog):
    first = holding(run, "first")
    await_(run.path / "first.held")
    threading.Timer(0.3, (run.path / "go0").touch).start()
    with run.lock():
        assert run.status() == {"status": "first"}
        assert caplog.text.count("is running in another process: waiting for it") == 1
    assert ended(first) == 0


def test_what_a_killed_process_held_is_had_at_once(run):
    """The leases of this test do not expire."""
    first = holding(run, "first")
    await_(run.path / "first.held")
    half = next(run.path.glob(".lease.*/*/")) / ".checkpoint.pt.4711"
    half.write_bytes(b"half")
    first.kill()
    first.join()
    with run.lock():
        left = {path.name for path in run.path.rglob("*")}
        assert half.name not in left
        assert not [name for name in left if name.startswith((".gone", ".new", ".lease.1"))]


def test_a_stopped_process_is_outrun_and_then_publishes_nothing(run):
    first = holding(run, "first")
    await_(run.path / "first.held")
    os.kill(first.pid, signal.SIGSTOP)
    second = holding(run, "second", 0.5)
    await_(run.path / "second.held")
    (run.path / "go0").touch()
    assert ended(second) == 0
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert run.status() == {"status": "second"}
    os.kill(first.pid, signal.SIGCONT)
    assert ended(first) == 3
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert after == before


def test_a_process_that_beats_is_not_outrun(run):
    first = holding(run, "first")
    await_(run.path / "first.held")
    second = holding(run, "second", 0.5)
    time.sleep(1.5)
    assert not (run.path / "second.held").exists()
    (run.path / "go0").touch()
    assert (ended(first), ended(second)) == (0, 0)
    assert run.status() == {"status": "second"}


def test_a_dead_process_on_another_machine_is_outrun_when_its_lease_expires(run):
    first = holding(run, "first")
    await_(run.path / "first.held")
    first.kill()
    first.join()
    began = time.monotonic()
    second = started(leasing.hold_on_another_machine, str(run.path), 1.0)
    await_(run.path / "other.held")
    assert time.monotonic() - began >= 1.0
    (run.path / "go0").touch()
    assert ended(second) == 0


@pytest.mark.parametrize("moment", ["before", "while_written", "before_renamed"])
def test_a_lease_lost_at_any_moment_of_a_write_stops_it(run, monkeypatch, moment):
    with run.lock():
        run.write_status({"status": "old"})
        if moment == "before":
            taken_over(run)
        else:
            where = {"while_written": "place", "before_renamed": "fsync"}[moment]
            module = {"place": lease, "fsync": os}[where]
            original = getattr(module, where)

            def outrun(argument):
                value = original(argument)
                taken_over(run)
                return value

            monkeypatch.setattr(module, where, outrun)
        with pytest.raises(LeaseLost, match="taken over"):
            run.write_status({"status": "new"})
        monkeypatch.undo()
        assert run.status() == {"status": "old"}
        for write in (
            lambda: run.clear_status(),
            lambda: run.clear(),
            lambda: run.add_eval(dict.fromkeys(runs.EVAL_COLUMNS, 0)),
            lambda: run.write_metrics([{"epoch": 1}]),
            lambda: run.write_config({}),
            lambda: runs.write_atomically(run.checkpoint, b"weights"),
        ):
            with pytest.raises(LeaseLost, match="taken over"):
                write()
        assert [path.name for path in run.path.glob("[!.]*")] == ["status.json"]
        assert not run.locked()


def test_a_file_is_not_deleted_once_the_lease_is_lost(run, monkeypatch):
    with run.lock():
        run.write_status({"status": "old"})
        original = lease.place

        def outrun(directory):
            place = original(directory)
            taken_over(run)
            return place

        monkeypatch.setattr(lease, "place", outrun)
        with pytest.raises(LeaseLost):
            run.clear_status()
        assert run.status() == {"status": "old"}


def test_a_heartbeat_that_fails_is_said_once_and_loses_nothing_by_itself(run, monkeypatch, caplog):
    beats = []

    def fails(path):
        beats.append(path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lease, "_renew", fails)
    with run.lock():
        while len(beats) < 3:
            time.sleep(0.01)
        run.write_status({"status": "ours"})
        assert caplog.text.count("cannot be renewed") == 1
        second = holding(run, "second", 0.5)
        await_(run.path / "second.held")
        while "taken over" not in caplog.text:
            time.sleep(0.01)
        with pytest.raises(LeaseLost):
            run.write_status({"status": "ours again"})
        (run.path / "go0").touch()
        assert ended(second) == 0
    assert run.status() == {"status": "second"}


def test_a_child_that_is_handed_the_lease_writes_for_its_parent_and_no_longer(run):
    with run.lock():
        variable = lease.environment(run.path)
        child = started(publish_handed, str(run.path), variable, "child")
        await_(run.path / "child.held")
        (run.path / "go0").touch()
        await_(run.path / "status.json")
        assert run.locked()
    (run.path / "go1").touch()  # the parent has given it back, and nobody else has it yet
    assert ended(child) == 3
    with run.lock():
        run.write_status({"status": "other"})
        late = started(publish_handed, str(run.path), variable, "late")
        assert ended(late) == 3
        assert not (run.path / "late.held").exists()
        assert run.status() == {"status": "other"}


def test_a_thread_may_hold_what_it_holds(run):
    with run.lock():
        with run.lock():
            run.write_status({"status": "inner"})
        run.write_status({"status": "outer"})
    assert not run.locked()


def test_an_old_look_takes_no_newer_lease(run):
    for _ in range(3):
        with run.lock():
            pass
    with run.lock():  # number 4
        for number in (1, 2, 3, 4):
            assert lease._take(run.path, number) is None
        run.write_status({"status": "ours"})
        assert [path.name for path in run.path.glob(".*")] == [".lease.4"]


def test_a_directory_deleted_while_waiting_is_made_anew(run):
    first = holding(run, "first")
    await_(run.path / "first.held")
    second = holding(run, "second")
    time.sleep(0.1)
    run.path.rename(run.path.with_name("deleted"))
    await_(run.path / "second.held")
    for path in (run.path, run.path.with_name("deleted")):
        (path / "go0").touch()
    assert (ended(first), ended(second)) == (3, 0)
    assert run.status() == {"status": "second"}


def test_many_processes_never_write_at_once(run):
    processes = [started(count_up, str(run.path), 25) for _ in range(4)]
    assert [ended(process) for process in processes] == [0] * 4
    assert run.status() == {"number": 100}


def test_two_sweeps_over_the_same_cells_publish_each_once(tmp_path):
    sweeps = [started(leasing.sweep, str(tmp_path), name, 20) for name in ("one", "other")]
    assert [ended(sweep, 180) for sweep in sweeps] == [0, 0]
    said = [(tmp_path / f"{name}.txt").read_text().split() for name in ("one", "other")]
    assert Counter(said[0] + said[1]) == {"done": 20, "skipped": 20}
    found = runs.listed(tmp_path / "runs")
    assert len(found) == 20
    for run in found:
        assert run.status()["status"] == "done"
        assert run.log.read_text().count("BatchPlan") == 1
        assert len(run.evals()) == 1


def test_a_run_that_is_outrun_fails_in_one_line(tmp_path, monkeypatch, capsys):
    """SIGSTOP and another process, made short: the lease is taken between two epochs."""
    from normlab import app, worker

    monkeypatch.chdir(tmp_path)
    original = worker.Trainer.train_epoch
    before: dict[Path, bytes] = {}

    def outrun(trainer):
        original(trainer)
        if trainer.epoch == 2:
            (directory,) = runs.listed(Path("runs"))
            taken_over(directory)
            before.update({p: p.read_bytes() for p in directory.path.glob("[!.]*")})

    monkeypatch.setattr(worker.Trainer, "train_epoch", outrun)
    assert app.train(["epochs=3", "threads=1", "device=cpu", "evals=[val:ema]"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"normlab: tiny-bn-\S+ was taken over by another process, or deleted", line)
    (directory,) = runs.listed(Path("runs"))
    assert {path: path.read_bytes() for path in directory.path.glob("[!.]*")} == before
    assert json.loads((directory.path / "env.json").read_text())
    assert directory.status() == {}
