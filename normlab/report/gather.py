"""All runs of an experiment in one table: the committed ones, never dropped, and the local ones.

The committed ``results/<experiment>/runs.csv`` is the record. A local run adds to it; it replaces a
committed run only when asked to, and where both exist they are compared instead. Everything here is
text, so that what is written is read back as the same bytes.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from normlab.runs import COLUMNS, FINISHED, NUMBERS, RUN_COLUMNS

Row = dict[str, str]
"""One evaluation of one run (or a run without any): column -> text, "" for nothing."""

RunKey = tuple[str, str]
"""Run id and torch version: what makes two rows the same run."""

INTEGERS = {
    "nbs", "seed", "batch_size", "epochs", "world_size", "threads", "batch", "samples", "order",
    "epoch", "n",
}  # fmt: skip


@dataclass(frozen=True)
class Again:
    """Committed runs that were run here once more, compared with the record.

    `difference` is the largest difference of an error, in percentage points; nan when nothing could
    be compared.
    """

    runs: int
    difference: float
    replaced: bool
    lacking: tuple[str, ...] = ()
    """Runs that were to replace the record but lack evaluations that it has, and which."""

    def __str__(self) -> str:
        if math.isnan(self.difference):
            outcome = "no evaluation in common"
        elif self.difference == 0:
            outcome = "identical"
        else:
            outcome = f"largest difference {self.difference:.3g} points"
        fate = ""
        if self.lacking:
            named = ", ".join(self.lacking[:3]) + (", ..." if len(self.lacking) > 3 else "")
            fate = (
                f"; the new numbers replaced {self.runs - len(self.lacking)}, the record stands "
                f"for {len(self.lacking)} that lack evaluations it has: {named}"
            )
        elif self.replaced:
            fate = "; the new numbers replaced them"
        elif self.difference != 0:
            fate = "; the record stands (--refresh takes the new numbers)"
        noun = "run was" if self.runs == 1 else "runs were"
        return f"{self.runs} committed {noun} run again here: {outcome}{fate}"


def text(column: str, value: Any) -> str:
    """A cell of the table as it stands in the CSV: numbers by their shortest exact spelling."""
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return ""
    if isinstance(value, str):
        return value
    if column in INTEGERS and float(value).is_integer():
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))  # through float: numpy's own repr names its type
    return str(value).lower() if isinstance(value, bool | np.bool_) else str(value)


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a tidy table as text; columns it lacks are empty."""
    return [
        {column: text(column, record.get(column)) for column in COLUMNS}
        for record in frame.astype(object).to_dict(orient="records")
    ]


def read(path: Path) -> list[Row]:
    """The committed rows, or none where there is no file.

    Raises ValueError, naming the file and line, for another table and for what is no number.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {"id", "cell", "protocol", "error"} <= set(reader.fieldnames or ()):
                raise ValueError("its first line names no id, cell, protocol and error")
            for row in reader:
                rows.append({column: row.get(column) or "" for column in COLUMNS})
                _check_numbers(rows[-1], reader.line_num)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of runs: {error}") from None
    return rows


def _check_numbers(row: Row, line: int) -> None:
    for column in (column for column in COLUMNS if column in NUMBERS):
        try:
            (int if column in INTEGERS else float)(row[column] or 0)
        except ValueError:
            raise ValueError(f"line {line}: {column} is '{row[column]}'") from None


def csv_text(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    """Rows as CSV with a header, empty for what is missing or nan."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([text(column, row.get(column)) for column in columns] for row in rows)
    return out.getvalue()


def by_run(rows: Iterable[Row]) -> dict[RunKey, list[Row]]:
    runs: dict[RunKey, list[Row]] = {}
    for row in rows:
        runs.setdefault((row["id"], row["torch"]), []).append(row)
    return runs


def merge(
    committed: list[Row], local: list[Row], *, refresh: bool = False
) -> tuple[list[Row], Again | None]:
    """The committed rows and what the local ones add, and how runs that are in both compare.

    A finished local run takes the place of a committed one that failed (a failed run holds no
    result) and, with `refresh`, of any whose evaluations it has all (a diverged one has no more to
    give). Else a run that was executed again is only compared; its further evaluations are added if
    all that both have are identical. Local runs that have not ended are left out.
    """
    merged = by_run(committed)
    again, differences, lacking = 0, [], []
    for key, new in by_run(local).items():
        old = merged.get(key)
        if old is None:
            if new[0]["status"] in (*FINISHED, "failed"):
                merged[key] = new
        elif new[0]["status"] not in FINISHED:
            continue
        elif old[0]["status"] not in FINISHED:
            merged[key] = new
        else:
            # A run keeps its starting time through resumption: another one is another execution.
            same = old[0]["started"] == new[0]["started"]
            difference = _difference(old, new)
            if not same:
                again += 1
                differences.append(difference)
            gone = _evaluations(old) - _evaluations(new) if new[0]["status"] == "done" else set()
            if refresh and not gone:
                merged[key] = new
                continue
            if refresh and not same:
                lacking.append(f"{key[0]} without {_spelled(gone)}")
            if same or difference == 0:
                merged[key] = _add_evaluations(old, new)
    rows = [row for run in merged.values() for row in run]
    if not again:
        return rows, None
    comparable = [value for value in differences if not math.isnan(value)]
    return rows, Again(again, max(comparable, default=math.nan), refresh, tuple(lacking))


def unite(own: list[Row], others: Iterable[list[Row]]) -> list[Row]:
    """One record and what further ones, in their order, hold of the same or other runs.

    Evaluations of a run that stands in several are united under what the first says of it. Two
    executions that contradict each other are not mixed: the first stands.
    """
    united = by_run(own)
    for record in others:
        for key, new in by_run(record).items():
            old = united.get(key)
            if old is None or (old[0]["status"] not in FINISHED and new[0]["status"] in FINISHED):
                united[key] = new
            elif old[0]["status"] == new[0]["status"] and not _difference(old, new) > 0:
                united[key] = _add_evaluations(old, new)
    return [row for run in united.values() for row in run]


def _evaluation(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in ("protocol", "epoch", "batch", "samples", "order"))


def _evaluations(rows: list[Row]) -> set[tuple[str, ...]]:
    return {_evaluation(row) for row in rows if row["protocol"]}


def _spelled(evaluations: Iterable[tuple[str, ...]]) -> str:
    """For example "test:ema of epochs 14, 15"."""
    epochs: dict[str, set[int]] = {}
    for protocol, epoch, *_ in evaluations:
        epochs.setdefault(protocol, set()).add(int(epoch or 0))
    return " and ".join(
        f"{protocol} of epoch{'s' * (len(of) > 1)} {', '.join(map(str, sorted(of)))}"
        for protocol, of in sorted(epochs.items())
    )


def _difference(old: list[Row], new: list[Row]) -> float:
    """Largest difference in error over the evaluations in common; nan without any."""
    there = {_evaluation(row): row["error"] for row in old}
    pairs = [(there[_evaluation(row)], row["error"]) for row in new if _evaluation(row) in there]
    return max((abs(float(a) - float(b)) for a, b in pairs if a and b), default=math.nan)


def _add_evaluations(old: list[Row], new: list[Row]) -> list[Row]:
    """The record first; further evaluations carry the columns of the run they are added to."""
    there = {_evaluation(row) for row in old}
    run = {column: old[0][column] for column in RUN_COLUMNS}
    added = [row | run for row in new if row["protocol"] and _evaluation(row) not in there]
    kept = [row for row in old if row["protocol"]] if added else old
    return kept + added
