"""Each rank watches the others: one that gives no sign of life ends the job, with its name.

A thread of every rank writes a beat into the store over which the ranks have met, and reads those
of the others. So the watch reaches over machines, needs no parent, and works while the rank itself
waits for the others to come, or in a collective. Beats are counted and not timed: a machine that
slept has missed none.
"""

import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch._C._distributed_c10d import Store

from normlab.checkpoint import Stop
from normlab.ranks import failures, group

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds in which a rank that is told to stop must have done so; its agent kills it after 30."""

_LONGEST = 5.0
"""Seconds between two beats, at most."""

_TOGETHER = "torch:distributed/"
"""How the places begin at which ranks join, and wait for each other in a collective."""

_END = 0
"""On the pipe: no signal, but the end of the watch."""


class Stalled(RuntimeError):
    """Ranks stand still; the message says which.

    processes: those of the silent ones that are on this machine.
    """

    def __init__(self, message: str, processes: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.processes = processes


@dataclass
class _Seen:
    """What is known of a rank: its last beat, and for how many readings it has said the same, or
    been in a call that waits for other ranks."""

    beat: int = -1
    looks: int = 0
    machine: str = ""
    process: int = 0
    at: str = ""
    silent: int = 0
    still: int = 0
    waits: int = 0

    def read(self, said: str) -> None:
        beat, looks, self.machine, process, self.at = said.split(" ", 4)
        self.silent = 0 if int(beat) != self.beat else self.silent + 1
        self.still = 0 if int(looks) != self.looks else self.still + 1
        self.waits = self.waits + 1 if self.at.startswith(_TOGETHER) else 0
        self.beat, self.looks, self.process = int(beat), int(looks), int(process)


class Watch:
    """Of the ranks of one run, as one of them keeps it.

    timeout: seconds after which a rank has stalled that gives no sign of life, or that holds up
    the others: none of them has looked whether to stop.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float) -> None:
        self.interval = min(_LONGEST, timeout / 5)
        self._store, self._rank, self._timeout = store, rank, timeout
        self._stop: Stop | None = None
        self._others = {other: _Seen() for other in range(ranks)}
        self._beats = 0
        self._main = threading.main_thread().ident
        self._told: tuple[float, int] | None = None
        self.beat()

    def follow(self, stop: Stop) -> None:
        """Say from now on how far this rank is: how often it has looked whether to stop."""
        self._stop = stop

    def beat(self) -> None:
        """Say that this rank is alive, how far it is, and where."""
        self._beats += 1
        here = f"{_machine()} {os.getpid()} {self._where()}"
        looks = 0 if self._stop is None else self._stop.looks  # a Stop is true once asked for
        self._store.set(_key(self._rank), f"{self._beats} {looks} {here}")

    def end(self) -> None:
        """Say that this rank has done its part: it is watched no more."""
        self._store.set(_key(self._rank), "")

    def read(self) -> None:
        """Read what the others say. Raises Stalled."""
        for other, seen in list(self._others.items()):
            if seen.beat < 0 and not self._store.check([_key(other)]):
                seen.silent += 1  # it has not come here yet
            elif text := self._store.get(_key(other)):
                seen.read(text.decode())
            else:
                del self._others[other]
        self._refuse_silence()
        if all(one.looks for one in self._others.values()):
            self._refuse_standstill()
        else:
            self._refuse_absence()

    def _refuse_silence(self) -> None:
        """Ranks give no sign of life, or have never given one."""
        readings = self._timeout / self.interval
        silent = [rank for rank, one in self._others.items() if one.silent >= readings]
        if not silent:
            return
        whose = "its process is stopped, or its machine is lost"
        if len(silent) > 1:
            whose = "their processes are stopped, or their machines are lost"
        processes = [self._process(rank) for rank in silent]
        raise Stalled(
            f"{_have(silent)} stalled: no sign of life for {self._timeout:g} s (stall_timeout); "
            f"{whose}",
            [process for process in processes if process is not None],
        )

    def _process(self, rank: int) -> int | None:
        """Another rank's, where it is on this machine: as it says, or as the kernel does of one
        that has not begun to speak."""
        seen = self._others[rank]
        if seen.beat < 0:
            return group.sibling(rank)
        return seen.process if seen.machine == _machine() else None

    def _refuse_absence(self) -> None:
        """All ranks live, and some wait for others: to join, or on the way to the first step.

        Two readings more than the timeout are for ranks that come when it is nearly over. The
        collective itself would give up later, without a name.
        """
        seen = self._others
        holding = [rank for rank, one in seen.items() if not one.waits]
        readings = self._timeout / self.interval + 2 * (1 + (self._rank not in holding))
        if max(one.waits for one in seen.values()) >= readings:
            what = f"{_have(holding)} kept the others waiting" if holding else "ranks have waited"
            raise Stalled(
                f"{what} for {self._timeout:g} s (stall_timeout) before the first step: "
                f"{self._places(holding or list(seen))}"
            )

    def _places(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"rank {rank} at {self._others[rank].at}" for rank in ranks[:8])

    def _refuse_standstill(self) -> None:
        """All ranks live, and none moves on."""
        seen = self._others
        if not seen:
            return
        # Ranks that wait do so inside of torch: the one that is elsewhere holds them up.
        holding = [rank for rank, one in seen.items() if not _waiting(one.at)]
        if not 0 < len(holding) < len(seen):
            holding = list(seen)
        # Its own word is the first: the stack it tells is the one to look at.
        readings = self._timeout / self.interval + 2 * (self._rank not in holding)
        if min(one.still for one in seen.values()) >= readings:
            raise Stalled(
                f"no rank has moved on for {self._timeout:g} s (stall_timeout): "
                f"{self._places(holding)}"
            )

    def told(self, number: int) -> None:
        """A signal has arrived: see to it that this rank has an end."""
        if self._told is None and number in (signal.SIGINT, signal.SIGTERM):
            self._told = (time.monotonic() + GRACE, number)

    def end_if_overdue(self) -> None:
        if self._told is not None and time.monotonic() > self._told[0]:
            log.error("told to stop %g s ago and still %s: ends now", GRACE, self._where())
            group.leave(128 + self._told[1])

    def stack(self) -> str:
        """Where this rank is, as a traceback."""
        frame = sys._current_frames().get(self._main or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def _where(self) -> str:
        """file:line of what this rank is in, the file by its last two names."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "its end"
        path = Path(frame.f_code.co_filename)
        package = "torch:" if f"{os.sep}torch{os.sep}" in str(path) else ""
        return f"{package}{'/'.join(path.parts[-2:])}:{frame.f_lineno}"


def _machine() -> str:
    """Which of the machines this one is, in the count of the agents."""
    return os.environ["GROUP_RANK"]


def _key(rank: int) -> str:
    # The store may outlive a start of the ranks, and then holds what those before them said.
    return f"normlab/beat/{group.restarts()}/{rank}"


def _have(ranks: Sequence[int]) -> str:
    """Ranks as the subject of what they have done."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    return f"ranks {', '.join(map(str, ranks))} have"


def _waiting(at: str) -> bool:
    return at.startswith("torch:")


@contextmanager
def watched(*, timeout: float) -> Iterator[Callable[[Stop], None]]:
    """Within, this rank watches the others and is watched by them; entered by all of them.

    It needs only the store: to wait for ranks that never come is within. Yields what is to be
    called with the request to stop as soon as there is one, for that shows how far this rank is.

    When one has stalled, this process notes it and ends. It ends too where it was told to stop and
    cannot, and where the store is lost: with it, the parent of all ranks.
    """
    rank, ranks = group.place()
    if ranks == 1:
        yield lambda _: None
        return
    watch = Watch(group.store(), rank, ranks, timeout)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    thread = threading.Thread(target=_keep, args=(watch, ours), name="watch", daemon=True)
    thread.start()
    try:
        yield watch.follow
    finally:
        signal.set_wakeup_fd(before)
        os.write(theirs, bytes([_END]))
        thread.join()
        for end in (ours, theirs):
            os.close(end)
    watch.end()


def _keep(watch: Watch, ours: int) -> None:
    """The thread: a beat and a reading per interval, and at once what a signal asks for.

    The wake-up pipe tells of signals that Python's own handlers, which wait for the main thread to
    come back from a collective, may never see.
    """
    try:
        while True:
            ready, _, _ = select.select([ours], [], [], watch.interval)
            for number in os.read(ours, 64) if ready else b"":
                if number == _END:
                    return
                watch.told(number)
            watch.end_if_overdue()
            watch.beat()
            watch.read()
    except Stalled as stalled:
        log.error("%s; here:\n%s", stalled, watch.stack())
        failures.note(stalled, watch.stack(), certain=True)
        for process in stalled.processes:  # the agent would wait half a minute for their end
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        group.leave(1)
    except Exception as error:
        failures.note(error)
        log.error("the watch over the ranks has failed", exc_info=error)
        group.leave(1)
