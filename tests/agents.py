"""Real ranks without the seconds of their imports: the agent and its ranks are forked, not run.

The agent is a process of the fork server, whose imports are done. Before it does anything it forks
a source of ranks, as clean as itself; every rank comes from there as a child of the agent: a
process of its own, in a session of its own, with a pid to kill, ended by the agent and ending with
it, exactly as the command that the agent would have run.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forked import CONTEXT

_PR_SET_CHILD_SUBREAPER = 36


def start(where: Path, act: Callable[..., int | None], *arguments: Any, rank: Callable[[str], None],
          **environment: str) -> BaseProcess:  # fmt: skip
    """A process that calls act(*arguments) in the directory `where`, whose ranks call rank(run).

    What they say is in output.txt and in the ranks' logs; pids of ranks are in pid-<rank>.
    """
    where.mkdir(exist_ok=True)
    process = CONTEXT.Process(
        target=_agent, args=(where, act, arguments, rank, dict(os.environ) | environment)
    )
    process.start()
    return process


def pid(where: Path, rank: int) -> int:
    """Of the rank that was started last."""
    return int((where / f"pid-{rank}").read_text())


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    """Whether there is no such process, or only what is left of it to be waited for."""
    return _state(pid) in "ZX"


def stopped(pid: int) -> bool:
    """Whether a process was stopped, and nothing of it runs."""
    return _state(pid) == "T"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def _agent(where: Path, act: Callable[..., int | None], arguments: Any, rank: Callable[[str], None],
           environment: dict[str, str]) -> None:  # fmt: skip
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    _say_into(where / "output.txt", where / "output.txt")
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    agent = os.getpid()
    ours, theirs = Pipe()
    if os.fork() == 0:
        ours.close()
        _source(theirs, agent, where, rank)
    theirs.close()

    from torch.distributed.elastic.multiprocessing import api

    def fork(args: tuple[str, ...], env: dict[str, str], stdout: str, stderr: str,
             **_: Any) -> "_Rank":  # fmt: skip
        ours.send((args[-1], os.environ | env, stdout, stderr))
        return _Rank(ours.recv())

    api.get_subprocess_handler = fork
    try:
        code = act(*arguments)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _source(requests: Connection, agent: int, where: Path, rank: Callable[[str], None]) -> None:
    """Fork a rank for each request until the agent is gone."""
    while True:
        try:
            run, environment, stdout, stderr = requests.recv()
        except EOFError:
            os._exit(0)
        if between := os.fork():
            os.waitpid(between, 0)
            requests.send(int((where / "between").read_text()))
            continue
        ready, say_ready = os.pipe()
        if made := os.fork():  # the rank's parent is the agent once this one has ended
            os.read(ready, 1)
            (where / "between").write_text(str(made))
            os._exit(0)
        requests.close()
        os.setsid()
        os.write(say_ready, b"!")
        while os.getppid() != agent:
            time.sleep(0.001)
        os.environ.clear()
        os.environ.update(environment)
        (where / f"pid-{environment['RANK']}").write_text(str(os.getpid()))
        _say_into(Path(stdout), Path(stderr))
        try:
            rank(run)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)


def _say_into(stdout: Path, stderr: Path) -> None:
    for stream, path in ((1, stdout), (2, stderr)):
        with path.open("ab") as output:
            os.dup2(output.fileno(), stream)


class _Rank:
    """What the agent has of a rank: itself and, in `proc`, its process."""

    def __init__(self, pid: int) -> None:
        self.pid, self.proc, self.code = pid, self, None

    def poll(self) -> int | None:
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return self.code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        os.killpg(self.pid, death_sig or signal.SIGTERM)
