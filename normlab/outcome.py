"""What became of a run, in numbers and words."""

from dataclasses import dataclass, field
from pathlib import Path

from normlab.runs import RunDir


@dataclass(frozen=True)
class Outcome:
    """What became of a run; ``summary``: error in % by protocol at the last evaluated epoch;
    ``values``: what its probes have measured there, by <probe>.<quantity>.

    ``lacking``: in one line, what was asked for and a finished run cannot give any more.
    ``recorded``: the committed table that the numbers are read from; then ``path`` need not exist.
    """

    id: str
    status: str
    skipped: bool
    path: Path
    summary: dict[str, float]
    lacking: str = ""
    recorded: Path | None = None
    command: str = ""
    """What starts a run that is only prepared."""
    values: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where the run lies, in words."""
        if self.recorded is None:
            return str(self.path)
        return f"recorded in {self.recorded}; skip_done=local runs it here"


def outcome_of(directory: RunDir, *, skipped: bool) -> Outcome:
    """That of a run that has ended, as its directory tells."""
    errors = {(r["protocol"], int(r["epoch"])): float(r["error"]) for r in directory.evals()}
    values = {
        (f"{r['probe']}.{r['quantity']}", int(r["epoch"])): float(r["value"])
        for r in directory.probes()
    }
    status = directory.status()["status"]
    return Outcome(directory.id, status, skipped, directory.path, last(errors), values=last(values))


def last(numbers: dict[tuple[str, int], float]) -> dict[str, float]:
    """Those of the last measured epoch, from those by name and epoch."""
    last = max((epoch for _, epoch in numbers), default=0)
    return {name: number for (name, epoch), number in numbers.items() if epoch == last}
