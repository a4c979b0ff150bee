"""The runs of one experiment at one scale as numbers on its grid, and what the grid still lacks."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normlab import config
from normlab.experiment import Contrast, Experiment
from normlab.protocols import Protocol
from normlab.report.gather import Row, by_run
from normlab.report.statistics import Sample, contrast
from normlab.runs import FINISHED

LAST_EPOCHS = {"gpu": 5, "paper": 5}
"""Scales at which a run's number is the median over its last evaluated epochs, as in the papers;
everywhere else it is the last epoch's. Never the best over epochs, and never of fewer epochs."""

Point = tuple[tuple[str, Any], ...]
"""A place on the grid: (axis, value) for every axis but the seed; arms by where they stand."""


@dataclass(frozen=True, order=True)
class Environment:
    """What may not be pooled: numbers from two of these never meet in one cell."""

    torch: str
    device: str
    data_digest: str

    def __str__(self) -> str:
        return f"torch {self.torch} on {self.device}, data {self.data_digest[:12] or 'unknown'}"


@dataclass(frozen=True)
class Grid:
    """Cell keys and seeds of an experiment at a scale; `problem`: why the cells are not known."""

    points: dict[str, Point]
    seeds: tuple[int, ...]
    problem: str = ""

    def __contains__(self, row: Row) -> bool:
        return row["cell"] in self.points and _integer(row["seed"]) in self.seeds


def compose(experiment: Experiment, scale: str) -> Grid:
    """The grid of an experiment at a scale. Each cell is composed once, whatever its seeds.

    A grid that cannot be composed has no points and says why: a report must outlive a broken scale.
    """
    seeds = tuple(experiment.scales[scale].axes.get("seed", ()))
    points: dict[str, Point] = {}
    try:
        for point, overrides in first_cells(experiment, scale).items():
            points[config.cell_key(config.compose(overrides))] = point
    except Exception as error:  # whatever Hydra, the schema or the batch plan object to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Grid({}, seeds, f"its cells cannot be composed: {reason}")
    return Grid(points, seeds)


def first_cells(experiment: Experiment, scale: str) -> dict[Point, list[str]]:
    """Every point of the grid with the overrides of its first seed."""
    cells: dict[Point, list[str]] = {}
    for cell in experiment.cells(scale):
        point = tuple((axis, value) for axis, value in cell.at.items() if axis != "seed")
        cells.setdefault(point, cell.overrides)
    return cells


@dataclass(frozen=True)
class Results:
    """One experiment at one scale: numbers by point and protocol, then by seed (errors in %)."""

    experiment: Experiment
    scale: str
    grid: Grid
    environment: Environment | None
    rows: list[Row]
    """One row per judged run (any of its evaluations)."""
    values: Mapping[tuple[Point, str], Mapping[int, float]]
    missing: dict[Point, list[int]]
    """Seeds without a finished run."""
    diverged: int
    failed: int
    lacking: dict[Point, list[int]]
    """Seeds whose finished run was not evaluated as the experiment and the scale ask for."""
    others: dict[Environment, int]
    """Finished runs per environment that is not judged."""
    surplus: int
    """Finished runs whose cell and seed another run of the same environment fills already."""
    by_epoch: Mapping[tuple[Point, str], Mapping[int, Mapping[int, float]]]
    """Errors along the way: by point and protocol, then by epoch, then by seed.

    Of the seeds that count (those in `values`), and only epochs that all of them have: a mean over
    other seeds at each epoch is no curve. A diverged run has chance error from where it ended.
    """

    @property
    def points(self) -> list[Point]:
        return list(first_cells(self.experiment, self.scale))

    @property
    def complete(self) -> bool:
        return not any(self.missing.values()) and not self.lacking

    def sample(self, point: Point, protocol: str) -> Sample:
        return Sample.of(self.values.get((point, protocol), {}).values())

    def baseline(self, point: Point) -> Point | None:
        """The point that `point` is compared with: the baseline's values, its own elsewhere.

        None for a point that has none of the baseline's axes.
        """
        if not self.experiment.baseline.keys() & dict(point).keys():
            return None
        return tuple((a, self.experiment.baseline.get(a, value)) for a, value in point)

    def change(self, point: Point, protocol: str) -> Sample:
        """The difference to the baseline in percentage points, taken within a seed."""
        here = self.values.get((point, protocol), {})
        base = self.baseline(point)
        there = self.values.get((base, protocol), {}) if base is not None else {}
        return contrast([(1.0, here), (-1.0, there)])

    def contrast(self, wanted: Contrast) -> Sample:
        """A claim's contrast. Raises ValueError when a term names no single point of the grid."""
        terms = []
        for factor, protocol, cell in wanted.terms:
            matches = [p for p in self.points if cell.items() <= dict(p).items()]
            if len(matches) != 1:
                raise ValueError(f"{cell} names {len(matches)} cells of this scale's grid, not one")
            terms.append((factor, self.values.get((matches[0], protocol), {})))
        return contrast(terms)


def results(experiment: Experiment, scale: str, grid: Grid, rows: Iterable[Row]) -> Results:
    """Group the rows by what may not be pooled and keep the group with the most finished runs."""
    groups: dict[Environment, list[list[Row]]] = {}
    for run in by_run(row for row in rows if row in grid).values():
        here = Environment(run[0]["torch"], run[0]["device"], run[0]["data_digest"])
        groups.setdefault(here, []).append(run)
    finished = {
        here: sum(run[0]["status"] in FINISHED for run in runs) for here, runs in groups.items()
    }
    # Ties go to the later torch; what is last in the order is arbitrary but never random.
    judged = max(groups, key=lambda here: (finished[here], here), default=None)
    runs = groups[judged] if judged else []
    runs.sort(key=lambda run: (run[0]["started"], run[0]["id"]))  # the first to fill a cell counts

    # As runs record them, whatever the order of options in the experiment's file.
    specs = {key: str(Protocol.parse(p.eval)) for key, p in experiment.protocols.items()}
    values: dict[tuple[Point, str], dict[int, float]] = {}
    taken: dict[tuple[str, int], Row] = {}
    curves: dict[tuple[Point, str], dict[int, dict[int, float]]] = {}  # by seed, then by epoch
    ends: dict[Point, dict[int, tuple[int, float]]] = {}
    lacking: dict[Point, list[int]] = {}
    surplus = 0
    for run in runs:
        row, seed = run[0], _integer(run[0]["seed"])
        if row["status"] not in FINISHED:
            continue
        if (row["cell"], seed) in taken:
            surplus += 1
            continue
        taken[row["cell"], seed] = row
        numbers = {key: run_number(run, spec, scale) for key, spec in specs.items()}
        point = grid.points[row["cell"]]
        if any(math.isnan(number) for number in numbers.values()):
            lacking.setdefault(point, []).append(seed)
        for key, number in numbers.items():
            if not math.isnan(number):
                values.setdefault((point, key), {})[seed] = number
                curves.setdefault((point, key), {})[seed] = epoch_errors(run, specs[key])
        if row["status"] == "diverged":
            last = max(_integer(one["epoch"]) for one in run)
            ends.setdefault(point, {})[seed] = last, float(row["chance"] or math.nan)

    keys = {point: key for key, point in grid.points.items()}
    return Results(
        experiment=experiment,
        scale=scale,
        grid=grid,
        environment=judged,
        rows=list(taken.values()),
        values=values,
        missing={
            point: [s for s in grid.seeds if (keys.get(point, ""), s) not in taken]
            for point in first_cells(experiment, scale)
        },
        diverged=sum(row["status"] == "diverged" for row in taken.values()),
        failed=sum(
            run[0]["status"] == "failed" and (run[0]["cell"], _integer(run[0]["seed"])) not in taken
            for run in runs
        ),
        lacking={point: sorted(seeds) for point, seeds in lacking.items()},
        others={here: n for here, n in sorted(finished.items()) if here != judged and n},
        surplus=surplus,
        by_epoch=by_epoch(curves, ends),
    )


def by_epoch(
    curves: Mapping[tuple[Point, str], Mapping[int, Mapping[int, float]]],
    ends: Mapping[Point, Mapping[int, tuple[int, float]]],
) -> dict[tuple[Point, str], dict[int, dict[int, float]]]:
    """Curves turned around: by epoch, then by seed, over epochs that every seed has.

    curves: by point and protocol, then by seed, then by epoch. ends: of the diverged runs, by point
    and seed, the last epoch that was evaluated (-1: none) and chance error, which holds from there
    on at all epochs that the others evaluated (of the arm, or of any if the whole arm diverged).
    """
    everywhere: dict[str, set[int]] = {}
    for (_, protocol), seeds in curves.items():
        everywhere.setdefault(protocol, set()).update(*seeds.values())
    found: dict[tuple[Point, str], dict[int, dict[int, float]]] = {}
    for (point, protocol), seeds in curves.items():
        diverged = ends.get(point, {})
        known = everywhere[protocol] if seeds.keys() <= diverged.keys() else set[int]().union(
            *seeds.values()
        )  # fmt: skip
        whole: dict[int, dict[int, float]] = {}
        for seed, errors in seeds.items():
            last, chance = diverged.get(seed, (math.inf, math.nan))
            beyond = {epoch: chance for epoch in known if epoch > last}
            for epoch, error in {**errors, **beyond}.items():
                whole.setdefault(epoch, {})[seed] = error
        found[point, protocol] = {
            epoch: whole[epoch] for epoch in sorted(whole) if len(whole[epoch]) == len(seeds)
        }
    return found


def run_number(run: list[Row], protocol: str, scale: str) -> float:
    """The one number a run counts with under a protocol, error in %.

    nan if it was not evaluated, or after fewer epochs than the scale asks for: a median of other
    epochs would be another number.

    A diverged run scores what guessing scores: leaving it out would flatter the arm that diverges.
    """
    if run[0]["status"] == "diverged":
        return float(run[0]["chance"] or math.nan)
    errors = list(epoch_errors(run, protocol).values())
    last = LAST_EPOCHS.get(scale, 1)
    return statistics.median(errors[-last:]) if len(errors) >= last else math.nan


def epoch_errors(run: list[Row], protocol: str) -> dict[int, float]:
    """Error in % by epoch, ascending. Several draws are averaged: the unit is the run."""
    epochs: dict[int, list[float]] = {}
    for row in run:
        if row["protocol"] == protocol and row["error"]:
            epochs.setdefault(_integer(row["epoch"]), []).append(float(row["error"]))
    return {epoch: statistics.fmean(sorted(epochs[epoch])) for epoch in sorted(epochs)}


def sort_key(grids: Mapping[str, Grid]) -> Callable[[Row], tuple[Any, ...]]:
    """The order of rows in ``runs.csv``: the experiment's scales, their cells, seeds."""
    places = {
        key: (s, p) for s, grid in enumerate(grids.values()) for p, key in enumerate(grid.points)
    }
    scales = {name: s for s, name in enumerate(grids)}

    def key(row: Row) -> tuple[Any, ...]:
        unknown = (scales.get(row["scale"], len(scales)), len(places))
        place = places.get(row["cell"], unknown)
        who = (_integer(row["seed"]), row["id"], row["torch"])
        return (*place, *who, row["protocol"], _integer(row["epoch"]), *row.values())

    return key


def _integer(value: str) -> int:
    return int(value) if value else -1
