"""How anything is measured here: contestants take turns, and ratios are taken within a turn.

Another program that slows the machine down then slows both sides of a ratio. Where a row says so,
the clock is the CPU time of a process with one thread, which other programs disturb least.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from statistics import median, quantiles
from types import TracebackType
from typing import Any, Self

LEAVING = 60.0
"""Seconds that a process has to end by itself: a busy machine takes many to leave Python."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)


@dataclass(frozen=True)
class Row:
    """One comparison: ``ratio`` above 1 says that normlab is faster, ``bar`` is the target."""

    name: str
    peer: str
    unit: str
    clock: str
    ours: Spread
    theirs: Spread
    ratio: Spread
    bar: float
    rounds: int

    @property
    def met(self) -> bool:
        return self.ratio.median >= self.bar


def rate_row(
    name: str,
    peer: str,
    ours: list[float],
    theirs: list[float],
    *,
    unit: str,
    amount: int,
    bar: float,
) -> Row:
    """A comparison of rates: ``amount`` units of work in the given CPU seconds, round by round."""
    return Row(
        name=name,
        peer=peer,
        unit=unit,
        clock="CPU time, 1 thread",
        ours=Spread.of([amount / seconds for seconds in ours]),
        theirs=Spread.of([amount / seconds for seconds in theirs]),
        ratio=Spread.of([b / a for a, b in zip(ours, theirs, strict=True)]),
        bar=bar,
        rounds=len(ours),
    )


def limit_row(name: str, seconds: list[float], *, limit: float, clock: str) -> Row:
    """A comparison with a fixed limit: the ratio says how often the measured time fits into it."""
    milliseconds = [1000 * value for value in seconds]
    return Row(
        name=name,
        peer="the limit",
        unit="ms",
        clock=clock,
        ours=Spread.of(milliseconds),
        theirs=Spread.of([1000 * limit]),
        ratio=Spread.of([limit / value for value in seconds]),
        bar=1.0,
        rounds=len(seconds),
    )


class Process:
    """A contestant in a process of its own, for what is set once per process; see ``serve``."""

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> float:
        """Let it run once; its CPU seconds. Raises RuntimeError if it is gone."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise RuntimeError("a benchmark's process ended early; its error is above") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Together:
    """Processes that do each thing at the same time, such as the ranks of a process group.

    Each gets what is asked as a line of JSON, and answers with one. A process ends when nothing can
    be asked any more; however this context is left, none of them remains.
    """

    def __init__(self, codes: Sequence[str], *, patience: float = 120.0) -> None:
        self._codes = codes
        self._patience = patience
        self.processes: list[subprocess.Popen[str]] = []

    def ask(self, what: object) -> list[Any]:
        """What each of them answers, in order.

        Raises RuntimeError if one has ended, or none has answered for `patience` seconds.
        """
        answers: dict[int, Any] = {}
        try:
            for process in self.processes:
                assert process.stdin
                process.stdin.write(json.dumps(what) + "\n")
                process.stdin.flush()
            while len(answers) < len(self.processes):
                outputs = {
                    process.stdout.fileno(): (number, process.stdout)
                    for number, process in enumerate(self.processes)
                    if process.stdout and number not in answers
                }
                ready = wait(outputs, self._patience)
                if not ready:
                    raise RuntimeError(
                        f"no answer of a benchmark's process in {self._patience:g} s"
                    )
                for number, output in (outputs[found] for found in ready):  # type: ignore[index]
                    answers[number] = json.loads(output.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError("a benchmark's process ended early; its error is above") from None
        return [answers[number] for number in range(len(answers))]

    def __enter__(self) -> Self:
        try:
            for code in self._codes:
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    process_group=0,  # an interrupt from the keyboard is for us, and we end them
                )
                self.processes.append(process)
        except BaseException:
            self._end(at_once=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._end(at_once=kind is not None)

    def _end(self, *, at_once: bool) -> None:
        """Let them end by themselves, unless something went wrong; the slow ones are killed."""
        try:
            for process in self.processes:
                with suppress(BrokenPipeError):
                    process.stdin.close()  # type: ignore[union-attr]
            with suppress(subprocess.TimeoutExpired):
                for process in [] if at_once else self.processes:
                    process.wait(LEAVING)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
                process.stdout.close()  # type: ignore[union-attr]


def serve(action: Callable[[], object]) -> None:
    """The other end of ``Process``: run the action for each line, answer its CPU seconds."""
    for _ in sys.stdin:
        started = time.process_time()
        action()
        print(time.process_time() - started, flush=True)
