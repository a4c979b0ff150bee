"""What the sources say: of a row of a table, and of a contrast in its own sign."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normlab.experiment import COLUMN, EPOCH, LAST, Contrast, Experiment, Published
from normlab.report.grid import Point, Results


@dataclass(frozen=True)
class Paper:
    """A published number, in its column's unit, and its difference to the source's baseline."""

    value: float
    change: float
    source: str


def published(results: Results, point: Point, protocol: str) -> Iterable[Paper]:
    """What the sources say at a point under a protocol."""
    for source in results.experiment.published:
        value = said(results, source, point, protocol)
        if value is not None:
            base = paper_baseline(results.experiment, source, protocol, dict(point))
            yield Paper(value, value - base, source.label)


def said(results: Results, source: Published, point: Point, protocol: str) -> float | None:
    """A source's number at a point, which counts as the last epoch's if it names none.

    A source speaks of the cell that stands exactly where it says. Only where the grid has no such
    cell does it speak of those that stand on further axes as well.
    """
    values, at = source.values.get(protocol, {}), {EPOCH: LAST, **dict(point)}
    if not source.at.items() <= at.items() or at.get(source.x) not in values:
        return None
    cell = {axis: value for axis, value in point if axis != EPOCH}
    named = {axis: value for axis, value in cell.items() if axis in {source.x, *source.at}}
    if named != cell and any(dict(other) == named for other in results.grid.points.values()):
        return None
    return values[at[source.x]]


def paper_baseline(
    experiment: Experiment, source: Published, protocol: str, at: Mapping[str, Any]
) -> float:
    """A source's own number at the experiment's baseline, seen from a place; nan if it has none."""
    base = experiment.base(protocol) or ""
    axes = experiment.baseline.keys() - {COLUMN}
    x = experiment.baseline.get(source.x, math.nan if axes else at.get(source.x, math.nan))
    return source.values.get(base, {}).get(x, math.nan)


def effect(results: Results, wanted: Contrast) -> float:
    """A contrast of the numbers of one source, in our contrast's sign and unit.

    nan unless a source has all of its terms: numbers of two sources are not subtracted. Entries of
    one label are one source, told in parts; of several sources that have all, the first counts.

    Raises ValueError when a term names no single point of the grid.
    """
    places = [(factor, protocol, results.place(cell)) for factor, protocol, cell in wanted.terms]
    for label in dict.fromkeys(source.label for source in results.experiment.published):
        parts = [one for one in results.experiment.published if one.label == label]
        terms = []
        for factor, protocol, point in places:
            numbers = (said(results, part, point, protocol) for part in parts)
            terms.append(factor * next((n for n in numbers if n is not None), math.nan))
        total = math.fsum(terms)
        if not math.isnan(total):
            return total
    return math.nan
