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
    """A request to stop, made by a signal and honoured where the state is whole."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def raise_if_asked(self) -> None:
        """End the process the way the signal would have: KeyboardInterrupt, or exit code 143."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            sys.exit(128 + self.signal)


@contextmanager
def deferred_signals() -> Iterator[Stop]:
    """Within, the first Ctrl-C or SIGTERM only asks to stop, and is heard at the end at the latest;
    a second one acts at once.

    Outside the main thread Python takes no signal handlers: there nothing is deferred.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        if stop:
            stop.raise_if_asked()
        stop.signal = number

    try:
        for number in before:
            signal.signal(number, ask)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stop.raise_if_asked()  # it came after the last place that looks
