"""Run directories: what a run leaves on disk, and all runs as one tidy table.

``runs/<id>/`` holds ``config.yaml`` (resolved), ``env.json``, ``metrics.csv`` (a row per epoch),
``evals.csv`` (a row per evaluation), ``probes.csv`` (a row per number that a probe or a task has
measured), ``checkpoint.pt``, ``log.txt`` and, written last, ``status.json``. The directory is the
state of the run: no status means unfinished. Every file is replaced atomically, so that a kill at
any moment leaves the old file or the new one, and only by who holds the directory's lease
(``normlab.lease``).
"""

import csv
import hashlib
import io
import json
import logging
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab import lease

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

FINISHED = ("done", "diverged")
"""Statuses that another start of the same run does not change."""

EVAL_COLUMNS = [
    "protocol", "split", "statistics", "batch", "samples", "order", "epoch", "n", "error", "loss",
]  # fmt: skip
PROBE_COLUMNS = ["probe", "quantity", "epoch", "value"]
RUN_COLUMNS = [
    "id", "cell", "scale", "experiment", "model", "norm", "nbs", "data", "seed", "batch_size",
    "epochs", "lr", "decay", "precision", "world_size", "device", "threads", "torch", "commit",
    "dirty", "source", "data_digest", "data_note", "chance", "claims", "started", "seconds",
    "status",
]  # fmt: skip
COLUMNS = [*RUN_COLUMNS, *EVAL_COLUMNS, "value"]
"""Of the table of all runs. What a probe has measured is a row too, with its `value`, and its
`protocol` is <probe>.<quantity>; an evaluation's has none."""
NUMBERS = {
    "nbs", "seed", "batch_size", "epochs", "lr", "decay", "world_size", "threads", "chance",
    "seconds", "batch", "samples", "order", "epoch", "n", "error", "loss", "value",
}  # fmt: skip

_OF_TRAINING = {"model", "norm", "data", "nbs", "batch_size", "epochs", "lr", "decay"}
"""Columns that say nothing of a task that does not take these keys (``takes`` in its env.json)."""

# What no run executes: changing it cannot change a run's numbers.
_NOT_RUN = {
    "report", "bench", "cli.py", "app.py", "show.py", "equiv", "experiment",
    "engines.py", "forecast", "runs.py", "lease.py", "plugins.py", "trackers", "__main__.py",
    "__init__.py",
}  # fmt: skip


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a kill, sees the old content or the new, never a part.

    Raises LeaseLost for a file of a run that another process has taken over.
    """
    temporary = (lease.place(path.parent) or path.parent) / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileNotFoundError:
        lease.check(path.parent)
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@dataclass(frozen=True)
class RunDir:
    """One run's directory. Constructing it touches nothing on disk."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def snapshot(self, epoch: int) -> Path:
        """The weights at the end of an epoch that was evaluated before the last one."""
        return self.path / f"epoch-{epoch}.pt"

    def kept(self, epoch: int) -> Path:
        """All that the run was at the end of an epoch, for another to go on from."""
        return self.path / f"state-{epoch}.pt"

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run's lease; a second process that starts the same run waits here and says so.

        Within, what another process has taken over can no longer be written: LeaseLost.
        """
        return lease.hold(self.path)

    def locked(self) -> bool:
        """Whether this process holds the run's lease, and has not lost it."""
        return lease.held(self.path)

    def config(self) -> dict[str, Any]:
        """The resolved config. Raises ValueError if there is none or it cannot be read."""
        import yaml

        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not a run directory: it has no config.yaml") from None
        except yaml.YAMLError:
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"{self.path / 'config.yaml'} cannot be read as a run's config")
        return config

    def write_config(self, config: dict[str, Any]) -> None:
        import yaml

        write_atomically(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def env(self) -> dict[str, Any]:
        return self._json("env.json")

    def write_env(self, env: dict[str, Any]) -> None:
        write_atomically(self.path / "env.json", json.dumps(env, indent=1) + "\n")

    def status(self) -> dict[str, Any]:
        """The run's end, or {} while there is none."""
        return self._json("status.json")

    def clear(self) -> None:
        """Remove what an earlier start has made, for a start from nothing; its log stays."""
        for name in ("evals.csv", "probes.csv", "metrics.csv", "status.json"):
            lease.remove(self.path / name)
        for kept in (*self.path.glob("epoch-*.pt"), *self.path.glob("state-*.pt")):
            lease.remove(kept)

    def clear_status(self) -> None:
        """Make the run unfinished again."""
        lease.remove(self.path / "status.json")

    def write_status(self, status: dict[str, Any]) -> None:
        write_atomically(self.path / "status.json", json.dumps(status, indent=1) + "\n")

    def evals(self) -> list[dict[str, str]]:
        """The evaluations so far, one row each, as text."""
        return self._csv("evals.csv")

    def add_eval(self, row: dict[str, Any]) -> None:
        """Append one evaluation; an earlier row of the same protocol and epoch is replaced."""
        key = (row["protocol"], str(row["epoch"]))
        kept = [old for old in self.evals() if (old["protocol"], old["epoch"]) != key]
        self._write_csv("evals.csv", [*kept, row], EVAL_COLUMNS)

    def probes(self) -> list[dict[str, str]]:
        """What probes have measured so far, one row for each number, as text."""
        return self._csv("probes.csv")

    def add_probe(self, probe: str, measured: Iterable[tuple[int, str, float]]) -> None:
        """Append what a probe or a task has measured, (epoch, quantity, value), all at once.

        What it had measured after one of these epochs before is replaced.
        """
        rows = [
            {"probe": probe, "quantity": quantity, "epoch": str(epoch), "value": value}
            for epoch, quantity, value in measured
        ]
        keys = {(row["probe"], row["epoch"]) for row in rows}
        kept = [old for old in self.probes() if (old["probe"], old["epoch"]) not in keys]
        self._write_csv("probes.csv", [*kept, *rows], PROBE_COLUMNS)

    def measured(self) -> set[tuple[str, int]]:
        """(protocol or probe, epoch) of all that has been measured."""
        evals = {(row["protocol"], int(row["epoch"])) for row in self.evals()}
        return evals | {(row["probe"], int(row["epoch"])) for row in self.probes()}

    def metrics(self) -> list[dict[str, str]]:
        """The epochs so far, one row each, as text."""
        return self._csv("metrics.csv")

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._write_csv("metrics.csv", rows, list(rows[0]))

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / name).read_text()))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise ValueError(f"{self.path / name} is not readable JSON") from None

    def _csv(self, name: str) -> list[dict[str, str]]:
        try:
            with (self.path / name).open(newline="") as file:
                return list(csv.DictReader(file))
        except FileNotFoundError:
            return []

    def _write_csv(self, name: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / name, text.getvalue())


def find(run: str, root: Path) -> RunDir:
    """A run by its id, by a prefix of it that is unique, or by its directory.

    Raises ValueError that names what there is.
    """
    for path in (Path(run), root / run):
        if (path / "config.yaml").is_file():
            return RunDir(path)
    ids = [found.id for found in listed(root)]
    matches = [i for i in ids if i.startswith(run)]
    if len(matches) == 1:
        return RunDir(root / matches[0])
    if matches:
        raise ValueError(f"run '{run}' is ambiguous under {root}: {', '.join(matches[:4])}")
    there = f"for example {ids[0]}" if ids else "there are none"
    raise ValueError(f"no run '{run}' under {root} ({there})")


def listed(root: Path) -> list[RunDir]:
    """Every run directory under a root, by name."""
    return [RunDir(path.parent) for path in sorted(root.glob("*/config.yaml"))]


def summary(run: RunDir) -> dict[str, Any]:
    """The run's own columns of the table (``RUN_COLUMNS``)."""
    config, env, status = run.config(), run.env(), run.status()
    values = {
        "id": run.id,
        "model": env.get("network", config["model"]["name"]),
        "norm": config["norm"]["name"],
        "data": config["data"]["name"],
        "nbs": env.get("nbs"),
        "status": status.get("status", "unfinished"),
        "seconds": status.get("seconds"),
    }
    for source in (env, config):
        for column in RUN_COLUMNS:
            if column in source:
                values.setdefault(column, source[column])
    idle = _OF_TRAINING - set(env["takes"]) if "takes" in env else set()
    return {column: None if column in idle else values.get(column) for column in RUN_COLUMNS}


def readable(root: Path) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every run's own columns (``RUN_COLUMNS``) and its measurements, numbers as numbers.

    A directory that cannot be read is left out with a warning: it must not hide the others.
    """
    for run in listed(root):
        try:
            own, rows = _numbers(summary(run)), [_numbers(row) for row in _measured(run)]
        except KeyError as error:
            log.warning("left out %s: its files have no %s", run.path, error)
        except (ValueError, TypeError, OSError, csv.Error) as error:
            log.warning("left out %s: %s", run.path, error)
        else:
            yield own, rows


def _measured(run: RunDir) -> list[dict[str, Any]]:
    """A run's measurements as rows of the table."""
    rows: list[dict[str, Any]] = list(run.evals())
    for row in run.probes():
        name = f"{row['probe']}.{row['quantity']}"
        rows.append({"protocol": name, "epoch": row["epoch"], "value": row["value"]})
    return rows


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what stands as text in its columns of numbers read. Raises ValueError."""
    read = dict(row)
    for column in NUMBERS & row.keys():
        try:
            if row[column] in (None, ""):
                read[column] = None
            elif isinstance(row[column], str):
                read[column] = float(row[column])
            else:
                float(row[column])
        except (ValueError, TypeError):
            raise ValueError(f"its {column} is {row[column]!r}, which is no number") from None
    return read


def table(root: Path) -> "pd.DataFrame":
    """All runs under a root: one row per run and measurement; a run without any has one row.

    Unreadable directories are left out with a warning.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for own, measured in readable(root):
        rows += [own | row for row in measured] or [own]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    numbers = [
        "nbs", "batch", "samples", "order", "epoch", "n", "error", "loss", "value", "seconds",
    ]  # fmt: skip
    return frame.assign(**{name: pd.to_numeric(frame[name]) for name in numbers})


@dataclass(frozen=True)
class Committed:
    """What ``results/`` says of a run."""

    status: str
    evals: dict[tuple[str, int], float]
    """(protocol, epoch) of its evaluations -> error in %."""
    values: dict[tuple[str, int], float]
    """(<probe>.<quantity>, epoch) of what its probes have measured -> value."""
    path: Path
    """The table it stands in; the first one, where several experiments share the run."""

    def measured(self) -> set[tuple[str, int]]:
        """(protocol or probe, epoch) of all that has been measured."""
        return {*self.evals, *((name.partition(".")[0], epoch) for name, epoch in self.values)}


def committed(results: Path) -> dict[str, Committed]:
    """The finished runs of the committed ``results/*/runs.csv``, by id.

    Raises ValueError naming a file that is no such table.
    """
    found: dict[str, Committed] = {}
    for path in sorted(results.glob("*/runs.csv")):
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    if row["status"] in FINISHED:
                        run = found.setdefault(row["id"], Committed(row["status"], {}, {}, path))
                        if row["protocol"]:
                            at = row["protocol"], int(float(row["epoch"]))
                            if value := row.get("value"):
                                run.values.setdefault(at, float(value))
                            else:
                                run.evals.setdefault(at, float(row["error"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a table of runs ({error!r})") from None
    return found


@cache
def source_digest() -> str:
    """8 hex digits over the modules that a run executes, so that a report can mark older runs."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        relative = path.relative_to(package)
        if path.suffix in (".py", ".cpp", ".h") and relative.parts[0] not in _NOT_RUN:
            digest.update(str(relative).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


@cache
def commit() -> tuple[str, bool]:
    """The commit this package is run from, whether its files differ; ("", False) outside git."""
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", *words]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if package.name not in git("ls-files", "--full-name", "__init__.py"):
            return "", False  # installed inside somebody else's repository
        changed = git("status", "--porcelain", "--", ".", "../conf", "../experiments")
        return git("rev-parse", "--short=12", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "", False
