"""normlab with its phase on record, in processes to be killed.

`phase` holds the phase the process is in, or the first of its ranks: start, epoch, checkpoint,
evaluate, or between, where rows are written and runs end; so a test that kills it knows where the
kill fell. `phase.steps`, written at a normal end, holds how many optimizer steps it made.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    sys.exit(command(arguments))


def command(arguments: list[str]) -> int:
    """`normlab <arguments>`, in this process; phases are those of a run in this process."""
    from normlab import cli

    Path("phase").write_text("start")
    Path("phase.steps").unlink(missing_ok=True)
    if "world_size=2" in arguments:  # the ranks tell
        return cli.main(arguments)
    with phases(Path("phase")):
        return cli.main(arguments)


def rank(run: str) -> None:
    """A rank of a run that `command` has started, as tests/agents.py starts ranks."""
    from normlab import worker

    if os.environ["RANK"] == "0":
        with phases(Path("phase")):
            worker.main(run)
    else:
        worker.main(run)


@contextmanager
def phases(record: Path) -> Iterator[None]:
    """Within, the phase is on record; it stays so, as the process ends with this."""
    steps = 0

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

    from normlab import checkpoint, train, worker

    checkpoint.save = within("checkpoint", checkpoint.save)
    train.Trainer.train_epoch = within("epoch", train.Trainer.train_epoch)
    train.Trainer._train_step = counted(train.Trainer._train_step)
    worker.evaluate_epoch = within("evaluate", worker.evaluate_epoch)
    try:
        yield
    finally:
        record.with_suffix(".steps").write_text(str(steps))
