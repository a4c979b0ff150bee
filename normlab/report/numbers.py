"""The one number a run counts with in a column."""

import math
import statistics
from collections.abc import Collection, Mapping

from normlab.experiment import OVER, Protocol
from normlab.report.gather import Row

LAST_EPOCHS = {"gpu": 5, "paper": 5}
"""Scales at which a run's number is the median over its last evaluated epochs, as in the papers;
everywhere else it is the last epoch's. Never the best over epochs, and never of fewer epochs."""


def run_number(row: Row, curve: Mapping[int, float], column: Protocol, scale: str) -> float:
    """The one number a run counts with in a column, in the column's unit.

    row: any of the run's. curve: its numbers by epoch, ascending. nan if it was not measured, or
    after fewer epochs than the scale asks for: a median of other epochs would be another number.

    A diverged run scores what guessing scores: leaving it out would flatter the arm that diverges.
    What has no such score, a probe's number or a spread, it does not have.
    """
    numbers = list(curve.values())
    if row["status"] == "diverged":
        guess = guessing(row, column)
        return OVER[column.over]([*numbers, guess]) if column.over and guess == guess else guess
    if column.over:
        return OVER[column.over](numbers) if numbers else math.nan
    last = 1 if column.task else LAST_EPOCHS.get(scale, 1)
    return statistics.median(numbers[-last:]) if len(numbers) >= last else math.nan


def guessing(row: Row, column: Protocol) -> float:
    """What a uniform guess scores: chance error in %, or a loss of -ln(1 - chance); else nan."""
    chance = float(row["chance"] or math.nan)
    if column.spread or column.column == "value":
        return math.nan
    return chance if column.column == "error" else -math.log1p(-chance / 100)


def curve_of(run: list[Row], column: Protocol, asked: Collection[int] = ()) -> dict[int, float]:
    """A column's number by epoch, ascending, at epochs that have every draw; only those `asked`
    for, if any are. The unit is the run: its draws are averaged, or their spread is taken."""
    found: dict[int, dict[str, list[float]]] = {}
    for row in run:
        if row["protocol"] in column.specs and row[column.column]:
            of_epoch = found.setdefault(integer(row["epoch"]), {})
            of_epoch.setdefault(row["protocol"], []).append(float(row[column.column]))
    curve = {}
    for epoch in sorted(found):
        if len(found[epoch]) == len(column.specs) and (not asked or epoch in asked):
            draws = sorted(statistics.fmean(sorted(values)) for values in found[epoch].values())
            curve[epoch] = statistics.stdev(draws) if column.spread else statistics.fmean(draws)
    return curve


def integer(value: str) -> int:
    """A number as it stands in a table, -1 for nothing."""
    return int(value) if value else -1
