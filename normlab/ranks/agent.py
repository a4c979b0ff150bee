"""The parent of a run's ranks on one machine: PyTorch's elastic agent, which torchrun is too.

The ranks are commands and not functions: so they start from any process, a worker of joblib or of
another launcher included, and the first failure is told from the others. Nothing listens on any
address but this machine's own.
"""

import logging
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from normlab.ranks import failures
from normlab.ranks.failures import Failure, RankFailed
from normlab.ranks.group import AGENT

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
INTERFACE = "lo"

COMMAND = ("-u", "-m", "normlab.worker")
"""What a rank of a run is, after the Python it runs in and before the run's directory."""

FOLDER = "ranks"
"""Where, in the run's directory, the ranks' logs are: <start>/attempt_<n>/<rank>/stderr.log."""

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_MEETING = "normlab"


class _Loopback(RendezvousHandler):
    """The meeting of one machine's ranks, on a free port that only this machine can reach.

    The agent's own way listens on every address of the machine.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return _MEETING

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        # A new store at every start of the ranks: the old one holds what those before them said.
        with socket.create_server((ADDRESS, 0)) as listening:
            port = listening.getsockname()[1]
            self._store = TCPStore(
                ADDRESS,
                port,
                is_master=True,
                timeout=timedelta(minutes=5),
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )
        return RendezvousInfo(
            PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo(ADDRESS, port)
        )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._store = None
        return True


def start(
    run: Path,
    ranks: int,
    *,
    threads: int,
    max_restarts: int,
    handed: Mapping[str, str],
    command: Sequence[str] | None = None,
) -> None:
    """Start the ranks of a prepared run on this machine and wait until they have ended well.

    threads: for the CPU, of each rank. handed: what they find in their environment besides.
    command: what they are instead of COMMAND. After a failure all ranks start again, at most
    `max_restarts` times. Raises RankFailed,
    KeyboardInterrupt after Ctrl-C and SystemExit after another signal, once all ranks have ended.
    """
    rendezvous_handler_registry.register(_MEETING, _Loopback)
    for name in list(logging.root.manager.loggerDict):  # what they say is said below, once
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    began = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    logs = DefaultLogsSpecs(log_dir=str(run / FOLDER), redirects=Std.ALL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        max_restarts=max_restarts,
        run_id=began,
        rdzv_backend=_MEETING,
        logs_specs=logs,
    )
    environment = {
        **handed,
        AGENT: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
    }
    log.info("starting %d ranks with %d threads each; their logs: %s", ranks, threads, FOLDER)
    with _handlers_restored(), _environment(environment):
        try:
            elastic_launch(config, sys.executable)(*(command or COMMAND), str(run))
        except ChildFailedError as error:
            folder = max((run / FOLDER).glob(f"{began}_*"), key=lambda path: path.stat().st_mtime)
            raise _failed(error, ranks, folder) from None
        except SignalException as stopped:  # an Exception, which a sweep would survive
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + stopped.sigval) from None


def _failed(error: ChildFailedError, ranks: int, folder: Path) -> RankFailed:
    """Log the first failure whole; returns it in a line."""
    attempt = max(folder.glob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    ends: dict[int, Failure] = {
        rank: failures.of_rank(
            rank, code=end.exitcode, noticed=end.timestamp, folder=attempt / str(end.local_rank)
        )
        for rank, end in error.failures.items()
    }
    first = failures.first(ends)
    log.error("rank %d of %d failed first: %s\n%s", first.rank, ranks, first.reason,
              first.traceback or f"its output: {attempt / str(first.rank)}")  # fmt: skip
    return RankFailed(f"rank {first.rank} of {ranks}: {first.reason}")


def torchrun(run: Path, ranks: int, *, max_restarts: int) -> str:
    """The command that starts the ranks of a prepared run on the machines that it is given to.

    The shell's NODES and HOST say how many machines there are, and which of them meets the others.
    """
    directory = shlex.quote(str(run))
    restarts = f" --max-restarts={max_restarts}" if max_restarts else ""
    return (
        f"torchrun --nnodes=$NODES --nproc-per-node=$(({ranks} / NODES)) --rdzv-backend=c10d"
        f" --rdzv-endpoint=$HOST:29400 --rdzv-id={run.name}{restarts}"
        f" --log-dir={directory}/{FOLDER} --redirects=3 -m normlab.worker {directory}"
    )


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """The agent takes the handlers of signals and does not give them back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The ranks inherit this process's environment, which is as before afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
