"""TensorBoard: event files in the run's directory, so that ``tensorboard --logdir runs`` calls the
run by its id. Hyperparameters are in its HParams tab, and whole as the text ``config``."""

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from normlab.protocols import Protocol
from normlab.runs import RunDir
from normlab.trackers.base import hyperparameters, plain

__all__ = ["LEAVES", "start"]

LEAVES = "events.out.tfevents.*"


def start(run: RunDir, config: dict[str, Any]) -> "_TensorBoard":
    """See `normlab.trackers.base`. Every start of a run has a file of its own, which TensorBoard
    reads one after the other as one run."""
    return _TensorBoard(run, config, first=not any(run.path.glob(LEAVES)))


class _TensorBoard:
    durable = True

    def __init__(self, run: RunDir, config: dict[str, Any], *, first: bool) -> None:
        from torch.utils.tensorboard import FileWriter, summary

        self._scalar: Callable[[str, float], Any] = summary.scalar
        self._writer = FileWriter(str(run.path))
        if first:
            # The columns of the tab besides the hyperparameters; values come with the numbers.
            protocols = (str(Protocol.parse(spec)) for spec in config["evals"])
            measured = {f"error/{plain(protocol)}": 0.0 for protocol in protocols}
            for part in summary.hparams(hyperparameters(config), measured):
                self._writer.add_summary(part)
            lines = yaml.safe_dump(config, sort_keys=False).splitlines()
            code = "".join(f"    {line}\n" for line in lines)  # shown as Markdown
            self._writer.add_summary(summary.text("config", code))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for tag, value in values.items():
            self._writer.add_summary(self._scalar(tag, value), epoch)
        self._writer.flush()

    def end(self, status: str) -> None:  # noqa: ARG002 (TensorBoard shows none)
        self._writer.close()
