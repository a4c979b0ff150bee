"""normlab with its phase on record, in a process to be killed.

`phase` holds the phase the process is in: start, epoch, checkpoint, evaluate, or between, where
rows are written and runs end; so a test that kills it knows where the kill fell. `phase.steps`,
written at a normal end, holds how many optimizer steps this process made.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(where: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """Be `normlab <arguments>` in the directory `where`, and end as it does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    with (where / "output.txt").open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    record, steps = where / "phase", 0

    def within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = record.read_text()
            record.write_text(phase)
            try:
                return function(*args, **kwargs)
            finally:
                record.write_text("between" if before == "start" else before)

        return wrapped

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            return function(*args, **kwargs)

        return wrapped

    record.write_text("start")

    from normlab import checkpoint, cli, train, worker

    checkpoint.save = within("checkpoint", checkpoint.save)
    train.Trainer.train_epoch = within("epoch", train.Trainer.train_epoch)
    train.Trainer._train_step = counted(train.Trainer._train_step)
    worker.evaluate_epoch = within("evaluate", worker.evaluate_epoch)
    sys.argv = ["normlab", *arguments]
    try:
        sys.exit(cli.main())
    finally:
        record.with_suffix(".steps").write_text(str(steps))
