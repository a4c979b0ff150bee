"""One run of a task (``normlab.tasks``), inside its directory: from its beginning to its end."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from normlab import build
from normlab.checkpoint import Stop
from normlab.data.base import Dataset
from normlab.runs import RunDir
from normlab.tasks.base import Row
from normlab.worker import now


@dataclass
class Task:
    """The objects of a run that is no classifier's training, before anything is written."""

    config: dict[str, Any]
    perform: Callable[[], Iterator[Row]]
    data: Dataset | None

    @property
    def name(self) -> str:
        return str(self.config["task"]["name"])


def construct(config: dict[str, Any]) -> Task:
    """Make what a task asks for. Raises ValueError or OSError with one clear line."""
    dataset = build.data_of(config)
    return Task(config, build.task(config, dataset), dataset)


def perform(task: Task, run: RunDir, stop: Stop) -> None:
    """Do a task from its beginning to its end, and record what it has measured.

    When ``stop`` is asked for, ends at the task's next row, and nothing is kept.
    """
    began = time.monotonic()
    torch.manual_seed(task.config["seed"])
    rows = []
    for row in task.perform():
        rows.append(row)
        stop.raise_if_asked()
    run.add_probe(task.name, rows)
    run.write_env(run.env() | {"ended": now()})
    run.write_status({"status": "done", "seconds": time.monotonic() - began})
