"""What a run says, into its log."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LogFile(logging.FileHandler):
    """A run's log, for as long as `ours` says that the run is this process's.

    What cannot be written, on a full disk say, is left out: the run's own failure tells of it, in
    one line.
    """

    def __init__(self, path: Path, ours: Callable[[], bool]) -> None:
        super().__init__(path)
        self.addFilter(lambda _: ours())

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Hand what normlab logs to a handler, in the format of a run's log."""
    root = logging.getLogger("normlab")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
