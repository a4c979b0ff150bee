"""Ranks as processes: none is left behind, none is waited for in vain, and the first to fail is
named. What they work on is the job in `rank_jobs`.
"""

import os
import signal

import agents
import listening
import pytest
import rank_jobs
from rank_jobs import SAVE_EVERY, prepare

from normlab import checkpoint


def begin(where, run, max_restarts=0):
    """The agent, once both ranks are at work."""
    process = agents.start(where, rank_jobs.start, run.path, 2, max_restarts, rank=rank_jobs.rank)
    agents.wait_for(lambda: min(steps(run)) > SAVE_EVERY)
    return process


def steps(run):
    """How far each rank is."""
    try:
        return [int((run.path / f"step-{rank}").read_text() or 0) for rank in (0, 1)]
    except FileNotFoundError:
        return [0, 0]


def saved(run):
    return checkpoint.load(run.checkpoint)["model"]["steps"]


def output(where):
    return (where / "output.txt").read_text()


def assert_ends(where, process, code, *, within):
    """The agent ends in time with its exit code, and both ranks with it."""
    process.join(within)
    assert process.exitcode == code, output(where)
    agents.wait_for(lambda: all(agents.gone(agents.pid(where, rank)) for rank in (0, 1)), 5)


def test_a_run_over_two_ranks(tmp_path):
    run = prepare(tmp_path, steps=1000)
    process = begin(tmp_path, run)
    assert listening.of([agents.pid(tmp_path, 0), agents.pid(tmp_path, 1), process.pid]) == {
        "127.0.0.1"
    }
    assert_ends(tmp_path, process, 0, within=60)
    assert run.status() == {"status": "done"}
    assert output(tmp_path) == ""
    for rank in (0, 1):
        (log,) = run.path.glob(f"ranks/*/attempt_0/{rank}/stdout.log")
        assert log.read_text() == f"rank {rank} is done\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run(tmp_path, rank):
    run = prepare(tmp_path)
    process = begin(tmp_path, run)
    os.kill(agents.pid(tmp_path, rank), signal.SIGKILL)
    assert_ends(tmp_path, process, 1, within=30)
    assert output(tmp_path) == f"rank {rank} of 2: killed by SIGKILL\n"


def test_the_rank_that_raised_is_the_one_shown(tmp_path):
    run = prepare(tmp_path, raises=SAVE_EVERY + 5)
    process = begin(tmp_path, run)
    assert_ends(tmp_path, process, 1, within=30)
    assert output(tmp_path) == "rank 1 of 2: LookupError: no such shard\n"
    log = run.log.read_text()
    assert "Traceback" in log
    assert 'raise LookupError("no such shard' in log


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named(tmp_path, rank):
    run = prepare(tmp_path, stall_timeout=4)
    process = begin(tmp_path, run)
    os.kill(agents.pid(tmp_path, rank), signal.SIGSTOP)
    assert_ends(tmp_path, process, 1, within=60)
    assert f": Stalled: rank {rank} has stalled: no sign of life for 4 s" in output(tmp_path)


def test_a_rank_that_hangs_is_named_with_the_place(tmp_path):
    run = prepare(tmp_path, stall_timeout=4, hangs=SAVE_EVERY + 5)
    process = begin(tmp_path, run)
    assert_ends(tmp_path, process, 1, within=60)
    said = output(tmp_path)
    assert "rank 1 of 2: Stalled: no rank has moved on for 4 s" in said
    assert "rank 1 at tests/rank_jobs.py:" in said
    assert "rank 0 at" not in said
    assert "time.sleep(600)" in run.log.read_text()


def test_no_rank_outlives_its_agent(tmp_path):
    run = prepare(tmp_path)
    process = begin(tmp_path, run)
    os.kill(agents.pid(tmp_path, 1), signal.SIGSTOP)  # this one cannot end by itself
    process.kill()
    assert_ends(tmp_path, process, -signal.SIGKILL, within=5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_all_ranks(tmp_path, number, code):
    run = prepare(tmp_path)
    process = begin(tmp_path, run)
    os.kill(process.pid, number)
    assert_ends(tmp_path, process, code, within=30)
    assert steps(run) == [saved(run)] * 2
    assert run.status() == {}
    assert output(tmp_path) == ""


def test_a_signal_to_one_rank_stops_both(tmp_path):
    run = prepare(tmp_path)
    process = begin(tmp_path, run)
    os.kill(agents.pid(tmp_path, 1), signal.SIGTERM)
    assert_ends(tmp_path, process, 1, within=30)
    assert steps(run) == [saved(run)] * 2


def test_the_ranks_start_again_where_they_have_saved(tmp_path):
    run = prepare(tmp_path, steps=2 * SAVE_EVERY + 50)
    process = begin(tmp_path, run, max_restarts=1)
    before = agents.pid(tmp_path, 0), agents.pid(tmp_path, 1)
    os.kill(before[1], signal.SIGKILL)
    assert_ends(tmp_path, process, 0, within=60)
    assert {agents.pid(tmp_path, 0), agents.pid(tmp_path, 1)}.isdisjoint(before)
    assert run.status() == {"status": "done"}
    assert "started again after a failure: 1" in run.log.read_text()


@pytest.mark.slow
def test_two_jobs_side_by_side(tmp_path):
    both = [(tmp_path / name, prepare(tmp_path / name, steps=100)) for name in ("a", "b")]
    began = [agents.start(where, rank_jobs.start, run.path, 2, rank=rank_jobs.rank)
             for where, run in both]  # fmt: skip
    for process, (where, run) in zip(began, both, strict=True):
        assert_ends(where, process, 0, within=60)
        assert run.status() == {"status": "done"}
