"""The cells of a sweep, as Hydra makes them of an experiment and overrides, and their state."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from normlab import config


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    ``settings``: what tells it from others, as overrides. ``left``: how much of it is to be done,
    from 0 to 1. ``refusal``: in one line, why it cannot run.
    """

    id: str
    settings: tuple[str, ...]
    config: dict[str, Any]
    state: str
    left: float
    refusal: str = ""
    composing: float = 0.0
    """Seconds that composing it took."""

    @property
    def kind(self) -> tuple[str, ...]:
        """What it has in common with the same run at another seed."""
        return tuple(word for word in self.settings if not word.startswith("seed="))


def listed(name: str, overrides: Sequence[str]) -> list[Cell]:
    """The cells of ``normlab sweep <name> <overrides>``, in its order.

    A cell that would be refused is listed with the reason. Raises ConfigError for what cannot be
    composed, and the reason when all are refused.
    """
    words = [f"experiment={name}", *overrides]
    config.register(words)
    jobs = config.jobs(words)
    composed: dict[tuple[str, ...], tuple[dict[str, Any], float]] = {}
    cells = []
    errors: list[Exception] = []
    swept = {word.partition("=")[0] for job in jobs for word in set(job) - set(jobs[0])}
    for job in jobs:
        # Seeds are many and plain numbers: one composition does for all of them.
        seeds = [word for word in job if word.startswith("seed=") and word[5:].isdigit()]
        kind = tuple(word for word in job if word not in seeds)
        if kind not in composed:
            began = time.perf_counter()
            composed[kind] = config.compose(kind), time.perf_counter() - began
        base, composing = composed[kind]
        cell = base | ({"seed": int(seeds[0][5:])} if seeds else {})
        settings = tuple(word for word in job if word.partition("=")[0] in swept)
        try:
            cells.append(replace(_cell(cell, settings), composing=composing))
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            cells.append(Cell("", settings, cell, "refused", 0.0, reason))
            errors.append(error)
    if len(errors) == len(cells):
        raise errors[0]
    return cells


def _cell(cell: dict[str, Any], settings: tuple[str, ...]) -> Cell:
    from normlab import agenda, launch

    config.check(cell)
    cell = launch.identified(cell)
    directory = launch.directory_of(cell)
    run = directory.id
    if launch.committed_outcome(cell, directory):
        return Cell(run, settings, cell, "committed", 0.0)
    state = directory.status().get("status")
    if state == "done":
        lacks = len(agenda.missing(cell, directory))
        state = f"done, lacks {lacks} measurements" if lacks else "done"
        return Cell(run, settings, cell, state, 0.0)
    if state == "diverged":
        return Cell(run, settings, cell, state, 0.0)
    if not directory.checkpoint.exists():
        return Cell(run, settings, cell, state or "missing", 1.0)
    if cell["epochs"] == 0:
        left = len(agenda.missing(cell, directory)) / len(agenda.wanted(cell))
    else:
        left = 1 - min(len(directory.metrics()), cell["epochs"]) / cell["epochs"]
    return Cell(run, settings, cell, state or "unfinished", max(left, 0.01))
