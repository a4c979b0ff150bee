"""A job that takes no time to construct and as long to run as a test needs: what ranks do in it.

It trains nothing: every step is one all-reduce, a look whether to stop, and a checkpoint that holds
the number of steps. `step-<rank>` in the run's directory holds how far a rank is.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed

from normlab import checkpoint, config, logs, worker
from normlab.ranks import agent
from normlab.ranks.failures import RankFailed, one_line
from normlab.runs import RunDir

LONG = 100_000
SAVE_EVERY = 50


def prepare(where: Path, *, steps: int = LONG, stall_timeout: float = 600.0, world_size: int = 2,
            **faults: int) -> RunDir:  # fmt: skip
    """A prepared run; faults: what rank 1 does at which step (see `work`)."""
    run = RunDir(where / "run")
    run.path.mkdir(parents=True)
    run.write_config(
        config.compose([])
        | {"world_size": world_size, "device": "cpu", "allocator": "system", "steps": steps,
           "stall_timeout": stall_timeout, **faults}
    )  # fmt: skip
    run.write_env({"torch": torch.__version__, "data_digest": "", "device": "cpu", "threads": 1})
    return run


def start(run: Path, ranks: int, max_restarts: int = 0) -> int:
    """As `normlab train` does: the exit code, the reason on stderr, the rest in the run's log.

    Whatever happens, the agent leaves this process's environment and signals as they were.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = dict(os.environ), [signal.getsignal(number) for number in signals]
    try:
        return _start(run, ranks, max_restarts)
    finally:
        assert before == (dict(os.environ), [signal.getsignal(number) for number in signals])


def _start(run: Path, ranks: int, max_restarts: int) -> int:
    with logs.logging_to(logs.LogFile(RunDir(run).log, lambda: True)):
        try:
            agent.start(run, ranks, threads=1, max_restarts=max_restarts, handed={})
        except RankFailed as error:
            print(one_line(error), file=sys.stderr)
            return 1
    return 0


def rank(run: str) -> None:
    """One rank, whose job is the one here."""
    worker.construct = lambda config: SimpleNamespace(
        config=config, data=SimpleNamespace(digest="")
    )
    worker.work = work
    worker.main(run)


def work(job, run, stop):
    config, here = job.config, distributed.get_rank()
    done = 0
    if run.checkpoint.exists():
        done = checkpoint.load(run.checkpoint)["model"]["steps"]
    for step in range(done, config["steps"]):
        if here == 1 and step == config.get("raises"):
            raise LookupError("no such shard\nand more")
        if here == 1 and step == config.get("hangs"):
            time.sleep(600)
        total = torch.ones(())
        distributed.all_reduce(total)
        assert total == config["world_size"]
        if stop.look(here == 0 and step % SAVE_EVERY == 0) and here == 0:
            checkpoint.save(run.checkpoint, {"model": {"steps": step + 1}})
        (run.path / f"step-{here}").write_text(str(step + 1))
        stop.end_if_settled()
        time.sleep(0.002)
    print("rank", here, "is done")
    return {"status": "done"}
