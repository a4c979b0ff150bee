"""Processes that hold the lease of a run directory, for tests that kill, stop and outrun them."""

import logging
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from forked import CONTEXT

from normlab import lease
from normlab.runs import RunDir

PATIENCE = 60.0
"""Seconds after which a test gives up waiting for a process."""


def quick(expiry: float = 3600.0, interval: float = 0.05) -> None:
    """A lease whose heart beats fast; it expires after a while, or not in the life of a test."""
    lease.EXPIRY, lease.INTERVAL, lease.LOOK = expiry, interval, 0.01


def started(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def await_(path: Path) -> None:
    """Wait until a file is there."""
    until = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.005)


def publish_when_told(path: str, name: str, expiry: float, rounds: int = 1) -> None:
    """Hold the run; write its status and log once ``go`` appears; exit code 3 if that is refused.

    ``<name>.held`` appears when it holds the lease.
    """
    quick(expiry)
    run = RunDir(Path(path))
    try:
        with run.lock():
            (run.path / f"{name}.held").touch()
            for turn in range(rounds):
                await_(run.path / f"go{turn}")
                run.write_status({"status": name})
    except lease.LeaseLost:
        os._exit(3)


def publish_handed(path: str, variable: dict[str, str], name: str) -> None:
    """The child of a holder: write when told, twice; exit code 3 and how far it came."""
    os.environ.update(variable)
    publish_when_told(path, name, 3600.0, 2)


def count_up(path: str, times: int) -> None:
    """Increase the number in a file, each time under the lease: two at once would lose counts."""
    quick()
    logging.disable()
    run = RunDir(Path(path))
    for _ in range(times):
        with run.lock():
            number = int(run.status().get("number", 0))
            time.sleep(0.001)
            run.write_status({"number": number + 1})


def hold_on_another_machine(path: str, expiry: float) -> None:
    """Hold the run once it can be had, as one on another machine would."""
    quick(expiry)
    lease._here = lambda _: {"kernel": "another"}
    publish_when_told(path, "other", expiry)


def sweep(where: str, name: str, cells: int) -> None:
    """Run cells that differ in their seed; ``<name>.txt`` says of each whether it was run here."""
    from normlab import config, launch

    os.chdir(where)
    words = ["epochs=1", "evals=[val:ema]", "threads=1", "device=cpu", "allocator=system"]
    composed = config.compose(words)
    outcomes = [launch.run(composed | {"seed": seed}) for seed in range(cells)]
    said = ["skipped" if outcome.skipped else outcome.status for outcome in outcomes]
    Path(f"{name}.txt").write_text(" ".join(said))
