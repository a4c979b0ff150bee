"""``normlab report``: from runs and the committed CSVs to tables, figures, verdicts and one page.

Everything is made again from the numbers each time, for all experiments, so that no two files of
``results/`` can disagree. Running it twice writes the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from normlab import experiment as experiments
from normlab import runs as run_directories
from normlab.experiment import Experiment
from normlab.report import figures, provenance, tables, terminal
from normlab.report.gather import Row, by_run, csv_text, merge, read, rows_of
from normlab.report.grid import Grid, compose, results, sort_key
from normlab.report.page import ExperimentReport, ScaleReport, page
from normlab.report.verdicts import judge_all
from normlab.runs import COLUMNS

__all__ = ["main"]


def main(names: Sequence[str], *, runs: str, results: str, refresh: bool) -> int:
    """Write the report of every experiment under `results` and print that of `names` (none: all).

    runs: directory of run directories; may be absent. refresh: a local run replaces the committed
    one of the same id and torch version. Returns 0, also with nothing run.

    Raises ValueError for an unknown experiment or a file that is no table of runs.
    """
    for name in names:
        experiments.load(name)
    root = Path(results)
    local = rows_of(run_directories.table(Path(runs)))
    reports: list[ExperimentReport] = []
    written: dict[str, list[Path]] = {}
    for name in experiments.names():
        report, paths = report_experiment(experiments.load(name), local, root, refresh=refresh)
        reports.append(report)
        written[name] = paths
    verdicts = [
        (report.experiment.name, verdict)
        for report in reports
        for scale in report.scales.values()
        for verdict in scale.verdicts
    ]
    shared = [
        write(root / "verdicts.csv", tables.verdicts_csv(verdicts)),
        write(root / "index.html", page(reports)),
    ]
    shown = [report for report in reports if not names or report.experiment.name in names]
    for report in shown:
        print(terminal.experiment(report, written[report.experiment.name]))
    print("\n".join(f"wrote {path}" for path in shared))
    return 0


def report_experiment(
    experiment: Experiment, local: list[Row], root: Path, *, refresh: bool
) -> tuple[ExperimentReport, list[Path]]:
    """One experiment's report and the files written for it under ``root/<name>/``."""
    folder = root / experiment.name
    committed = read(folder / "runs.csv")
    # Composing a grid takes a tenth of a second a cell: only scales with runs are worth it.
    labels = {row["scale"] for row in (*committed, *local)}
    grids = {
        scale: compose(experiment, scale) if scale in labels else Grid({}, ())
        for scale in experiment.scales
    }
    mine = [row for row in local if any(row in grid for grid in grids.values())]
    rows, again = merge(committed, mine, refresh=refresh)
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


def report_scale(
    experiment: Experiment, scale: str, grid: Grid, rows: list[Row], folder: Path
) -> tuple[ScaleReport, list[Path]]:
    """One scale: always judged (without runs: "not run"), written only where there are runs."""
    found = results(experiment, scale, grid, rows)
    verdicts = judge_all(found)
    if not found.rows:
        return ScaleReport(grid, found, verdicts, [], ""), []
    marks = provenance.marks(found, run_directories.source_digest())
    facts = [*provenance.facts(found), *(f"Note: {mark}" for mark in marks)]
    figure = figures.draw(found, provenance.subtitle(found))
    svg = figures.render(figure, "svg")
    content: dict[str, str | bytes] = {
        f"table-{scale}.csv": tables.table_csv(found),
        f"table-{scale}.md": tables.markdown(found, facts),
        f"table-{scale}.tex": tables.latex(found, facts),
        f"figure-{scale}.png": figures.render(figure, "png"),
        f"figure-{scale}.svg": svg,
    }
    written = [write(folder / name, data) for name, data in content.items()]
    return ScaleReport(grid, found, verdicts, marks, svg.decode()), written


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    run_directories.write_atomically(path, content)
    return path
