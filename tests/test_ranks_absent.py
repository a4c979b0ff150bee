"""A rank that stops or hangs before the first step is named and ended, as one that does later."""

import os
import signal
import time
from pathlib import Path

import agents
import pytest
import rank_jobs
from rank_jobs import prepare
from torch import distributed

from normlab import worker
from normlab.ranks import agent, group
from normlab.ranks.watch import Stalled, Watch

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


def hangs_before_it_joins(run):
    """A rank that lives, beats and does not come."""
    if os.environ["RANK"] == "1":
        group.distributed.init_process_group = lambda *_, **__: time.sleep(600)
    rank_jobs.rank(run)


def hangs_as_it_constructs(run):
    """A rank that has joined: the others wait for it in their first collective."""
    if os.environ["RANK"] == "1":
        worker.check_environment = lambda *_: time.sleep(600)
    rank_jobs.rank(run)


@pytest.mark.parametrize("rank", [hangs_before_it_joins, hangs_as_it_constructs])
def test_a_rank_that_hangs_before_the_first_step(tmp_path, rank):
    run = prepare(tmp_path, stall_timeout=3)
    process = agents.start(tmp_path, rank_jobs.start, run.path, 2, rank=rank)
    process.join(120)
    assert process.exitcode == 1
    assert time.time() - (tmp_path / "pid-0").stat().st_mtime < SOON
    told = "rank 1 of 2: Stalled: rank 1 has kept the others waiting for 3 s (stall_timeout)"
    place = f"before the first step: rank 1 at tests/{Path(__file__).name}:"
    assert (tmp_path / "output.txt").read_text().startswith(f"{told} {place}")
    assert "time.sleep(600)" in run.log.read_text()


TOGETHER, ELSEWHERE = "torch:distributed/distributed_c10d.py:5", "torch:nn/init.py:7"


@pytest.mark.parametrize(
    ("here", "places", "readings", "says"),
    [
        (1, [TOGETHER, ELSEWHERE], 7,
         f"rank 1 has kept the others waiting {{}}: rank 1 at {ELSEWHERE}"),
        (0, [TOGETHER, ELSEWHERE], 9,
         f"rank 1 has kept the others waiting {{}}: rank 1 at {ELSEWHERE}"),
        (1, [TOGETHER, "a.py:1", "b.py:2"], 7,
         "ranks 1, 2 have kept the others waiting {}: rank 1 at a.py:1, rank 2 at b.py:2"),
        (0, [TOGETHER, TOGETHER], 9,
         f"ranks have waited {{}}: rank 0 at {TOGETHER}, rank 1 at {TOGETHER}"),
        (0, [ELSEWHERE, ELSEWHERE], None, None),
    ],
)  # fmt: skip
def test_who_is_waited_for_before_the_first_step(monkeypatch, here, places, readings, says):
    """Five readings are the timeout; who is elsewhere while none waits works, for however long."""
    monkeypatch.setenv("GROUP_RANK", "0")
    store = distributed.HashStore()
    watch = Watch(store, here, len(places), 5.0)

    def read(beats):
        for beat in range(beats):
            for rank, place in enumerate(places):
                store.set(f"normlab/beat/0/{rank}", f"{beat} 0 0 123 {place}")
            watch.read()

    if readings is None:
        read(100)
        return
    read(readings - 1)
    with pytest.raises(Stalled) as stalled:
        read(1)
    assert str(stalled.value) == says.format("for 5 s (stall_timeout) before the first step")


def test_who_has_begun_is_waited_for_as_before(monkeypatch):
    """A rank in a collective, of ranks that have all looked, is no sign of a standstill yet."""
    monkeypatch.setenv("GROUP_RANK", "0")
    store = distributed.HashStore()
    watch = Watch(store, 0, 2, 5.0)
    for beat in range(100):
        for rank, place in enumerate((TOGETHER, ELSEWHERE)):
            store.set(f"normlab/beat/0/{rank}", f"{beat} {beat + 1} 0 123 {place}")
        watch.read()
