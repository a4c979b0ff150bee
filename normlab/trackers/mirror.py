"""A run's trackers, told of the rows that the run's files have gained.

The files are the truth. What a tracker has been told is noted in ``tracked.json``; whatever the
files say and it has not been told, it is told: as the rows are written, when a run goes on, and
when a finished run is asked for again. So a tracker that failed, or that was not asked for at
first, catches up; and a resumed run, which writes some of its rows again, tells nothing twice.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from normlab import lease, trackers
from normlab.runs import RunDir, write_atomically
from normlab.trackers.base import Tracker, plain

__all__ = ["behind", "clear", "following", "numbers"]

log = logging.getLogger(__name__)

NOTES = "tracked.json"
"""In a run's directory: tracker -> ``<tag>@<epoch>`` -> the number it was told, as text."""


@contextmanager
def following(run: RunDir, config: dict[str, Any]) -> Iterator[RunDir]:
    """The run, whose trackers are told of each row that is written through it, and at once of those
    that they have missed. A tracker that fails is left out, with a line in the log."""
    if not trackers.asked(config):
        yield run
        return
    mirror = _Mirror(run, config)
    mirror.follow()
    try:
        yield _Followed(run.path, mirror)
    finally:
        mirror.end()


def behind(run: RunDir, config: dict[str, Any]) -> bool:
    """Whether a tracker of the config has not been told all that the run's files say."""
    told = _told(run)
    return any(_untold(run, told.get(name, {})) for name in trackers.asked(config))


def clear(run: RunDir) -> None:
    """Remove what trackers have left of an earlier start, for a start from nothing."""
    left = [trackers.beside(name, "LEAVES", None) for name in trackers.names()]
    for pattern in filter(None, [NOTES, *left]):
        for path in run.path.glob(pattern):
            lease.remove(path)


def numbers(run: RunDir) -> dict[int, dict[str, str]]:
    """What trackers are told of a run, by epoch: tag -> number, as its files have it.

    Of an epoch's training ``error/train`` (%), ``loss/train`` and ``lr``; of an evaluation
    ``error/<protocol>`` and ``loss/<protocol>``; of a probe ``<probe>/<quantity>``. Characters that
    a tracker has no place for are "_": ``error/val_precise_batch_2``.
    """
    found: dict[int, dict[str, str]] = {}

    def note(epoch: str, tag: str, number: str) -> None:
        if number:
            found.setdefault(int(epoch), {})[tag] = number

    for row in run.metrics():
        note(row["epoch"], "error/train", row["train_error"])
        note(row["epoch"], "loss/train", row["train_loss"])
        note(row["epoch"], "lr", row["lr"])
    for row in run.evals():
        for measured in ("error", "loss"):
            note(row["epoch"], f"{measured}/{plain(row['protocol'])}", row[measured])
    for row in run.probes():
        note(row["epoch"], f"{plain(row['probe'])}/{plain(row['quantity'])}", row["value"])
    return found


class _Mirror:
    """The trackers of a run that have not failed."""

    def __init__(self, run: RunDir, config: dict[str, Any]) -> None:
        self._run, self._told = run, _told(run)
        self._open: dict[str, Tracker] = {}
        for name in trackers.asked(config):
            with self._survived(name):
                self._open[name] = trackers.find(name)(run, config)

    def follow(self) -> None:
        """Tell each what the run's files say and it does not know."""
        for name, tracker in list(self._open.items()):
            with self._survived(name):
                told = self._told.setdefault(name, {})
                untold = _untold(self._run, told)
                for epoch, values in sorted(untold.items()):
                    tracker.log({tag: float(text) for tag, text in values.items()}, epoch)
                    told |= {f"{tag}@{epoch}": text for tag, text in values.items()}
                if untold and tracker.durable:
                    self._note(name)

    def end(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._survived(name):
                tracker.end(self._run.status().get("status", "unfinished"))
                if not tracker.durable:
                    self._note(name)

    def _note(self, name: str) -> None:
        noted = _told(self._run) | {name: self._told[name]}
        write_atomically(self._run.path / NOTES, json.dumps(noted, indent=0) + "\n")

    @contextmanager
    def _survived(self, name: str) -> Iterator[None]:
        """Within, what fails ends the tracker and nothing else."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            said = (str(error).splitlines() or [""])[0]
            log.warning(
                "tracker %s failed, and is told nothing more: %s: %s",
                name, type(error).__name__, said,
            )  # fmt: skip


@dataclass(frozen=True)
class _Followed(RunDir):
    """A run's directory whose trackers are told of what is written in it."""

    mirror: _Mirror

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        super().write_metrics(rows)
        self.mirror.follow()

    def add_eval(self, row: dict[str, Any]) -> None:
        super().add_eval(row)
        self.mirror.follow()

    def add_probe(self, probe: str, measured: Any) -> None:
        super().add_probe(probe, measured)
        self.mirror.follow()


def _untold(run: RunDir, told: dict[str, str]) -> dict[int, dict[str, str]]:
    untold = {
        epoch: {tag: text for tag, text in values.items() if told.get(f"{tag}@{epoch}") != text}
        for epoch, values in numbers(run).items()
    }
    return {epoch: values for epoch, values in untold.items() if values}


def _told(run: RunDir) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads((run.path / NOTES).read_text()))
    except (FileNotFoundError, ValueError):
        return {}
