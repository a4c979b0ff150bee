"""A rank that stops before it has joined the others is named and ended, as one that stops later."""

import os
import signal
import time
from pathlib import Path

import agents
import rank_jobs
from rank_jobs import prepare

from normlab.ranks import agent, group

STARTS = """
import os, signal, sys
from pathlib import Path
run, rank = sys.argv[1], os.environ["RANK"]
Path(run, "pid-" + rank).write_text(str(os.getpid()))
if rank == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
import rank_jobs
rank_jobs.rank(run)
"""

SOON = 30.0
"""Seconds from the start of the other rank: as many as the agent alone gives a rank to end, and
fewer than a collective waits in vain."""

SAID = "rank 0 of 2: Stalled: rank 1 has stalled: no sign of life for 3 s (stall_timeout)"


def test_a_rank_that_stops_as_it_starts(tmp_path, monkeypatch, capsys):
    """Real commands, one of which never comes to say which process it is."""
    monkeypatch.setattr(agent, "COMMAND", ("-u", "-c", STARTS))
    here = [str(Path(__file__).parent), str(Path(agent.__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(here))
    run = prepare(tmp_path, stall_timeout=3)
    assert rank_jobs.start(run.path, 2) == 1
    assert time.time() - (run.path / "pid-0").stat().st_mtime < SOON
    assert capsys.readouterr().err.startswith(SAID)
    assert all(agents.gone(agents.pid(run.path, rank)) for rank in (0, 1))


def stops_before_it_joins(run):
    """A rank that is watched already, and that the others wait for."""
    if os.environ["RANK"] == "1":
        group.distributed.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    rank_jobs.rank(run)


def test_a_rank_that_stops_before_it_joins(tmp_path):
    run = prepare(tmp_path, stall_timeout=3)
    process = agents.start(tmp_path, rank_jobs.start, run.path, 2, rank=stops_before_it_joins)
    process.join(120)
    assert process.exitcode == 1
    assert time.time() - (tmp_path / "pid-0").stat().st_mtime < SOON
    assert (tmp_path / "output.txt").read_text().startswith(SAID)
    agents.wait_for(lambda: all(agents.gone(agents.pid(tmp_path, rank)) for rank in (0, 1)), 5)
