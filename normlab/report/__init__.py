"""``normlab report``: from runs and the committed CSVs to tables, figures, verdicts and one page.

Everything is made again from the numbers each time, for all experiments, so that no two files of
``results/`` can disagree. Running it twice writes the same bytes.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from normlab import experiment as experiments
from normlab import runs as run_directories
from normlab.experiment import Experiment
from normlab.report import provenance, summary, tables, terminal
from normlab.report.drawings import drawn
from normlab.report.gather import Row, by_run, csv_text, merge, read, rows_of, unite
from normlab.report.grid import Grid, compose, results, sort_key
from normlab.report.page import ExperimentReport, ScaleReport, page
from normlab.report.verdicts import check, judge_all
from normlab.runs import COLUMNS, FINISHED

__all__ = ["main"]


def main(names: Sequence[str], *, runs: str, results: str, refresh: bool) -> int:
    """Write the reports under `results`, and print those of `names` (none: all).

    Experiments share runs. Those of `names` take in what is theirs of the local runs and of every
    other experiment's committed ones, as a sweep skips what any of them holds; the others are
    written anew from their own committed runs alone. A README beside `results` with the marks of
    ``normlab.report.summary`` gets its table of verdicts.

    runs: directory of run directories; may be absent. refresh: a local run replaces the committed
    one of the same id and torch version. Returns 0, also with nothing run.

    Raises ValueError for an unknown experiment or a file that is no table of runs.
    """
    for name in names:
        experiments.load(name)
    root = Path(results)
    local = rows_of(run_directories.table(Path(runs)))
    records = {path.parent.name: read(path) for path in sorted(root.glob("*/runs.csv"))}
    made = _each(_Given(frozenset(names), records, local, root, refresh))
    written = {name: paths for name, (_, paths) in made.items()}
    reports = [report for report, _ in made.values()]
    reports = judged(reports)
    verdicts = [
        (report.experiment.name, verdict)
        for report in reports
        for scale in report.scales.values()
        for verdict in scale.verdicts
    ]
    facts = [
        (report.experiment.name, outcome)
        for report in reports
        for scale in report.scales.values()
        for outcome in scale.facts
    ]
    # What was run comes first: a demo's page does not open with what nobody asked for.
    shown_first = sorted(
        reports, key=lambda report: not any(one.results.rows for one in report.scales.values())
    )
    table = tables.verdicts_csv(verdicts)
    lines = summary.read(table)
    shared = [
        write(root / "verdicts.csv", table),
        write(root / "index.html", page(shown_first, lines)),
    ]
    if facts:
        shared.append(write(root / "facts.csv", tables.facts_csv(facts)))
    if summary.update(readme := root.parent / "README.md", lines, root.name):
        shared.append(readme)
    shown = [report for report in reports if not names or report.experiment.name in names]
    for report in shown:
        print(terminal.experiment(report, written[report.experiment.name]))
    print("\n".join(f"wrote {path}" for path in shared), flush=True)
    return 0


@dataclass(frozen=True)
class _Given:
    """What the report of any experiment is made from."""

    names: frozenset[str]
    records: dict[str, list[Row]]
    local: list[Row]
    root: Path
    refresh: bool

    def report(self, name: str) -> tuple[ExperimentReport, list[Path]]:
        own, others, taken = self.records.get(name, []), [], []
        if not self.names or name in self.names:
            others = [rows for other, rows in self.records.items() if other != name]
            taken = self.local
        return report_experiment(
            experiments.load(name), own, others, taken, self.root, refresh=self.refresh
        )


def _each(given: _Given) -> dict[str, tuple[ExperimentReport, list[Path]]]:
    """Every experiment's report and its files, made side by side: drawing is most of the work."""
    names = experiments.names()
    workers = min(os.cpu_count() or 1, len(names))
    if workers == 1:
        return {name: given.report(name) for name in names}
    with ProcessPoolExecutor(workers, initializer=_know, initargs=(given,)) as pool:
        return dict(zip(names, pool.map(_report, names), strict=True))


_given: _Given
"""Of a process that makes reports."""


def _know(given: _Given) -> None:
    global _given
    _given = given


def _report(name: str) -> tuple[ExperimentReport, list[Path]]:
    return _given.report(name)


def judged(reports: list[ExperimentReport]) -> list[ExperimentReport]:
    """The reports with verdicts, which at each scale depend on all experiments, and with facts."""
    scales = [dict(report.scales) for report in reports]
    for name in dict.fromkeys(name for here in scales for name in here):
        here = [own for own in scales if name in own]
        found = judge_all([own[name].results for own in here])
        for own, verdicts in zip(here, found, strict=True):
            results = own[name].results
            facts = [check(fact, results) for fact in results.experiment.facts.values()]
            own[name] = replace(own[name], verdicts=verdicts, facts=facts)
    return [replace(report, scales=own) for report, own in zip(reports, scales, strict=True)]


def report_experiment(
    experiment: Experiment,
    own: list[Row],
    others: list[list[Row]],
    local: list[Row],
    root: Path,
    *,
    refresh: bool,
) -> tuple[ExperimentReport, list[Path]]:
    """One experiment's report, not yet judged, and the files written under ``root/<name>/``.

    own, others: its record and those of other experiments.
    """
    folder = root / experiment.name
    # Composing a grid takes a tenth of a second a cell: only scales with runs are worth it.
    every = [row for rows in (own, local, *others) for row in rows]
    labels = {row["scale"] for row in every}
    grids = {
        scale: compose(experiment, scale, every) if scale in labels else Grid({}, ())
        for scale in experiment.scales
    }

    wanted = {
        (cell, str(seed)) for grid in grids.values() for cell in grid.points for seed in grid.seeds
    }

    def mine(rows: list[Row]) -> list[Row]:
        return [row for row in rows if (row["cell"], row["seed"]) in wanted]

    here = mine(local)
    # A record may hold a run with less than this experiment asks of it, since experiments share
    # runs: a further execution that has all of it takes its place.
    recorded = by_run(own)
    whole = {
        key: run for key, run in by_run(here).items()
        if _is_whole(experiment, grids, run)
        and not (key in recorded and _is_whole(experiment, grids, recorded[key]))
    }  # fmt: skip
    first = [row for run in {**recorded, **whole}.values() for row in run]
    rows, again = merge(unite(first, map(mine, others)), here, refresh=refresh)
    rows = sorted(rows, key=sort_key(grids))
    written = [write(folder / "runs.csv", csv_text(rows, COLUMNS))] if rows else []

    scales: dict[str, ScaleReport] = {}
    for scale, grid in grids.items():
        scales[scale], paths = report_scale(experiment, scale, grid, rows, folder)
        written += paths
    broken = {scale for scale, grid in grids.items() if grid.problem}
    orphans = [
        row for row in rows
        if row["scale"] not in broken and not any(row in grid for grid in grids.values())
    ]  # fmt: skip
    return ExperimentReport(experiment, scales, again, len(by_run(orphans))), written


def _is_whole(experiment: Experiment, grids: dict[str, Grid], run: list[Row]) -> bool:
    """Whether a run has ended with all that the experiment asks of it."""
    scale = next((name for name, grid in grids.items() if run[0] in grid), None)
    if scale is None:
        return False
    found = results(experiment, scale, grids[scale], run)
    return run[0]["status"] in FINISHED and not found.lacking


def report_scale(
    experiment: Experiment, scale: str, grid: Grid, rows: list[Row], folder: Path
) -> tuple[ScaleReport, list[Path]]:
    """One scale, written only where there are runs."""
    found = results(experiment, scale, grid, rows)
    if not found.rows:
        return ScaleReport(grid, found, [], ""), []
    marks = provenance.marks(found, run_directories.source_digest())
    facts = [*provenance.facts(found), *(f"Note: {mark}" for mark in marks)]
    figure = drawn(found, provenance.subtitle(found))
    content: dict[str, str | bytes] = {
        f"table-{scale}.csv": tables.table_csv(found),
        f"table-{scale}.md": tables.markdown(found, facts),
        f"table-{scale}.tex": tables.latex(found, facts),
        **{f"figure-{scale}.{kind}": data for kind, data in figure.items()},
    }
    written = [write(folder / name, data) for name, data in content.items()]
    return ScaleReport(grid, found, marks, figure["svg"].decode()), written


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    run_directories.write_atomically(path, content)
    return path
