"""What one rank does to be one of several: join the others, be watched, and end with its parent."""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore
from torch.distributed import ProcessGroup

from normlab import dist
from normlab.ranks import failures

log = logging.getLogger(__name__)

AGENT = "NORMLAB_AGENT"
"""Names the process, in the environment of its ranks, that has started them and holds the run."""

LATER = 30.0
"""Seconds after the stall timeout at which a collective gives up that nothing else has ended."""

_PR_SET_PDEATHSIG = 1


def place() -> tuple[int, int]:
    """(rank, number of ranks) as the environment says: (0, 1) for a process that no agent started.

    `normlab.dist.place` says the same as soon as the ranks have met.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether the process that started this rank holds the run: not so under torchrun."""
    return AGENT in os.environ


def restarts() -> int:
    """How many times the agent has started all ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that has started it ends, however it does."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    agent = os.environ.get(AGENT)
    if agent is not None and os.getppid() != int(agent):
        sys.exit(f"normlab: process {agent}, which has started this rank, has ended")


@contextmanager
def joined(*, cuda: bool, timeout: float) -> Iterator[ProcessGroup | None]:
    """In the process group of all ranks, over NCCL on GPUs, each its own, and over gloo on CPUs.

    Yields a group of all ranks that carries tensors of the CPU: over NCCL one beside it. Within,
    collectives that a rank does not join fail after `timeout` seconds and some more. A process
    that is alone gets None.
    """
    if place()[1] == 1:
        yield None
        return
    limit = timedelta(seconds=timeout + LATER)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=limit)
    beside: Any = distributed.new_group(backend="gloo", timeout=limit) if cuda else None
    yield dist.members(beside)
    # Not after an exception: to leave a group in which others still work may wait for them.
    distributed.destroy_process_group()


def store() -> TCPStore:
    """A connection of its own to the store over which the ranks meet; the agent keeps it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))


def sibling(rank: int) -> int | None:
    """The process of another rank of this start, if the same parent has started it, here."""
    parent = f"\nPPid:\t{os.getppid()}\n"
    theirs = {f"RANK={rank}", f"MASTER_PORT={os.environ['MASTER_PORT']}"}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if parent in (process / "status").read_text():
                environment = (process / "environ").read_bytes().decode(errors="replace")
                if theirs <= set(environment.split("\0")):
                    return int(process.name)
    return None


def prepare() -> None:
    """Make this process one that its parent can end at any time, before it has joined the others.

    Until then there is nothing to save, and Python's own handler of Ctrl-C would wait with it for
    ranks that may never come.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    faulthandler.enable()


def ended_by(error: BaseException) -> NoReturn:
    """End this rank at once, with the exit code that an exception stands for, and note failures.

    At once, since the teardown of a process group may wait for ranks that are gone.
    """
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    elif isinstance(error, KeyboardInterrupt):
        code = 128 + signal.SIGINT
    else:
        failures.note(error)
        log.error("this rank failed", exc_info=error)
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process now; what it has said is written."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
