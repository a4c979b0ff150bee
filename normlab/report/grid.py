"""The runs of one experiment at one scale as numbers on its grid, and what the grid still lacks."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from normlab import agenda, config
from normlab.experiment import COLUMN, EPOCH, FIRST, LAST, Contrast, Experiment
from normlab.report import given
from normlab.report.composed import Cell, remembered
from normlab.report.gather import Row, by_run
from normlab.report.numbers import curve_of, guessing, integer, run_number
from normlab.report.statistics import Sample, contrast, paired
from normlab.runs import FINISHED

Point = tuple[tuple[str, Any], ...]
"""A place on the grid: (axis, value) for every axis but the seed; arms by where they stand.

A row of a table may stand at an epoch besides: the last pair is (EPOCH, an epoch, FIRST or LAST).
"""


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
    """Cell keys and seeds of an experiment at a scale; `problem`: why the cells are not known.

    `epochs`: after which the runs at a point are to be evaluated; none for a task, whose clock is
    its own.
    """

    points: dict[str, Point]
    seeds: tuple[int, ...]
    problem: str = ""
    epochs: dict[Point, frozenset[int]] = field(default_factory=dict)

    def __contains__(self, row: Row) -> bool:
        return row["cell"] in self.points and integer(row["seed"]) in self.seeds


def compose(experiment: Experiment, scale: str, rows: Iterable[Row] = ()) -> Grid:
    """The grid of an experiment at a scale. Each cell is composed once, whatever its seeds; of
    networks that are given, the cells are those of the `rows`.

    A grid that cannot be composed has no points and says why: a report must outlive a broken scale.
    """
    seeds = tuple(experiment.scales[scale].axes.get("seed", ()))
    if experiment.scales[scale].given:
        return Grid(given.places(experiment, scale, rows), seeds)
    cells = first_cells(experiment, scale)
    try:
        found = remembered(f"{experiment.name}-{scale}", cells.values(), _cell)
    except Exception as error:  # whatever Hydra, the schema or the batch plan object to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Grid({}, seeds, f"its cells cannot be composed: {reason}")
    points = {key: point for point, (key, _) in zip(cells, found, strict=True)}
    epochs = {point: asked for point, (_, asked) in zip(cells, found, strict=True)}
    return Grid(points, seeds, epochs=epochs)


def _cell(overrides: Sequence[str]) -> Cell:
    composed = config.compose(overrides)
    return config.cell_key(composed), asked_epochs(composed)


def asked_epochs(composed: dict[str, Any]) -> frozenset[int]:
    """After which epochs a run is evaluated, by its config; none for a task."""
    return frozenset(() if config.is_task(composed) else agenda.epochs(composed))


def first_cells(experiment: Experiment, scale: str) -> dict[Point, list[str]]:
    """Every point of the grid with the overrides of its first seed."""
    cells: dict[Point, list[str]] = {}
    for cell in experiment.cells(scale):
        point = tuple((axis, value) for axis, value in cell.at.items() if axis != "seed")
        cells.setdefault(point, cell.overrides)
    return cells


@dataclass(frozen=True)
class Results:
    """One experiment at one scale: numbers by point and protocol, then by seed.

    Each is in its protocol's unit; at `gpu` and `paper` as ``numbers.LAST_EPOCHS`` says.
    """

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
    """Numbers along the way: by point and protocol, then by epoch, then by seed.

    Of the seeds that count (those in `values`), of epochs that the experiment asks for, and only
    those that all seeds have: a mean over other seeds at each epoch is no curve. A diverged run has
    chance error, and the loss of a guess, from where it ended.
    """

    repeated: str
    """Of what the numbers of a sample are: seeds, or of given networks as `given.repeated` says."""

    @cached_property
    def points(self) -> list[Point]:
        return points(self.experiment, self.scale, self.grid)

    @property
    def places(self) -> dict[str, list[Any]]:
        """What a claim may name a cell by, with all values that there are."""
        grid = self.experiment.scales[self.scale]
        found = {axis: list(values) for axis, values in grid.places.items()}
        for axis, value in (pair for point in self.points for pair in point if grid.given):
            known = found.setdefault(axis, [])
            known += [] if value in known else [value]
        return found

    @property
    def shown(self) -> list[Point]:
        """Rows of the table: the grid's points, at each epoch that the table names if any; a given
        network has no epochs."""
        epochs = self.experiment.table.get("epochs", [])
        if not epochs or self.experiment.scales[self.scale].given:
            return self.points
        return [(*point, (EPOCH, epoch)) for point in self.points for epoch in epochs]

    @property
    def drawn(self) -> list[Point]:
        """The rows that the figure shows: all, or those that stand where its `only` says."""
        only = self.experiment.figure.get("only", {}).items()
        return [point for point in self.shown if only <= dict(point).items()]

    @property
    def complete(self) -> bool:
        return not any(self.missing.values()) and not self.lacking

    def numbers(self, point: Point, protocol: str) -> Mapping[int, float]:
        """By seed, at a point that may name an epoch; empty where there are none."""
        epoch = dict(point).get(EPOCH, LAST)
        place = without_epoch(point)
        if epoch == LAST:
            return self.values.get((place, protocol), {})
        along = self.by_epoch.get((place, protocol), {})
        if epoch == FIRST:
            epoch = min(self.grid.epochs.get(place) or along, default=0)
        return along.get(epoch, {})

    def along(self, point: Point, protocol: str) -> Mapping[int, Mapping[int, float]]:
        """The curve of a point: by epoch, then by seed."""
        return self.by_epoch.get((without_epoch(point), protocol), {})

    def sample(self, point: Point, protocol: str) -> Sample:
        return Sample.of(self.numbers(point, protocol).values())

    def baseline(self, point: Point) -> Point | None:
        """The point that `point` is compared with: the baseline's values, its own elsewhere.

        Where the grid has none there, since the baseline lacks an axis of the point, the only one
        that has the baseline's values and shares those of the axes that both have.

        None for a point that has none of the baseline's axes, where it names some.
        """
        base = self.experiment.baseline
        axes = base.keys() - {COLUMN}
        if not base or (axes and not axes & dict(point).keys()):
            return None
        wanted = {axis: base.get(axis, value) for axis, value in point}
        found = [
            other
            for other in self.grid.points.values()
            if axes & wanted.keys() <= dict(other).keys()
            and all(wanted.get(axis, value) == value for axis, value in other)
        ]
        exact = tuple(wanted.items())
        if len(found) != 1 or without_epoch(exact) in found:
            return exact
        return (*found[0], *(pair for pair in point if pair[0] == EPOCH))

    def change(self, point: Point, protocol: str) -> Sample:
        """The difference to the baseline, taken within a seed; none between different units."""
        base, base_column = self.baseline(point), self.experiment.base(protocol)
        if base is None or base_column is None:
            return Sample.of([])
        terms = [(1.0, self.numbers(point, protocol)), (-1.0, self.numbers(base, base_column))]
        return contrast(terms)

    def contrast(self, wanted: Contrast) -> dict[int, float]:
        """A claim's or a fact's contrast by seed.

        Raises ValueError when a term names no single point of the grid.
        """
        return paired([(f, self.numbers(self.place(at), p)) for f, p, at in wanted.terms])

    def place(self, named: Mapping[str, Any]) -> Point:
        """The point that a term of a contrast names, with its epoch if it names one: the one that
        stands exactly there, or else the only one that does so on the axes it mentions.

        Raises ValueError when there is no single one.
        """
        cell = {axis: value for axis, value in named.items() if axis != EPOCH}
        epoch = [(EPOCH, named[EPOCH])] if EPOCH in named else []
        matches = [p for p in self.points if cell == dict(p)] or [
            p for p in self.points if cell.items() <= dict(p).items()
        ]
        if len(matches) != 1:
            raise ValueError(f"{cell} names {len(matches)} cells of this scale's grid, not one")
        return (*matches[0], *epoch)


def points(experiment: Experiment, scale: str, grid: Grid) -> list[Point]:
    """The places of a grid in their order, also where its cells are not known."""
    if experiment.scales[scale].given:
        return sorted(set(grid.points.values()), key=str)
    return list(first_cells(experiment, scale))


def without_epoch(point: Point) -> Point:
    """The point of the grid behind a row of the table."""
    return tuple((axis, value) for axis, value in point if axis != EPOCH)


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

    def fills(row: Row) -> tuple[Point, int, int]:
        which = given.network(row) if experiment.scales[scale].given else 0
        return grid.points[row["cell"]], which, integer(row["seed"])

    repeated = given.SEEDS
    if experiment.scales[scale].given:
        repeated = given.repeated((run[0] for run in runs), grid.points)

    numbers: dict[tuple[Point, str], dict[int, list[float]]] = {}
    taken: dict[tuple[Point, int, int], Row] = {}
    curves: dict[tuple[Point, str], dict[int, dict[int, float]]] = {}  # by seed, then by epoch
    ends: dict[tuple[Point, str], dict[int, tuple[int, float]]] = {}
    lacking: dict[Point, dict[int, None]] = {}
    surplus = 0
    for run in runs:
        row, seed = run[0], integer(run[0]["seed"])
        if row["status"] not in FINISHED:
            continue
        if fills(row) in taken:
            surplus += 1
            continue
        taken[fills(row)] = row
        point, diverged = grid.points[row["cell"]], row["status"] == "diverged"
        one = given.network(row) if repeated == given.NETWORKS else seed
        for key, column in experiment.columns(scale).items():
            asked = grid.epochs.get(point, frozenset())
            if "train:augmented" in column.specs:
                asked -= {0}  # no training forward precedes the first epoch
            curve = curve_of(run, column, asked)
            number = run_number(row, curve, column, scale)
            if not diverged and (math.isnan(number) or asked - curve.keys()):
                lacking.setdefault(point, {})[seed] = None
            if math.isnan(number):
                continue
            numbers.setdefault((point, key), {}).setdefault(one, []).append(number)
            if repeated == given.NETWORKS:  # which have no curve
                continue
            curves.setdefault((point, key), {})[seed] = curve
            if diverged:
                last = max(integer(one["epoch"]) for one in run)
                ends.setdefault((point, key), {})[seed] = last, guessing(row, column)

    known: dict[Point, set[int]] = {}
    for point, which, _ in taken:
        known.setdefault(point, set()).add(which)
    return Results(
        experiment=experiment,
        scale=scale,
        grid=grid,
        environment=judged,
        rows=list(taken.values()),
        values={
            place: {one: statistics.fmean(drawn) for one, drawn in of.items()}
            for place, of in numbers.items()
        },
        missing={
            point: [
                seed
                for seed in grid.seeds
                if any((point, which, seed) not in taken for which in known.get(point, {0}))
            ]
            for point in points(experiment, scale, grid)
        },
        diverged=sum(row["status"] == "diverged" for row in taken.values()),
        failed=sum(run[0]["status"] == "failed" and fills(run[0]) not in taken for run in runs),
        lacking={point: sorted(seeds) for point, seeds in lacking.items()},
        others={here: n for here, n in sorted(finished.items()) if here != judged and n},
        surplus=surplus,
        by_epoch=by_epoch(curves, ends),
        repeated=repeated,
    )


def by_epoch(
    curves: Mapping[tuple[Point, str], Mapping[int, Mapping[int, float]]],
    ends: Mapping[tuple[Point, str], Mapping[int, tuple[int, float]]],
) -> dict[tuple[Point, str], dict[int, dict[int, float]]]:
    """Curves turned around: by epoch, then by seed, over epochs that every seed has.

    curves: by point and protocol, then by seed, then by epoch. ends: of the diverged runs, by the
    same and seed, the last epoch that was evaluated (-1: none) and the number of a guess, which
    holds from there on at all epochs that the others evaluated (of the arm, or of any if the whole
    arm diverged).
    """
    everywhere: dict[str, set[int]] = {}
    for (_, protocol), seeds in curves.items():
        everywhere.setdefault(protocol, set()).update(*seeds.values())
    found: dict[tuple[Point, str], dict[int, dict[int, float]]] = {}
    for (point, protocol), seeds in curves.items():
        diverged = ends.get((point, protocol), {})
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


def sort_key(grids: Mapping[str, Grid]) -> Callable[[Row], tuple[Any, ...]]:
    """The order of rows in ``runs.csv``: the experiment's scales, their cells, seeds."""
    places = {
        key: (s, p) for s, grid in enumerate(grids.values()) for p, key in enumerate(grid.points)
    }
    scales = {name: s for s, name in enumerate(grids)}

    def key(row: Row) -> tuple[Any, ...]:
        unknown = (scales.get(row["scale"], len(scales)), len(places))
        place = places.get(row["cell"], unknown)
        who = (integer(row["seed"]), row["id"], row["torch"])
        return (*place, *who, row["protocol"], integer(row["epoch"]), *row.values())

    return key
