"""What a rank leaves when it fails, and which of several failures was the first.

When one rank is lost, the others fail too, in the collective that it does not join: only the first
failure says what happened. A rank that raises notes the moment and its traceback in the file that
the elastic agent names; one that is killed leaves nothing but its exit code.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normlab.agreement import FirstRankFailed
from normlab.runs import write_atomically

FILE = "TORCHELASTIC_ERROR_FILE"
"""Names the file, in the environment that the agent gives a rank."""

NOTICED = 5.0
"""Seconds within which the agent has noticed that a rank is dead. The others fail sooner."""

_TOLD = {-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT}
"""Exit codes of ranks that were told to end: by the agent, if another one has failed."""


class RankFailed(RuntimeError):
    """A rank failed, and with it the run: one line that says which and why; can be pickled."""


@dataclass(frozen=True)
class Failure:
    """One rank's end."""

    rank: int
    reason: str
    traceback: str
    at: float
    """Seconds since the epoch, as far as known: a death that the agent noticed is put earlier."""
    told: bool = False
    """Ended as another rank, or the agent, told it to: no failure of its own."""
    certain: bool = False
    """Tells why the run fails, whatever became of other ranks."""


def note(error: BaseException, stack: str | None = None, *, certain: bool = False) -> None:
    """Write what ended this rank, in the form in which the elastic agent reads it.

    stack: the traceback where it is not the error's own. certain: the error tells why the run
    fails, whatever becomes of other ranks. Without an agent nothing is written.
    """
    if not (named := os.environ.get(FILE)):
        return
    told = stack or "".join(traceback.format_exception(error))
    extra = {"py_callstack": told, "timestamp": str(int(time.time()))}
    message = {"message": one_line(error), "extraInfo": extra}
    with suppress(OSError):  # what failed may be the disk
        noted = {"message": message, "at": time.time(), "certain": certain}
        noted["told"] = isinstance(error, FirstRankFailed)
        write_atomically(Path(named), json.dumps(noted))


def one_line(error: BaseException) -> str:
    """What an exception says, in its first line and after its type; a rank's failure has both."""
    said = str(error).splitlines()
    if isinstance(error, RankFailed) and said:
        return said[0]
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def of_rank(rank: int, *, code: int, noticed: float, folder: Path) -> Failure:
    """How a rank ended.

    code: its exit code. noticed: when the agent saw that it had ended. folder: where its logs are.
    """
    told = code in _TOLD
    if written := _read(folder / "error.json"):
        message = written["message"]
        trace = str(message["extraInfo"]["py_callstack"])
        at, certain = float(written["at"]), bool(written["certain"])
        told = told or bool(written["told"])
        return Failure(rank, str(message["message"]), trace, at, told, certain)
    if code < 0:
        return Failure(rank, f"killed by {signal.Signals(-code).name}", "", noticed - NOTICED, told)
    said = _text(folder / "stderr.log").strip()
    reason = f"exit code {code}" + (f": {said.splitlines()[-1]}" if said else "")
    return Failure(rank, reason, said, noticed, told)


def first(failures: Mapping[int, Failure]) -> Failure:
    """The failure that caused the others; of ranks that were told to end only if there is none."""
    return min(failures.values(), key=lambda end: (not end.certain, end.told, end.at, end.rank))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
