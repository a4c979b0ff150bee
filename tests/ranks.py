"""Processes that form one gloo process group on the CPU, for all tests: started once, then reused.

A task is a function of a test module, called on every rank as function(rank, *arguments); what it
returns comes back, one value per rank. Tasks are pickled by name, so they are not nested.
"""

import faulthandler
import os
import pickle
import signal
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

from forked import CONTEXT

START = 120.0
"""Seconds for the processes to start, on a busy machine."""
COLLECTIVE = 60.0
"""Seconds after which a rank gives a collective up that the others do not join."""
GRACE = 5.0
"""Seconds that the other ranks have after one raised."""


class RankError(AssertionError):
    """What went wrong, and where, on each rank."""


class Ranks:
    """`size` ranks; started by the first task, and anew by the next one after a failure.

    Without `connected` they form no process group.
    """

    def __init__(self, size: int, folder: Path, *, connected: bool = True) -> None:
        self.size = size
        self.folder = folder
        self.connected = connected
        self.processes = []
        self.connections = []
        self.starts = 0

    def run(self, function, *arguments, timeout: float = 60.0):
        """[function(rank, *arguments) for each rank], or RankError with the ranks' tracebacks."""
        if not self.processes:
            self._start()
        return self._all((function, arguments), timeout)

    def _start(self) -> None:
        self.starts += 1
        for rank in range(self.size):
            ours, theirs = CONTEXT.Pipe()
            meeting = f"{self.folder}/meeting-{self.starts}" if self.connected else None
            arguments = (rank, self.size, meeting, self._stack_file(rank), theirs)
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # the rank ends when ours closes, however that happens
            self.processes.append(process)
            self.connections.append(ours)
        self._all((_ready, ()), START)

    def _all(self, task, timeout: float):
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(task))
        answers = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            waiting = {c: r for r, c in enumerate(self.connections) if r not in answers}
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                answers[waiting[connection]] = _answer(connection)
                if answers[waiting[connection]][1] is not None:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if len(answers) == self.size and all(error is None for _, error in answers.values()):
            return [answers[rank][0] for rank in range(self.size)]
        told = []
        for rank in range(self.size):
            if rank not in answers:
                told.append(f"rank {rank}: no answer; it is at\n{self._stack(rank)}")
            elif answers[rank][1] is not None:
                told.append(f"rank {rank}: {answers[rank][1]}")
        self.stop()
        raise RankError("\n".join(told))

    def _stack(self, rank: int) -> str:
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        self.processes[rank].join(1.0)  # it writes its stack and goes on
        path = self._stack_file(rank)
        return path.read_text() if path.exists() else ""

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"stack-{self.starts}-{rank}"

    def stop(self) -> None:
        """End every process, for sure."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(1.0)
            process.kill()
            process.join()
        self.processes, self.connections = [], []


def _answer(connection: Connection):
    """(value, None), or (None, what went wrong)."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return None, "the process ended"


def _ready(rank: int) -> int:
    return rank


def _connect(rank: int, size: int, meeting: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE),
    )


def _serve(rank: int, size: int, meeting: str | None, stacks: Path, connection: Connection) -> None:
    if meeting is not None:
        _connect(rank, size, meeting)
    with stacks.open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)  # see _stack
        while True:
            try:
                function, arguments = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                answer = pickle.dumps((function(rank, *arguments), None))
            except BaseException:
                answer = pickle.dumps((None, traceback.format_exc()))
            try:
                connection.send_bytes(answer)
            except OSError:
                return
