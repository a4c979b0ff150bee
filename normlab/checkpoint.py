"""Checkpoints that a kill cannot spoil, and signals that wait for the end of a step."""

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from normlab import dist
from normlab.runs import write_atomically


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with ``weights_only=True``: no code in the file can run.

    Raises ValueError in one line when the file cannot be read.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except Exception as error:  # on foreign bytes torch's unpickler fails in any way it can
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}); delete it to start anew"
        ) from None
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path} is not a normlab checkpoint; delete it to start the run anew")
    return state


class Stop:
    """A request to stop, made by a signal and honoured where the state is whole.

    group: a process group that carries tensors of the CPU (None: all ranks). A signal reaches the
    ranks of a run at different steps, or some of them alone: `look` settles whether all stop.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.signal: int | None = None
        """What this process was sent."""
        self.settled: int | None = None
        """What all ranks stop for."""
        self.looks = 0
        """How often this process has looked: that it grows is the sign that the run moves on."""
        self._group = group

    def __bool__(self) -> bool:
        return self.signal is not None

    def look(self, due: bool = False) -> bool:
        """Whether to save now: a rank was asked to stop, or finds a checkpoint due.

        Every rank calls this at the same steps and gets the same answer; `end_if_settled` follows
        the saving. One small all-reduce; none in a process that is alone.
        """
        self.looks += 1
        said = [self.signal or 0, int(due)]
        if dist.place(self._group)[1] > 1:
            both = torch.tensor(said)
            distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=self._group)
            said = both.tolist()
        self.settled = said[0] or None
        return any(said)

    def end_if_settled(self) -> None:
        """End the process as the signal would have that all ranks stop for, if there is one."""
        _end_as(self.settled)

    def raise_if_asked(self) -> None:
        """End this process the way its own signal would have: KeyboardInterrupt, or exit code 143.

        For where nothing is lost and no other rank waits.
        """
        self.looks += 1
        _end_as(self.signal)


def _end_as(number: int | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number is not None:
        sys.exit(128 + number)


@contextmanager
def deferred_signals(group: ProcessGroup | None = None) -> Iterator[Stop]:
    """Within, the first Ctrl-C or SIGTERM only asks to stop, and is heard at the end at the latest;
    a second one acts at once in a process that is alone.

    A rank takes no notice of a second one: where a scheduler signals every process of a job, the
    agent that started the ranks signals them once more. That agent also ends those that stay.
    Outside the main thread Python takes no signal handlers: there nothing is deferred.
    """
    stop = Stop(group)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        if stop and dist.place(group)[1] == 1:
            _end_as(stop.signal)
        stop.signal = stop.signal or number

    try:
        for number in before:
            signal.signal(number, ask)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _end_as(stop.signal)  # it came after the last place that looks
